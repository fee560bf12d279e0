"""A real nginx with the configuration of deploy/, on free ports of the loopback."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.servers import ROOT, WAIT_S, reserve_port

NAME = "api.example.org"
CONFIGURATION = (ROOT / "deploy" / "nginx.conf").read_text()
NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
OPENSSL = shutil.which("openssl")

needs_nginx = pytest.mark.skipif(
    not NGINX or not OPENSSL,
    reason="nginx and openssl are needed: scripts/install_test_tools.sh installs them",
)


def certificate(folder: Path, key: str) -> None:
    """A certificate that nobody else signed, as fullchain.pem and privkey.pem."""
    assert OPENSSL is not None
    subject = ["-subj", f"/CN={NAME}", "-addext", f"subjectAltName=DNS:{NAME}"]
    curve = ["-pkeyopt", "ec_paramgen_curve:prime256v1"] if key == "ec" else []
    files = ["-keyout", str(folder / "privkey.pem"), "-out", str(folder / "fullchain.pem")]
    subprocess.run(
        [OPENSSL, "req", "-x509", "-noenc", "-newkey", key, *curve, *subject, *files],
        check=True,
        capture_output=True,
        timeout=WAIT_S,
    )


class Proxy:
    """nginx in front of ``server_port``. ``rate`` replaces the guard against floods."""

    def __init__(
        self, folder: Path, server_port: int, rate: str = "10000r/s", key: str = "ec"
    ) -> None:
        self.folder = folder
        self._reserved = reserve_port(), reserve_port()
        self.https, self.http = (holder.getsockname()[1] for holder in self._reserved)
        certificate(folder, key)
        self.file = folder / "nginx.conf"
        self.file.write_text(self._adapted(server_port, rate))
        self._trust = ssl.create_default_context(cafile=str(folder / "fullchain.pem"))
        self._connections: list[http.client.HTTPConnection] = []

    def _adapted(self, server_port: int, rate: str) -> str:
        """The configuration with the places of this test, and nothing else changed."""
        temporary = "".join(
            f"    {kind}_temp_path {self.folder}/{kind};\n"
            for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        changes = [
            (r"^user .*\n", "user root;\n" if os.geteuid() == 0 else ""),
            (r"worker_processes auto", "worker_processes 1"),
            (r"^http \{\n", "http {\n" + temporary),
            (r"( *listen \[::\].*\n)", ""),
            (r"listen 443", f"listen 127.0.0.1:{self.https}"),
            (r"listen 80", f"listen 127.0.0.1:{self.http}"),
            (r"127\.0\.0\.1:5000", f"127.0.0.1:{server_port}"),
            (r"/etc/transformers-api/tls|/var/www/acme|/var/log/nginx|/run", str(self.folder)),
            (r"rate=20r/s", f"rate={rate}"),
        ]
        text = CONFIGURATION
        for pattern, replacement in changes:
            text, count = re.subn(pattern, replacement, text, flags=re.MULTILINE)
            assert count, f"{pattern} is not in nginx.conf"
        return text

    @property
    def command(self) -> list[str]:
        assert NGINX is not None
        log = str(self.folder / "error.log")
        return [NGINX, "-e", log, "-p", str(self.folder), "-c", str(self.file)]

    def errors(self) -> str:
        return (self.folder / "error.log").read_text()

    @contextmanager
    def running(self) -> Iterator[Proxy]:
        process = subprocess.Popen([*self.command, "-g", "daemon off;"], stdin=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + WAIT_S
            while not self._listens():
                assert process.poll() is None, self.errors()
                assert time.monotonic() < deadline, self.errors()
                time.sleep(0.01)  # polling, with a deadline
            yield self
        finally:
            for connection in (*self._connections, *self._reserved):
                connection.close()
            process.terminate()
            process.wait(WAIT_S)

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.https)) == 0

    def socket(
        self, source: str = "127.0.0.1", name: str = NAME, ciphers: str | None = None
    ) -> ssl.SSLSocket:
        """A connection over TLS, from an address of its own; with ``ciphers``, over TLS 1.2."""
        plain = socket.create_connection(("127.0.0.1", self.https), WAIT_S, (source, 0))
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        trust = self._trust
        if ciphers:
            trust = ssl.create_default_context(cafile=str(self.folder / "fullchain.pem"))
            trust.maximum_version = ssl.TLSVersion.TLSv1_2
            trust.set_ciphers(ciphers)
        return trust.wrap_socket(plain, server_hostname=name)

    def connect(self, source: str = "127.0.0.1") -> http.client.HTTPConnection:
        """A connection for requests, closed with nginx."""
        connection = http.client.HTTPConnection(NAME, timeout=WAIT_S)
        connection.sock = self.socket(source)
        self._connections.append(connection)
        return connection

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        source: str = "127.0.0.1",
        **headers: str,
    ) -> Answer:
        """A whole answer, on a connection of its own."""
        connection = self.connect(source)
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection.request(method, path, data, given)
        return Answer(connection.getresponse())


class Answer:
    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.headers = response.headers
        self.text = response.read().decode()

    @property
    def json(self) -> Any:
        return json.loads(self.text)

    @property
    def comes_from_the_server(self) -> bool:
        return "OpenAI-Processing-Ms" in self.headers
