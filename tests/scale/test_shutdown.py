"""The end of the cluster, after all other tests: nothing of it is left.

They are new ones: the test before has ended the other.
"""

from __future__ import annotations

import os
import signal

from tests.scale.conftest import Cluster, wait_for


def test_down_leaves_nothing_behind(cluster):
    """The last one: the cluster is gone afterwards."""
    up = cluster.command("up", "--replicas", "1")
    assert up.returncode == 0, up.stderr[-2000:]
    wait_for(cluster.fronts[0].ready, 60)
    assert cluster.command("down").returncode == 0
    wait_for(lambda: not cluster.pids("ray::"))
    assert cluster.command("status").returncode == 1
    wait_for(lambda: not cluster.fronts[0].ready())
    answer = cluster.fronts[0].chat()
    assert answer[0] == 503


def test_the_rest_of_a_killed_head_is_ended_by_up_and_by_down(cluster):
    assert cluster.command("up", "--replicas", "1").returncode == 0
    left = kill_head(cluster)
    up = cluster.command("up", "--replicas", "1")
    assert up.returncode == 0, up.stderr[-2000:]
    assert not left & set(cluster.pids("ray::"))
    kill_head(cluster)
    assert cluster.command("down").returncode == 0
    assert cluster.pids("ray::") == []
    assert cluster.command("down").returncode == 1


def kill_head(cluster: Cluster) -> set[int]:
    """Its processes, some of which outlive it."""
    own = {*cluster.pids("ray::DashboardAgent"), *cluster.pids("ray::RuntimeEnvAgent")}
    assert own
    os.kill(int((cluster.folder / "c/head.pid").read_text().split()[0]), signal.SIGKILL)
    return own
