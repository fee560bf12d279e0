"""A process whose standard streams were closed before it started."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
import urllib.request

import psutil
import pytest

from tests.servers import ROOT, WAIT_S

PROGRAM = """
import os, sys
from transformers_api.server import standard_streams
standard_streams.open_missing()
for number, stream in enumerate((sys.stdin, sys.stdout, sys.stderr)):
    os.fstat(number)
    stream.read() if number == 0 else stream.write("a line") and stream.flush()
opened = os.open(os.devnull, os.O_RDONLY)
sys.exit(not (opened > 2 and os.get_inheritable(2)))
"""


@pytest.mark.parametrize("closing", ["2>&-", ">&-", "<&-", "<&- >&- 2>&-", ""])
def test_what_is_closed_becomes_the_null_device_and_no_other_file_takes_its_number(closing):
    line = f"exec {shlex.quote(sys.executable)} -c {shlex.quote(PROGRAM)} {closing}"
    done = subprocess.run(["sh", "-c", line], cwd=ROOT, timeout=WAIT_S, stdin=subprocess.DEVNULL)
    assert done.returncode == 0


@pytest.mark.parametrize("program", ["-m transformers_api serve", "-m gunicorn app:app"])
def test_a_server_without_standard_error_serves_and_ends_in_order(program):
    line = f"exec {shlex.quote(sys.executable)} {program} 2>&-"
    settings = {"HOST": "127.0.0.1", "PORT": "0", "PRELOAD_MODEL": "false"}
    assignments = [f"{name}={value}" for name, value in settings.items()]
    process = subprocess.Popen(["env", *assignments, "sh", "-c", line], cwd=ROOT)
    try:
        assert health(process) == b'{"status":"ok"}'
        process.terminate()
        assert process.wait(WAIT_S) == 0
    finally:
        process.kill()
        process.wait()


def port_of(process: subprocess.Popen[bytes]) -> int:
    """The port that it has chosen, which it can tell nobody. Raises OSError before it listens."""
    try:
        opened = psutil.Process(process.pid).net_connections("tcp")
    except psutil.Error as error:
        raise OSError(str(error)) from error
    for connection in opened:
        if connection.status == psutil.CONN_LISTEN:
            return int(connection.laddr.port)
    raise OSError("it does not listen")


def health(process: subprocess.Popen[bytes]) -> bytes:
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            url = f"http://127.0.0.1:{port_of(process)}/healthz"
            with urllib.request.urlopen(url, timeout=WAIT_S) as answer:
                return answer.read()
        except OSError:
            assert process.poll() is None, "it has ended"
            assert time.monotonic() < deadline
            time.sleep(0.05)  # polling, with a deadline
