"""The head's own process (Ray's GCS) killed: first while replicas live, then with its machine.

The cluster is gone afterwards.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from tests.scale.conftest import ENDLESS, Front, wait_for

MOST_S = 5.0
RESTART_S = 20.0  # of a front; who comes meanwhile waits for it


def test_without_a_head_replicas_go_on_and_nobody_waits_for_long(cluster, front, measured):
    (gcs,) = (pid for pid in cluster.pids("") if is_gcs(pid))
    keeper = int((cluster.folder / "c/head.pid").read_text().split()[0])
    streams = [front.stream(model, 1000) for model in ("one", "two") * 2]
    wait_for(lambda: all(stream.has_begun() for stream in streams))
    os.kill(keeper, signal.SIGSTOP)  # it would end all of its machine; those on others live on
    try:
        os.kill(gcs, signal.SIGKILL)
        measured(f"readiness is gone after {wait_for(lambda: not front.ready()):.1f} s")
        answers = [asked(front, model) for model in ("one", "two", "hot") * 2]
        assert [answer for _, answer in answers if not isinstance(answer, dict)] == []
        measured(f"replicas that live answer in {max(took for took, _ in answers):.1f} s")
        assert [stream.end() for stream in streams] == ["done"] * 4
        cut = front.stream("one", ENDLESS)
        wait_for(cut.has_begun)
    finally:
        os.kill(keeper, signal.SIGCONT)
    assert cut.end() == "replica_failed"
    answers = []
    until = time.monotonic() + 9  # a front with nobody left starts again after five
    while time.monotonic() < until:
        answers.append(asked(front, "one"))
    refusals = [(answer[0], 1 <= int(answer[2]) <= 120) for _, answer in answers]
    assert set(refusals) == {(503, True)}
    *others, longest = sorted(took for took, _ in answers)
    most = max(others, default=0)
    measured(f"then {len(answers)} refusals in {most:.1f} s, {longest:.1f} s at its start")
    assert most < MOST_S
    assert longest < RESTART_S


def asked(front: Front, model: str) -> tuple[float, Any]:
    began = time.monotonic()
    answer = front.chat(model, tokens=2)
    time.sleep(0.1)  # not a flood
    return time.monotonic() - began, answer


def is_gcs(pid: int) -> bool:
    return b"gcs_server" in Path(f"/proc/{pid}/cmdline").read_bytes()
