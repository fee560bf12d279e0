"""A load ends: given up between two tensors, or seen from outside where it does not come to one."""

from __future__ import annotations

import pytest
import torch

from tests.engine.models import tiny_model
from transformers_api.engine.load_deadline import LoadDeadline
from transformers_api.engine.load_options import LoadOptions
from transformers_api.engine.loader import load_engine
from transformers_api.engine.pretrained import load_model
from transformers_api.errors import ModelLoadFailed
from transformers_api.server.readiness import Readiness


class Clock:
    """Goes on by one second with each look."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(path)
    return path


@pytest.mark.parametrize("limit_s", [0, 5, 20, 40])
def test_a_load_is_given_up_between_two_tensors_wherever_its_time_is_over(
    folder, engine_thread, limit_s
):
    deadline = LoadDeadline(limit_s, Clock())

    def load():
        with deadline.running(), deadline.between_tensors():
            return load_model(folder, "cpu", "float32", False)

    with pytest.raises(ModelLoadFailed, match=rf"not loaded within {limit_s} s \(MODEL_WAIT_S\)"):
        engine_thread.call(load).result()
    assert engine_thread.is_alive
    assert deadline.overrun_s == 0, "nothing is loaded any more"


def test_a_load_within_its_time_notices_nothing(folder, engine_thread):
    deadline = LoadDeadline(60)

    def load():
        with deadline.running(), deadline.between_tensors():
            return load_engine(folder, LoadOptions(), engine_thread)

    engine_thread.call(load).result().close()
    torch.nn.Linear(1, 1)  # nobody looks any more


def test_a_load_that_cannot_be_given_up_is_a_fault_of_the_process():
    clock = [0.0]
    deadline = LoadDeadline(10, lambda: clock[0])
    readiness = Readiness(None, None, 300, [deadline])
    with deadline.running():
        clock[0] = 309.0
        assert readiness.fault() is None
        clock[0] = 311.0
        assert "load cannot be given up, 300 s after its end" in readiness.fault()
    assert readiness.fault() is None
    with deadline.running():
        clock[0] = 10_000.0
        assert Readiness(None, None, None, [deadline]).fault() is None
