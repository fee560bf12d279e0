"""The end of the cluster, after all other tests: nothing of it is left.

It is a new one: the test before has ended the other.
"""

from __future__ import annotations

from tests.scale.conftest import wait_for


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
