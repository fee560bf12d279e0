"""The KV cache stays where it is: a step writes new keys and values into it, and reads it there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.engine.models import prompts_of
from tests.engine.reading import GREEDY, ask, complete
from transformers_api.kernels.abi import OPS, Attention, CacheWrite, Step

KERNELS = {"attention": Attention, "write_cache": CacheWrite}
NAMES = ["llama", "gpt2"]


def place_of(value):
    """Where a tensor's memory begins; packed weights do not tell."""
    is_tensor = isinstance(value, torch.Tensor) and not value.is_mkldnn
    return value.untyped_storage().data_ptr() if is_tensor else None


class Watch(TorchDispatchMode):
    """Notes the bytes of new tensors, and of what is written into given ones."""

    def __init__(self, tensors):
        super().__init__()
        self.known = {place_of(t) for t in tensors}
        self.made, self.written = [0], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {place_of(value) for value in args}
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor) and place_of(tensor) not in given:
                self.made.append(tensor.numel() * tensor.element_size())
        if func._schema.is_mutable and place_of(args[0]) in self.known:
            source = args[2] if "index_put" in str(func) else args[1]
            self.written.append(source.numel() * source.element_size())
        return out


def tensors_of(runner):
    return [rows for layer in runner.cache.slots for rows in layer.rows]


def token_bytes(tensor, batch):
    """What the batch's new tokens take in a tensor of the cache."""
    size = tensor.shape[1] * tensor.shape[3] * tensor.element_size()
    return batch.tokens * size


def watched(runner, each_step):
    """From now on ``each_step(batch, forward)`` does every forward; the cache has room by then."""
    forward = runner.forward

    def watch(batch, keep=1):
        return each_step(batch, lambda: forward(batch, keep))

    runner.forward = watch


def run(engine):
    """Prompts of many lengths, in chunks and together, none of which makes the cache grow."""
    asked = [ask(p, max_tokens=30, **GREEDY) for p in prompts_of(4)]
    complete(engine, *asked)
    return asked


@pytest.mark.parametrize("path", ["torch", "native"])
@pytest.mark.parametrize("name", NAMES)
def test_no_step_allocates_or_moves_a_cache_or_writes_more_than_its_tokens(
    make_engine, native_cache, name, path
):
    engine = make_engine(name, native=native_cache if path == "native" else None)
    runner, seen = engine.runner, []
    asked = run(engine)

    def step(batch, forward):
        before = tensors_of(runner)
        places = [t.data_ptr() for t in before]
        with Watch(before) as watch:
            result = forward()
        after = tensors_of(runner)
        seen.append(
            (
                [t.data_ptr() for t in after] == places,
                max(watch.made) < min(t.nbytes for t in before),
                all(n <= token_bytes(before[0], batch) for n in watch.written),
            )
        )
        return result

    watched(runner, step)
    complete(engine, *asked)
    assert len(seen) > 30
    assert set(seen) == {(True, True, True)}


@pytest.mark.parametrize("path", ["torch", "native"])
def test_a_step_changes_nothing_in_the_cache_but_its_own_tokens(make_engine, native_cache, path):
    engine = make_engine("llama", native=native_cache if path == "native" else None)
    runner, changed = engine.runner, []
    asked = run(engine)

    def step(batch, forward):
        before = [t.clone() for t in tensors_of(runner)]
        starts = [seq.num_cached for seq in batch.sequences]
        result = forward()
        for old, new in zip(before, tensors_of(runner), strict=True):
            for seq, start, width in zip(batch.sequences, starts, batch.widths, strict=True):
                tokens = seq.slot, slice(None), slice(start, start + width)
                old[tokens] = new[tokens]
            changed.append(not torch.equal(old, new))
        return result

    watched(runner, step)
    complete(engine, *asked)
    assert changed
    assert not any(changed)


@contextmanager
def recorded_steps(runner, monkeypatch) -> Iterator[list[Step]]:
    """The steps that a recorded pass hands to the kernels."""
    steps: list[Step] = []
    library = runner.cache.library
    honest = library.without_gil.run_steps

    def spy(address, count):
        steps.extend((Step * count).from_address(address))
        honest(address, count)

    with monkeypatch.context() as patch:
        patch.setattr(library.without_gil, "run_steps", spy)
        yield steps


@pytest.mark.parametrize("name", NAMES)
def test_recorded_steps_read_and_write_the_cache_where_it_lies(
    make_engine, native_cache, monkeypatch, name
):
    engine = make_engine(name, native=native_cache)
    runner, count = engine.runner, 0
    asked = run(engine)

    def step(batch, forward):
        nonlocal count
        with recorded_steps(runner, monkeypatch) as steps:
            result = forward()
            places = [t.untyped_storage() for t in tensors_of(runner)]
            ranges = [(p.data_ptr(), p.data_ptr() + p.nbytes()) for p in places]
            for each in steps:
                kind = KERNELS.get(OPS[each.op])
                if kind is not None:
                    call = kind.from_address(each.call)
                    used = [call.target] if kind is CacheWrite else [call.k, call.v]
                    assert all(any(a <= place < b for a, b in ranges) for place in used)
                    count += len(used)
                others = [each.out.data, *(o.data for o in each.inputs[: each.operands])]
                assert not any(a <= (p or 0) < b for p in others for a, b in ranges)
        return result

    watched(runner, step)
    complete(engine, *asked)
    assert count >= 4 * 30 * len(runner.cache.slots)
