"""The end of the cluster, after all other tests: nothing of it is left.

They are new ones: the test before has ended the other.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from tests.scale.conftest import ROOT, Cluster, Load, free_ports, replace_fronts, wait_for

OTHER_RAY = ROOT / "build/other-ray/bin/python"
SECOND_ADDRESS = {"CLUSTER_ADDRESS": f"127.0.0.1:{free_ports(3)}"}


def test_a_cluster_of_another_version_of_ray_takes_over_under_load(cluster, measured):
    """A second head beside the first one; fronts move one by one; then the first one ends."""
    first, second = cluster, beside(cluster)
    up(first)
    for front in first.fronts:
        wait_for(front.ready)
    try:
        with Load(first.fronts[0], "one") as load:
            began = time.monotonic()
            up(second)
            replace_fronts(second, load)
            head = head_of(first)
            done = first.command("down")
            took_s = time.monotonic() - began
            assert done.returncode == 0, done.stderr[-2000:]
            assert in_session(head) == []
            count = len(load.answers)
            wait_for(lambda: len(load.answers) > count + 4)
            answers = load.end()
        assert Counter(answers) == {"done": len(answers)}
        assert second.pids(str(Path(second.python).parents[1]))  # Ray's own programs lie there
        measured(
            f"from Ray {ray_of(first)} to Ray {ray_of(second)} in {took_s:.0f} s: "
            f"{len(answers)} requests, 0 failed"
        )
    finally:
        ended = second.command("down")
    assert ended.returncode == 0, ended.stderr[-2000:]


def test_down_leaves_nothing_behind(cluster):
    second = beside(cluster)
    for each in (cluster, second):
        assert each.command("status").returncode == 1
        assert each.pids("ray::") == []
    front = cluster.fronts[0]
    wait_for(lambda: not front.ready())
    assert front.chat()[0] == 503


def beside(cluster: Cluster) -> Cluster:
    """The one that takes over, of another version of Ray where `make test-scale` has one."""
    environment = cluster.environment | SECOND_ADDRESS
    environment["CLUSTER_FOLDER"] = str(cluster.folder / "2")
    python = str(OTHER_RAY) if OTHER_RAY.exists() else sys.executable
    return Cluster(environment, cluster.folder, cluster.redis, cluster.fronts, python)


def up(cluster: Cluster) -> None:
    """One replica, and none for "hot": two clusters have to fit into the memory of one."""
    file = cluster.folder / "one.json"
    file.write_text(json.dumps([{"name": "one", "path": str(cluster.folder / "one")}]))
    cluster.environment["MODEL_REGISTRY_PATH"] = str(file)
    done = cluster.command("up", "--replicas", "1")
    assert done.returncode == 0, done.stderr[-2000:]


def ray_of(cluster: Cluster) -> str:
    code = "from importlib.metadata import version; print(version('ray'))"
    return subprocess.check_output([cluster.python, "-c", code], text=True).strip()


def test_the_rest_of_a_killed_head_is_ended_by_up_and_by_down(cluster):
    assert cluster.command("up", "--replicas", "1").returncode == 0
    first = kill_head(cluster)
    up = cluster.command("up", "--replicas", "1")
    assert up.returncode == 0, up.stderr[-2000:]
    assert in_session(first) == []
    second = kill_head(cluster)
    assert cluster.command("down").returncode == 0
    assert in_session(second) == []
    assert cluster.pids("ray::") == []
    assert cluster.command("down").returncode == 1


def head_of(cluster: Cluster) -> int:
    return int((Path(cluster.environment["CLUSTER_FOLDER"]) / "head.pid").read_text().split()[0])


def kill_head(cluster: Cluster) -> int:
    """It is outlived by some of its processes."""
    head = head_of(cluster)
    os.kill(head, signal.SIGKILL)
    assert in_session(head)
    return head


def in_session(head: int) -> list[str]:
    """The running processes that a head has started, by their titles."""
    listed = subprocess.run(
        ["ps", "-s", str(head), "-o", "stat=,args="], capture_output=True, text=True
    )
    return [line for line in listed.stdout.splitlines() if not line.startswith("Z")]
