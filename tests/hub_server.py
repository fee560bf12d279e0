"""A Hub on the loopback: as much of its protocol as huggingface_hub needs to download a model."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "1234567890abcdef1234567890abcdef12345678"


class HubServer:
    """Serves ``repos`` ({id: {file name: content}}) until closed; notes every request.

    ``breaks`` {file name: bytes}: the first GET of that file is cut off after so many bytes.
    ``failing``: files whose GET answers 500. ``damaged``: files whose content arrives with a flipped byte. ``gated``: ids that answer 403.
    ``private`` {id: token}: answers 401 to everybody else. ``silent``: ids whose requests get no answer before the end.
    """

    def __init__(self, repos: Mapping[str, Mapping[str, bytes]]) -> None:
        self.repos = {repo: dict(files) for repo, files in repos.items()}
        self.breaks: dict[str, int] = {}
        self.failing: set[str] = set()
        self.damaged: set[str] = set()
        self.gated: set[str] = set()
        self.private: dict[str, str] = {}
        self.silent: set[str] = set()
        self.closing = threading.Event()
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, Range
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.hub = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def fetched(self, name: str) -> list[str | None]:
        """The Range header of every GET of a file."""
        return [
            given
            for method, path, given in self.requests
            if method == "GET" and path.endswith(f"/{name}")
        ]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub: HubServer = self.server.hub  # type: ignore[attr-defined]
        path = unquote(urlsplit(self.path).path)
        hub.requests.append((self.command, path, self.headers.get("Range")))
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            repo, rest = "/".join(parts[2:4]), parts[4:]
        else:
            repo, rest = "/".join(parts[:2]), parts[2:]
        if repo in hub.silent:
            hub.closing.wait(30)
            self.close_connection = True
        elif self.headers.get("Authorization") != f"Bearer {hub.private.get(repo)}" and (
            repo in hub.private
        ):
            self._error(401, "RepoNotFound")
        elif repo not in hub.repos:
            self._error(404, "RepoNotFound")
        elif repo in hub.gated:
            self._error(403, "GatedRepo")
        elif len(rest) > 1 and rest[1] not in ("main", COMMIT):
            self._error(404, "RevisionNotFound")
        elif rest[:1] == ["resolve"]:
            self._file(hub, repo, "/".join(rest[2:]))
        elif rest[:1] == ["tree"]:
            self._json(
                [
                    {"type": "file", "path": name, "size": len(content), "oid": _git_id(content)}
                    | _large(name, content)
                    for name, content in hub.repos[repo].items()
                ]
            )
        else:
            self._json(
                {
                    "id": repo,
                    "sha": COMMIT,
                    "siblings": [
                        {"rfilename": name, "size": len(content)} | _large(name, content)
                        for name, content in hub.repos[repo].items()
                    ],
                }
            )

    def _file(self, hub: HubServer, repo: str, name: str) -> None:
        content = hub.repos[repo].get(name)
        if content is None:
            self._error(404, "EntryNotFound")
            return
        if name in hub.failing and self.command == "GET":
            self._error(500, "InternalError")
            return
        first = 0
        if given := self.headers.get("Range"):
            first = int(given.removeprefix("bytes=").split("-")[0])
        body = content[first:]
        if name in hub.damaged:
            body = body[:-1] + bytes([body[-1] ^ 1])
        etag = hashlib.sha256(content).hexdigest() if _large(name, content) else _git_id(content)
        self.send_response(206 if first else 200)
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if (cut := hub.breaks.pop(name, None)) is not None:
            body, self.close_connection = body[:cut], True
        with suppress(BrokenPipeError, ConnectionResetError):
            self.wfile.write(body)

    def _json(self, value: object) -> None:
        self._reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str) -> None:
        self._reply(status, b"", {"X-Error-Code": code, "X-Error-Message": code})

    def _reply(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def _git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _large(name: str, content: bytes) -> dict[str, object]:
    if not name.endswith((".safetensors", ".gguf", ".bin")):
        return {}
    digest = hashlib.sha256(content).hexdigest()
    large = {"sha256": digest, "oid": digest, "size": len(content), "pointerSize": 130}
    return {"lfs": large}
