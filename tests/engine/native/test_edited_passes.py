"""Recorded passes that are changed where they stop: they act as hooks of the plain model do."""

from __future__ import annotations

import pytest
import torch

from tests.engine.edited import EDITED, every_change, expected, read
from tests.inspection.models import tiny
from tests.repeats import slow
from transformers_api.engine.llm_engine import BatchingEngine
from transformers_api.engine.native.backend import editing
from transformers_api.engine.native.runner import NativeRunner
from transformers_api.engine.runners.model_runner import innermost
from transformers_api.kernels.graph import planner, tiling

OTHERS = [0, 2]
MODELS = ["gpt2", "gemma2"]
MORE = [
    "llama",
    "qwen3",
    "mistral-window-8",
    "gpt-neox",
    "opt",
    "phi",
    "olmo2",
    "granite",
    "cohere2",
    "mixtral",
]


class Native:
    """The part of the backend that edits."""

    @staticmethod
    def editing(_model, edits):
        return editing(edits)


def served(make_engine, name: str, dtype: str = "float32") -> BatchingEngine:
    engine = make_engine(tiny(name), dtype=dtype, prefill_chunk=64)
    if not isinstance(innermost(engine.runner), NativeRunner):
        pytest.skip("without the kernels")
    return engine


@pytest.mark.parametrize("name", [*MODELS, *slow(*MORE)])
def test_an_edit_acts_as_hooks_do_and_neighbours_stay_equal_to_the_bit(make_engine, name):
    engine, model = served(make_engine, name), tiny(name)
    plain = read(engine, Native, {})
    for part, changes in every_change(model).items():
        for own, before, right in zip(
            read(engine, Native, changes), plain, expected(model, changes), strict=True
        ):
            assert torch.equal(own[OTHERS], before[OTHERS]), part
            assert (own[EDITED] - before[EDITED]).abs().max() > 1e-3, part
            torch.testing.assert_close(own[EDITED], right, atol=1e-5, rtol=0, msg=part)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_edit_that_changes_nothing_changes_no_bit(make_engine, dtype):
    engine, model = served(make_engine, "gemma2", dtype), tiny("gemma2")
    plain = read(engine, Native, {})
    every = {place: lambda x: x for changes in every_change(model).values() for place in changes}
    assert all(map(torch.equal, read(engine, Native, every), plain))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_pass_that_may_stop_everywhere_is_equal_to_one_that_may_not(
    make_engine, monkeypatch, dtype
):
    cut = read(served(make_engine, "gemma2", dtype), Native, {})
    real = planner.step_groups
    monkeypatch.setattr(planner, "step_groups", lambda pairs, sizes, _: real(pairs, sizes))
    monkeypatch.setattr(planner._Planner, "_group_of", first_group_behind)
    whole = read(served(make_engine, "gemma2", dtype), Native, {})
    assert all(map(torch.equal, cut, whole))


def test_no_group_of_fused_steps_goes_on_over_a_place(make_engine, monkeypatch):
    passes: list[tuple[set[int], set[int]]] = []
    real = tiling.step_groups

    def noted(pairs, sizes, cuts=()):
        groups = list(real(pairs, sizes, cuts))
        passes.append((set(cuts), {group.end for group in groups}))
        return groups

    monkeypatch.setattr(planner, "step_groups", noted)
    served(make_engine, "gemma2")
    layers, _head = passes
    assert len(layers[0]) > 3 * 5  # of three layers: resid, attn, mlp, head, neuron
    for cuts, ends in passes:
        assert cuts <= ends


def first_group_behind(self, call):
    return next(i for i, end in enumerate(self.ends) if end >= call.at)
