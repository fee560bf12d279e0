"""Matrices of files are packed beside other work, into the same bytes."""

import pytest
import torch

from transformers_api.kernels.modules import packing
from transformers_api.kernels.modules.blocks import Pieces
from transformers_api.kernels.modules.linear import PackedWeight
from transformers_api.kernels.modules.weight_memory import WeightMemory

SHAPES = [(70, 77), (32, 64), (5, 100), (129, 64)]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Source:
    """A matrix that knows whether it was released."""

    def __init__(self, matrix):
        self.matrix = matrix
        self.is_released = False

    def release(self):
        self.is_released = True

    def pieces(self):
        """As a file gives it."""
        numbers = self.matrix
        make = lambda first, count: numbers[first : first + count]  # noqa: E731
        return Pieces(numbers.shape, make, numbers)


def packed_later(library, sources, kind):
    memory = WeightMemory()
    with memory.packing_later(library) as finish:
        weights = []
        for source in sources:
            matrix = source.pieces()
            weights.append(PackedWeight(library, [matrix], kind, memory))
            memory.release(source, matrix)
        finish()
        assert all(source.is_released for source in sources)
    return weights


def sources_of(dtype):
    return [Source(random(*shape, seed=i).to(dtype)) for i, shape in enumerate(SHAPES)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
def test_what_is_packed_beside_other_work_has_the_same_bytes(library, kind, dtype):
    sources = sources_of(dtype)
    at_once = [PackedWeight(library, [each.matrix], kind, WeightMemory()) for each in sources]
    later = packed_later(library, sources, kind)
    for one, other in zip(at_once, later, strict=True):
        assert torch.equal(one.memory, other.memory)
        assert one.error == other.error


def test_matrices_one_below_the_other_are_packed_beside_other_work(library):
    parts = [Source(random(rows, 64, seed=rows)) for rows in (33, 5, 64)]
    memory = WeightMemory()
    with memory.packing_later(library):
        later = PackedWeight(library, [each.pieces() for each in parts], "bfloat16", memory)
    whole = torch.cat([each.matrix for each in parts])
    assert torch.equal(
        later.memory, PackedWeight(library, [whole], "bfloat16", WeightMemory()).memory
    )


def test_a_large_model_is_packed_as_it_goes(library, monkeypatch):
    monkeypatch.setattr(packing, "MOST_BYTES", 4 * 70 * 77)  # the first matrix
    sources = sources_of(torch.float32)
    memory = WeightMemory()
    with memory.packing_later(library):
        PackedWeight(library, [sources[0].pieces()], "float32", memory)
        second = PackedWeight(library, [sources[1].pieces()], "float32", memory)
        assert torch.equal(second.dense(), sources[1].matrix)


def test_what_goes_wrong_beside_is_told_to_whoever_waits(library):
    class Broken(Source):
        def release(self):
            raise OSError("the file is gone")

    with pytest.raises(OSError, match="the file is gone"):
        packed_later(library, [Broken(random(32, 64))], "bfloat16")


def test_after_waiting_all_is_packed_at_once(library):
    (source,) = sources_of(torch.float32)[:1]
    memory = WeightMemory()
    with memory.packing_later(library) as finish:
        finish()
        weight = PackedWeight(library, [source.pieces()], "float32", memory)
        assert torch.equal(weight.dense(), source.matrix)
        memory.release(source, source.pieces())
        assert source.is_released


def test_what_is_packed_at_once_is_released_at_once(library):
    source, memory = Source(random(32, 64)), WeightMemory()
    with memory.packing_later(library):
        PackedWeight(library, [source.matrix], "bfloat16", memory)
        memory.release(source, source.matrix)
        assert source.is_released
