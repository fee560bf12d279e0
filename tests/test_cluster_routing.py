"""Which replica a request is sent to, and how many there are of a model."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import signal
from collections.abc import Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import autoscaling, routing
from benchmarks.simulated_replica import SLOTS, Times
from transformers_api.cluster import applications, commands
from transformers_api.cluster import routing as routing_state
from transformers_api.cluster.front import SILENT, with_silent
from transformers_api.cluster.routing import ranks
from transformers_api.cluster.signals import own_handlers
from transformers_api.config.settings import SettingError, Settings
from transformers_api.serving.limits.admission import Admission
from transformers_api.serving.models.spec import ReplicaRange
from transformers_api.serving.swap.replica_status import ReplicaStatus
from transformers_api.serving.swap.residency import SwapperStatus

TIMES = Times(load=0.65, step=0.009, row=0.0015)


@dataclass(frozen=True)
class Box:
    name: str
    model: str | None
    work: int


def order(*boxes: Box, model: str = "a", spread: int = 4) -> list[str]:
    groups = ranks(
        boxes,
        spread,
        holds=lambda each: each.model == model,
        is_empty=lambda each: each.model is None,
        work=lambda each: each.work,
    )
    return ["".join(each.name for each in group) for group in groups]


def test_those_that_have_the_model_come_first_the_least_busy_before_all():
    assert order(Box("x", "b", 0), Box("y", "a", 3), Box("z", "a", 2)) == ["zy", "x"]


def test_an_empty_replica_comes_before_one_that_has_to_swap():
    assert order(Box("x", "b", 0), Box("y", None, 1), Box("z", "c", 5)) == ["y", "xz"]


def test_a_full_model_is_taken_by_one_that_has_nothing_to_do():
    assert order(Box("x", "a", 4), Box("y", "b", 0), Box("z", "c", 1)) == ["y", "x", "z"]
    assert order(Box("x", "a", 3), Box("y", "b", 0), Box("z", "c", 1)) == ["x", "yz"]


def test_where_all_have_work_a_full_model_takes_nobodys_place():
    assert order(Box("x", "a", 9), Box("y", "b", 1), Box("z", "c", 1)) == ["x", "yz"]


def test_no_replica_is_lost_or_asked_twice():
    boxes = [Box(str(n), "abc"[n % 3] if n % 4 else None, n % 5) for n in range(9)]
    assert sorted("".join(order(*boxes))) == [str(n) for n in range(9)]
    assert order() == []


def test_by_residency_is_better_than_by_hash_and_that_than_by_chance():
    load = routing.Load(models=40, skew=1.0, rate=4.0, seconds=120)
    late = {
        route: routing.simulate(route, SLOTS, 8, load, TIMES).late
        for route in ("random", "hash", "residency")
    }
    assert late["residency"] < late["hash"] < late["random"]


def test_a_model_for_several_replicas_gets_them():
    load = routing.Load(models=2, skew=2.0, rate=12.0, seconds=120)
    outcome = routing.simulate("residency", SLOTS, 4, load, TIMES)
    assert outcome.copies > 1.5
    assert outcome.late < 0.5


def test_replicas_of_one_model_come_in_time_and_go_again():
    firsts, minutes = autoscaling.simulate(
        autoscaling.Scaler(1, 8, SLOTS // 2, applications.UP_S), TIMES, 1.0, 15.0, 10.0
    )
    fixed, most = autoscaling.simulate(
        autoscaling.Scaler(8, 8, SLOTS // 2, applications.UP_S), TIMES, 1.0, 15.0, 10.0
    )
    assert sorted(firsts)[len(firsts) * 95 // 100] < 0.5
    assert len(firsts) == len(fixed)
    assert minutes < 0.6 * most


def test_serve_is_told_a_number_or_a_range():
    settings = Settings(max_inflight=16)
    assert applications.scale(settings, ReplicaRange(3, 3)) == {"num_replicas": 3}
    asked = applications.scale(settings, ReplicaRange(2, 5))["autoscaling_config"]
    assert (asked["min_replicas"], asked["max_replicas"]) == (2, 5)
    assert asked["target_ongoing_requests"] == 8


def test_the_shared_replicas_are_those_of_the_settings():
    assert applications.ranges(Settings(), 2) == ReplicaRange(2, 2)
    assert applications.ranges(Settings(cluster_max_replicas=6), 2) == ReplicaRange(2, 6)
    assert applications.ranges(Settings(cluster_max_replicas=2), 3) == ReplicaRange(3, 3)


def test_applications_of_models_have_names_that_files_may_have():
    names = [applications.app_of(model) for model in ("a/b", "a_b", "a b", "m" * 200, "ü")]
    assert len(set(names)) == 5
    assert all(name.isascii() and "/" not in name and " " not in name for name in names)
    assert all(name.partition(".")[0] == applications.APP for name in names)


def registry(folder: Path, **fields: object) -> Settings:
    base = {"name": "m", "path": "m"}
    adapter = {"name": "tuned", "adapter": "tuned", "base": "m"}
    file = folder / "models.json"
    file.write_text(json.dumps([{**base, **fields}, adapter, {"name": "n", "path": "n"}]))
    return Settings(model_registry_path=file, include_default_models=False, default_model="m")


@pytest.mark.parametrize(
    ("span", "expected"),
    [
        ({"min": 2, "max": 4}, ReplicaRange(2, 4)),
        ({"min": 2}, ReplicaRange(2, 2)),
        ({"max": 3}, ReplicaRange(1, 3)),
    ],
)
def test_an_entry_says_how_many_replicas_its_model_has(tmp_path, span, expected):
    """Its adapters are on them, too."""
    assert commands.models_with_replicas(registry(tmp_path, replicas=span)) == {"m": expected}


@pytest.mark.parametrize(
    "span",
    [{}, {"min": 0}, {"min": 3, "max": 2}, {"max": 5000}, {"min": 1.0}, {"most": 1}, 2, [1, 2]],
    ids=str,
)
def test_other_numbers_of_replicas_are_refused(tmp_path, span):
    with pytest.raises(SettingError, match=r"replicas .* is not allowed: expected an object"):
        commands.models_with_replicas(registry(tmp_path, replicas=span))


def test_encoders_and_upstreams_have_no_replicas_of_their_own(tmp_path):
    with pytest.raises(SettingError, match="not for encoders"):
        commands.models_with_replicas(registry(tmp_path, replicas={"min": 1}, embedding="encoder"))
    file = tmp_path / "far.json"
    file.write_text(
        json.dumps([{"name": "f", "upstream": "http://a:1/v1", "replicas": {"min": 1}}])
    )
    with pytest.raises(SettingError, match="replicas is the upstream's own"):
        commands.models_with_replicas(Settings(model_registry_path=file))


def status(name: str) -> ReplicaStatus:
    return ReplicaStatus(
        replica=name,
        node="n",
        pid=1,
        swapper=SwapperStatus(state="ready", model="m"),
        age_s=1.0,
        requests=2,
        ready=True,
        reason="ready",
        process_bytes=None,
        slots=16,
        queue=8,
    )


def told(replicas: object) -> list[tuple[str, bool, str]]:
    return [(each.replica, each.ready, each.reason) for each in replicas]  # type: ignore[attr-defined]


def test_a_hung_replica_is_shown_beside_the_others():
    before = [status("a"), status("b"), status("c")]
    now = with_silent(before, [status("c"), None, status("a")])
    assert told(now) == [("a", True, "ready"), ("b", False, SILENT), ("c", True, "ready")]
    assert told(with_silent(now, [None, status("a"), status("c")])) == told(now)
    assert told(with_silent(now, [status("a"), status("c")])) == [told(now)[0], told(now)[2]]
    assert told(with_silent([], [None])) == []


class Looked:
    """A transport whose replicas answer as they are listed here; None: one hangs, or all do."""

    def __init__(self) -> None:
        self.statuses: list[ReplicaStatus | None] | None = []
        self.answers: dict[str, object] = {}

    async def broadcast(self, method: str) -> list[ReplicaStatus | None]:
        assert method == "status"
        if self.statuses is None:
            raise TimeoutError
        return self.statuses

    def start(self, work: Coroutine[None, None, object]) -> Future[object]:
        future = Future[object]()
        future.set_result(asyncio.run(work))
        return future

    def note(self, in_flight: dict[str, int], silent: list[str]) -> None:
        routing_state.note(in_flight, silent)


def test_a_front_takes_what_its_replicas_take_and_asks_no_hung_one():
    from transformers_api.cluster.front import Watch

    transport, admission = Looked(), Admission(1, 0)
    models = SimpleNamespace(replicas=())
    watch = Watch(transport, models, models, None, admission, 100)  # type: ignore[arg-type]

    def look(*answers: ReplicaStatus | None) -> tuple[int, int]:
        transport.statuses = list(answers)
        watch.look()
        return admission.slots, admission.waiting

    a, b, c = map(status, "abc")
    assert look(a) == (16, 8)
    assert look(a, b, c) == (48, 24)
    assert (routing_state.silent, routing_state.requests) == (set(), dict.fromkeys("abc", 2))
    assert look(a, None, c) == (48, 24)  # Serve replaces it soon, or it answers again
    assert (routing_state.silent, routing_state.requests) == ({"b"}, dict.fromkeys("ac", 2))
    transport.statuses = None
    watch.look()
    assert (admission.slots, admission.waiting) == (48, 24)
    assert routing_state.silent == set("abc")
    assert [each.ready for each in models.replicas] == [False] * 3
    assert look(a, c) == (32, 16)
    assert (routing_state.silent, routing_state.requests) == (set(), dict.fromkeys("ac", 2))
    assert look(*map(status, "abcde")) == (80, 20)  # no more than it has threads for
    assert look() == (80, 20)  # until some are back


def test_handlers_of_signals_are_kept_while_a_library_sets_its_own():
    libc = ctypes.CDLL(None)
    before, calls = signal.getsignal(signal.SIGTERM), list[int]()
    signal.signal(signal.SIGTERM, lambda number, _: calls.append(number))
    try:
        with own_handlers():
            libc.signal(int(signal.SIGTERM), ctypes.c_void_p(1))  # as C does: it is ignored now
            os.kill(os.getpid(), signal.SIGTERM)
            assert calls == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert calls == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
