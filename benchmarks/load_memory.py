"""Memory that loading a model takes at its peak, beside what is served of it, and how fast it is.

    python -m benchmarks.load_memory build/8b --quantization int8,int4
    python -m benchmarks.load_memory build/moe.gguf --quantization auto --again

"resident" is the most that the server had resident until it was ready, the pages of mapped files
included; "own" leaves these out, which the system takes back where it needs memory. The program
itself is in both. ``--again``: each is started a second time, with the packed weights of the first,
and then unloaded and asked once more. "core-s": processor time until it was ready.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks import servers
from benchmarks.load import HELLO, Server, ask
from benchmarks.machine import machine, today
from benchmarks.pages import table
from benchmarks.swap import wait_for_files

INTERVAL_S = 0.01
SIZES = ("served, MB", "resident, MB", "own, MB", "allowed, MB")
HEADS = [
    "weights",
    *SIZES,
    "core-s",
    "ready, s",
    "first token, s",
    "unloaded: first, s",
    "tokens/s",
]
MORE, SPARE = 1.1, 500_000_000  # of the weights that are served, and beside them, may be taken
LIMIT_S, TOKENS = 3600, 24
STORE_MB, WRITTEN_WITHIN_S = 20480, 300


def status(pid: int, name: str) -> int:
    """Bytes that the system states of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    return 0


def core_seconds(parent: int) -> float:
    """Processor time of the server's processes so far."""
    ticks = 0
    for pid in servers.family(parent):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def loaded_again(server: Server) -> float:
    """Seconds to the first token of a request that loads the model, which is unloaded first."""
    root = server.base_url.removesuffix("/v1")
    request = urllib.request.Request(f"{root}/models/{server.model}/unload", method="POST")
    with urllib.request.urlopen(request):
        return asyncio.run(ask(server, HELLO, 2)).first


@contextmanager
def watching(parent: int) -> Iterator[dict[str, int]]:
    """The peaks of the server's processes so far, of the one that has most."""
    peaks = {"VmHWM": 0, "RssAnon": 0}
    over = threading.Event()

    def watch() -> None:
        while not over.wait(INTERVAL_S):
            for pid in servers.family(parent):
                for name in peaks:
                    try:
                        peaks[name] = max(peaks[name], status(pid, name))
                    except OSError:
                        break

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peaks
    finally:
        over.set()
        watcher.join()


def one(path: Path, quantization: str, scratch: Path, store_mb: int, is_second: bool) -> list[str]:
    """A line of the table: the server is started, asked, and ended."""
    environment = {"QUANTIZATION": quantization, "PACKED_STORE_MB": str(store_mb)}
    contender = servers.ours(
        path, scratch, NATIVE_KERNELS="true", MODEL_WAIT_S=str(LIMIT_S), **environment
    )
    port = servers.free_port()
    address = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as log:
        began = time.perf_counter()
        process = servers.spawn(contender, log, port)
        try:
            with watching(process.pid) as peaks:
                servers.wait_until_ready(process, f"{address}/readyz", LIMIT_S)
                ready_s, loading = time.perf_counter() - began, dict(peaks)
                core_s = core_seconds(process.pid)
            server = Server(f"{address}/v1", contender.model, contender.fields)
            answer = asyncio.run(ask(server, HELLO, TOKENS))
            with urllib.request.urlopen(f"{address}/status") as response:
                resident = json.load(response)["resident"]
            again = f"{loaded_again(server):.1f}" if is_second else ""
            wait_for_files(scratch / "store" / "packed" if store_mb else None, 1, WRITTEN_WITHIN_S)
        except Exception:
            log.seek(0)
            sys.stderr.buffer.write(log.read()[-4000:])
            raise
        finally:
            servers.end(process)
    served = resident["bytes"]
    sizes = served, loading["VmHWM"], loading["RssAnon"], int(MORE * served) + SPARE
    return [
        resident["quantization"],
        *(f"{size / 1e6:,.0f}" for size in sizes),
        *(f"{each:.1f}" for each in (core_s, ready_s, ready_s + answer.first)),
        again,
        f"{1 / answer.per_token:.1f}" if answer.per_token else "",  # no text came before the last
    ]


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--quantization", default="auto", help="one or more, as int8,int4")
    parser.add_argument("--again", action="store_true", help="from packed weights, too")
    parser.add_argument("--scratch", type=Path, default=Path("build/load-memory"))
    options = parser.parse_args()
    servers.end_on_signals()
    scratch = options.scratch.absolute()
    lines = []
    for quantization in options.quantization.split(","):
        shutil.rmtree(scratch, ignore_errors=True)
        for turn in range(1 + options.again):
            store_mb = STORE_MB if options.again else 0
            lines.append(one(options.model.absolute(), quantization, scratch, store_mb, turn > 0))
            print(*lines[-1], flush=True)
    shutil.rmtree(scratch, ignore_errors=True)
    print(f"\n{table(HEADS, lines)}\n\n{today()}, {options.model.name}. {machine()}.")


if __name__ == "__main__":
    main()
