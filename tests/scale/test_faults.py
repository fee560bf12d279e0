"""What is killed under a cluster, or replaced, and who notices."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests import tokenizers
from tests.api.tiny_app import save
from tests.scale.conftest import (
    CONTEXT,
    CONTROLLER,
    ENDLESS,
    REPLICA,
    ROOT,
    Cluster,
    Front,
    Load,
    replace_fronts,
    wait_for,
)

MOST_S = 5.0  # that new requests wait


def test_a_killed_replica_ends_its_own_streams_alone(cluster, front, measured):
    for model in ("one", "two"):
        front.chat(model)
    pid = pid_of("one", front)
    lengths = {"one": ENDLESS, "two": 4000}
    streams = {m: [front.stream(m, tokens) for _ in range(8)] for m, tokens in lengths.items()}
    wait_for(lambda: all(s.has_begun() for own in streams.values() for s in own))
    os.kill(pid, signal.SIGKILL)
    killed, back_s = time.monotonic(), list[float]()

    def look():
        wait_for(lambda: sum(each["pid"] != pid for each in front.replicas()) == 2)
        back_s.append(time.monotonic() - killed)

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    news = [front.chat(model, tokens=2) for _ in range(10) for model in ("one", "two")]
    assert all(isinstance(answer, dict) for answer in news), news
    answered_s = time.monotonic() - killed
    assert Counter(stream.end() for stream in streams["one"]) == {"replica_failed": 8}
    assert Counter(stream.end() for stream in streams["two"]) == {"done": 8}
    looking.join(200)
    assert back_s, "it was not replaced"
    measured(f"20 new requests in {answered_s:.1f} s; a replica is back in {back_s[0]:.1f} s")
    assert back_s[0] < 30


def pid_of(model: str, front: Front) -> int:
    """The replica that has this model, once both others have one of two."""
    pids: dict[str, int] = {}

    def are_shown() -> bool:
        pids.clear()
        pids.update({each["model"]: each["pid"] for each in front.replicas()})
        return pids.keys() == {"one", "two"}

    wait_for(are_shown)
    return pids[model]


def test_nobody_notices_that_the_controller_is_killed(cluster, front, measured):
    streams = [front.stream("one", 4000) for _ in range(4)]
    wait_for(lambda: all(stream.has_begun() for stream in streams))
    (pid,) = cluster.pids(CONTROLLER)
    os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    assert isinstance(front.chat("one"), dict)
    measured(f"a new request {time.monotonic() - began:.2f} s after the controller was killed")
    assert [stream.end() for stream in streams] == ["done"] * 4
    wait_for(lambda: cluster.pids(CONTROLLER) not in ([], [pid]))


def test_a_killed_front_costs_its_own_connections_only(cluster, front):
    other: Front = cluster.fronts[1]
    wait_for(other.ready)
    streams = [front.stream("one", 4000) for _ in range(4)]
    own = other.stream("one", ENDLESS)
    wait_for(lambda: all(stream.has_begun() for stream in (*streams, own)))
    assert other.process is not None
    workers = subprocess.run(
        ["ps", "--ppid", str(other.process.pid), "-o", "pid="], capture_output=True, text=True
    )
    (worker,) = map(int, workers.stdout.split())
    os.kill(worker, signal.SIGKILL)
    assert own.end().startswith("cut")
    assert [stream.end() for stream in streams] == ["done"] * 4
    wait_for(other.ready)
    assert isinstance(other.chat("one"), dict)


def test_a_front_that_ends_loses_no_stream(cluster, front):
    other = cluster.fronts[1]
    streams = [other.stream(model, 1500) for model in ("one", "hot") * 3]
    wait_for(lambda: all(stream.has_begun() for stream in streams))
    other.stop()
    assert [stream.end() for stream in streams] == ["done"] * 6
    other.start()
    wait_for(other.ready)


def test_a_killed_redis_costs_nothing_but_what_it_shares(cluster, front, measured):
    streams = [each.stream("one", 2000) for each in cluster.fronts]
    wait_for(lambda: all(stream.has_begun() for stream in streams))
    cluster.redis.kill()
    began = time.monotonic()
    answers = [each.chat("hot", tokens=2) for each in cluster.fronts * 3]
    took_s = time.monotonic() - began
    measured(f"6 new requests on both fronts {took_s:.2f} s after redis was killed")
    assert all(isinstance(answer, dict) for answer in answers), answers
    assert took_s < MOST_S
    cluster.redis.start()
    assert [stream.end() for stream in streams] == ["done"] * 2
    assert isinstance(front.chat("hot"), dict)


def test_a_replica_that_hangs_hides_no_other_and_gets_no_new_requests(cluster, front, measured):
    for model in ("one", "two"):
        front.chat(model)
    hung = pid_of("one", front)
    os.kill(hung, signal.SIGSTOP)
    try:
        shown: list[dict[str, Any]] = []

        def is_shown() -> bool:
            shown[:] = front.all_replicas()
            return [each["pid"] for each in shown if not each["ready"]] == [hung]

        seen_s = wait_for(is_shown)
        assert len(shown) == 3
        began = time.monotonic()
        assert isinstance(front.chat("two"), dict)
        assert isinstance(front.chat("one"), dict)
        took_s = time.monotonic() - began
        measured(f"shown as hung after {seen_s:.1f} s; two new requests in {took_s:.1f} s then")
        assert took_s < MOST_S
    finally:
        with suppress(ProcessLookupError):  # Serve may have ended it
            os.kill(hung, signal.SIGKILL)


def test_code_weights_and_replicas_are_replaced_under_load_without_a_failure(
    cluster, front, measured
):
    """By a copy of the package and a new entry; a second machine has joined meanwhile."""
    with joined(cluster) as machine:
        replace_all(cluster, front, measured)
        lose(machine, cluster, front, measured)


def replace_all(cluster: Cluster, front: Front, measured: Callable[[str], None]) -> None:
    before = set(cluster.pids("ray::ServeReplica"))
    shutil.copytree(ROOT / "transformers_api", cluster.folder / "next/transformers_api")
    greedy = {"temperature": 0, "ignore_eos": True, "tokens": 12}
    old = text_of(front.chat("two", **greedy))
    with Load(front, "one", "two") as load:
        began = time.monotonic()
        give_other_weights(cluster, "two")
        up = cluster.command("up", "--replicas", "2", code=cluster.folder / "next")
        assert up.returncode == 0, up.stderr[-2000:]
        wait_for(lambda: not before & set(cluster.pids("ray::ServeReplica")))
        measured(f"all replicas replaced in {time.monotonic() - began:.0f} s under load")
        replace_fronts(cluster, load)
        texts = {text_of(each.chat("two", **greedy)) for each in cluster.fronts * 2}
        answers = load.end()
    assert Counter(answers) == {"done": len(answers)}
    measured(f"and then both fronts, of other weights: {len(answers)} requests in all, 0 failed")
    assert len(texts) == 1
    assert old not in texts
    for pid in cluster.pids(REPLICA):
        assert f"PYTHONPATH={cluster.folder}/next" in Path(f"/proc/{pid}/environ").read_text()


def text_of(answer: dict[str, Any]) -> str:
    return str(answer["choices"][0]["message"]["content"])


def give_other_weights(cluster: Cluster, model: str) -> None:
    """Put another folder in the place of the model's in the registry."""
    file = cluster.folder / "models.json"
    entries = json.loads(file.read_text())
    entry = next(each for each in entries if each["name"] == model)
    entry["path"] += "-next"
    sizes = {"num_hidden_layers": 1, "max_position_embeddings": CONTEXT}
    save(Path(entry["path"]), tokenizers.byte_level(), **sizes)
    file.write_text(json.dumps(entries))


JOIN = """
import signal, sys
from ray._private.node import Node
from ray._private.parameter import RayParams

parameters = RayParams(
    gcs_address=sys.argv[1],
    node_ip_address="127.0.0.1",
    num_cpus=2,
    include_log_monitor=False,
    min_worker_port=0,
    max_worker_port=0,
)
Node(parameters, head=False, shutdown_at_exit=False, spawn_reaper=False)
signal.pause()
"""


@contextmanager
def joined(cluster: Cluster) -> Iterator[subprocess.Popen[bytes]]:
    """Another machine of the cluster: a second node of Ray; `ray start` would want a second address."""
    mode = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(cluster.folder / "c/token"),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }
    node = subprocess.Popen(
        [sys.executable, "-c", JOIN, cluster.environment["CLUSTER_ADDRESS"]],
        env=cluster.environment | mode,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_for(lambda: "machines: 2" in cluster.command("status").stdout)
        yield node
    finally:
        if node.poll() is None:
            os.killpg(node.pid, signal.SIGKILL)
            node.wait()


def lose(
    node: subprocess.Popen[bytes], cluster: Cluster, front: Front, measured: Callable[[str], None]
) -> None:
    """Kill all of a machine at once; the replicas that were on it come back on others."""
    for model in ("one", "two"):
        front.chat(model)
    gone = {pid for pid in cluster.pids("ray::ServeReplica") if os.getsid(pid) == node.pid}
    assert gone, "no replica was placed on the second machine"
    places: dict[str, bool] = {}

    def are_loaded() -> bool:
        places.clear()
        places.update({each["model"]: each["pid"] in gone for each in front.replicas()})
        return places.keys() == {"one", "two"}

    wait_for(are_loaded)
    streams = {
        model: front.stream(model, ENDLESS if places[model] else 4000) for model in ("one", "two")
    }

    def are_running() -> bool:  # the status is up to a second old
        places.update({r["model"]: r["pid"] in gone for r in front.replicas() if r["running"]})
        return all(each.has_begun() for each in streams.values())

    wait_for(are_running)
    os.killpg(node.pid, signal.SIGKILL)
    lost = time.monotonic()
    node.wait()
    for model, stream in streams.items():
        assert stream.end() == ("replica_failed" if places[model] else "done")
    assert all(isinstance(front.chat(model), dict) for model in ("one", "two", "hot"))
    measured(
        f"{len(gone)} of 3 replicas lost with a machine: all models again after "
        f"{time.monotonic() - lost:.0f} s"
    )
    wait_for(lambda: len({each["pid"] for each in front.replicas()} - gone) == 2)
