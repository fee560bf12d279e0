"""Loads that are taken back before the model is read: their downloads end, answers have it all the same."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import FakeLoader
from tests.model_folders import model_files
from tests.serving.test_hub_behaviour import hub, make_store  # noqa: F401 - fixtures
from tests.serving.test_swapper import WAIT_S, Bench, bench, queued, until  # noqa: F401
from transformers_api.errors import ModelNotFound, ModelUnloaded
from transformers_api.serving.models.spec import HubSource, ModelFiles, ModelSpec


class Download(FakeLoader):
    """Its preparations go on until their progress is refused, or ``release`` is set."""

    def __init__(self, build: Any) -> None:
        super().__init__(build)
        self.release, self.ended = threading.Event(), threading.Event()

    def prepare(self, spec: ModelSpec, progress: Callable[[float, str], None]) -> ModelFiles:
        self._stage("prepare", spec)
        try:
            while not self.release.wait(0.001):
                progress(0.5, "downloading")
        finally:
            self.ended.set()
        return ModelFiles(Path("nowhere"), 1000, 250, "float32", 1_700_000_000)


@pytest.fixture
def loader(bench: Bench) -> Download:  # noqa: F811
    bench.loader = Download(bench.loader.build)
    return bench.loader


def test_a_download_ends_and_nothing_is_left_of_it(bench: Bench, loader: Download) -> None:  # noqa: F811
    swapper = bench.swapper()
    assert swapper.load("a", wait=False)
    bench.reached("prepare")
    assert swapper.evict("a")
    assert loader.ended.wait(WAIT_S)
    status = swapper.status()
    assert (status.loading, status.model, status.waiting) == (None, None, {})
    assert (status.last_errors, status.swaps) == ({}, ())
    assert not swapper.evict("a")
    assert bench.ear.heard == []


def test_whoever_asks_after_that_begins_anew(bench: Bench, loader: Download) -> None:  # noqa: F811
    swapper = bench.swapper()
    swapper.load("a", wait=False)
    bench.reached("prepare")
    swapper.evict("a")
    loader.release.set()
    swapper.lease("a").release()
    assert swapper.status().model == "a"
    assert loader.count("prepare") == 2


def test_who_waits_for_the_load_is_told_and_who_waits_for_an_answer_has_it(
    bench: Bench,  # noqa: F811
    loader: Download,
) -> None:
    swapper = bench.swapper()
    load, lease = bench.start(swapper.load, "a"), bench.start(swapper.lease, "a")
    queued(swapper, a=2)
    assert swapper.evict("a")
    with pytest.raises(ModelUnloaded, match="The load of model 'a' was cancelled"):
        load.result(WAIT_S)
    assert not loader.ended.is_set()
    loader.release.set()
    lease.result(WAIT_S).release()
    assert swapper.status().model == "a"


def test_a_load_that_waits_for_its_turn_is_taken_back(bench: Bench) -> None:  # noqa: F811
    swapper = bench.swapper()
    with swapper.lease("a"):
        load = bench.start(swapper.load, "b")
        until(lambda: swapper.status().stage == "waiting" and swapper.status().waiting)
        bench.reached("check_memory", 2)
        assert swapper.evict("b")
        with pytest.raises(ModelUnloaded):
            load.result(WAIT_S)
    assert swapper.status().model == "a"
    assert bench.loader.count("load", "b") == 0


def test_one_that_is_being_read_is_not(bench: Bench) -> None:  # noqa: F811
    swapper = bench.swapper()
    held = bench.loader.hold["load"] = threading.Event()
    load = bench.start(swapper.load, "a")
    bench.reached("load")
    assert not swapper.evict("a")
    held.set()
    assert load.result(WAIT_S)
    with pytest.raises(ModelNotFound):
        swapper.evict("nonsense")


def test_the_library_of_the_hub_passes_a_refused_progress_on(hub, make_store) -> None:  # type: ignore[no-untyped-def]  # noqa: F811
    hub.repos["owner/model"] = model_files()

    def refuse(_share: float, text: str) -> None:
        if text == "downloading":
            raise ModelUnloaded("nobody wants it")

    spec = ModelSpec(name="m", source=HubSource("owner/model"))
    with pytest.raises(ModelUnloaded, match="nobody wants it"):
        make_store().prepare(spec, refuse)
    assert not make_store().is_cached(spec)
