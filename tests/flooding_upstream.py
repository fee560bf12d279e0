"""Upstreams in a process of their own: one that sends as fast as it is read, one with a slow pulse.

``python -m tests.flooding_upstream`` prints its port. The prompt says what comes: ``pulse``, or a
kind of flood.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.scripted_upstream import Handler, ScriptedUpstream, chunk

ROOT = Path(__file__).parents[1]
PULSE_S = 0.02
PULSES = 50
END = [chunk({}, "stop"), "[DONE]"]
FLOODS = {
    "nothing": b"data: " + json.dumps(chunk({"content": ""})).encode() + b"\n\n",
    "lines": b"\n",
}


def script(handler: Handler) -> None:
    """Answer as the last message says."""
    kind = handler.body["messages"][-1]["content"]
    if isinstance(kind, list):
        kind = kind[0]["text"]
    handler.head()
    try:
        if kind == "pulse":
            pulse(handler)
        else:
            piece = FLOODS[kind] * (65536 // len(FLOODS[kind]))
            while True:
                handler.wfile.write(piece)
    except OSError:
        return


def pulse(handler: Handler) -> None:
    due = time.monotonic()
    for _ in range(PULSES):
        handler.event(chunk({"content": f"{time.time():.6f} "}))
        due += PULSE_S
        time.sleep(max(due - time.monotonic(), 0))
    for payload in END:
        handler.event(payload)


@contextmanager
def upstream_process() -> Iterator[str]:
    """The URL of an upstream."""
    command = [sys.executable, "-m", "tests.flooding_upstream"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
    finally:
        process.kill()
        process.communicate()


if __name__ == "__main__":
    server = ScriptedUpstream(script)
    sys.stdout.write(f"{server.server_port}\n")
    sys.stdout.flush()
    server.serve_forever()
