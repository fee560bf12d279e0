"""Low-rank products: each row gets what its own adapter adds, the same bits in any company."""

from __future__ import annotations

import ctypes

import pytest
import torch

from transformers_api.kernels.abi import TYPES, LowRank, LowRankPart
from transformers_api.kernels.modules.low_rank import LowRankPair
from transformers_api.kernels.modules.weight_memory import WeightMemory

KINDS = ["float32", "bfloat16"]
TOLERANCE = {"float32": 1e-6, "bfloat16": 1e-2}
INPUTS, OUTPUTS = 70, 150
PARTS = [  # adapter, rank, first output, outputs
    *((0, 4, 0, 64), (0, 9, 100, 50)),
    (1, 1, 30, 17),
    *((2, 40, 0, 150),),
]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Layer:
    """A table of parts, and the same as float64 matrices (out, in) of each adapter."""

    def __init__(self, library, kind, parts=PARTS, adapters=3):
        self.library = library
        memory = WeightMemory()
        self.dense = torch.zeros(adapters, OUTPUTS, INPUTS, dtype=torch.float64)
        self.pairs, made = [], []
        for seed, (adapter, rank, first, count) in enumerate(parts):
            down, up = random(rank, INPUTS, seed=seed), random(count, rank, seed=seed + 50)
            self.dense[adapter, first : first + count] += up.double() @ down.double()
            pair = LowRankPair(library, down, up, kind, memory)
            self.pairs.append(pair)
            made.append(LowRankPart(pair.down.address, pair.up.address, adapter, first))
        self.parts = (LowRankPart * len(made))(*made)
        self.table = LowRank(len(made), ctypes.addressof(self.parts), OUTPUTS, adapters)

    def add(self, x, adapters, y):
        y = y.clone()
        self.library.without_gil.low_rank(
            *(ctypes.addressof(self.table), x.data_ptr(), adapters.data_ptr()),
            *(len(x), y.data_ptr(), TYPES[y.dtype]),
        )
        return y

    def expected(self, x, adapters, y):
        y = y.double()
        for row, adapter in enumerate(adapters.tolist()):
            if 0 <= adapter < len(self.dense):
                y[row] += self.dense[adapter] @ x[row].double()
        return y


def numbers(rows, seed=0):
    return torch.randint(-1, 3, (rows,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_each_row_gets_what_its_adapter_adds(library, kind, dtype):
    layer = Layer(library, kind)
    for rows in (1, 2, 9, 40, 130):
        x, y, adapters = random(rows, INPUTS, seed=3), random(rows, OUTPUTS, seed=4), numbers(rows)
        x, y = x.to(dtype), y.to(dtype)
        made, expected = layer.add(x, adapters, y), layer.expected(x, adapters, y)
        tolerance = TOLERANCE["bfloat16" if dtype == torch.bfloat16 else kind]
        assert (made - expected).norm() <= tolerance * expected.norm(), rows


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_same_bits_alone_and_in_company(library, kind):
    layer = Layer(library, kind)
    x, y, adapters = random(90, INPUTS, seed=3), random(90, OUTPUTS, seed=4), numbers(90)
    together = layer.add(x, adapters, y)
    for row in range(0, 90, 11):
        alone = layer.add(x[row : row + 1], adapters[row : row + 1], y[row : row + 1])
        assert torch.equal(alone[0], together[row])
    library.set_threads(1)
    assert torch.equal(layer.add(x, adapters, y), together)
    library.set_threads(2)
    own = adapters == 1
    assert torch.equal(layer.add(x[own], adapters[own], y[own]), together[own])


@pytest.mark.parametrize("number", [-1, 3, 4, -9])
def test_a_row_without_an_adapter_keeps_its_bits_and_may_be_anything(library, number):
    layer = Layer(library, "float32")
    x, y, adapters = random(5, INPUTS), random(5, OUTPUTS), torch.tensor([0, number, 1, number, 2])
    x[1], y[3] = float("nan"), float("inf")
    made = layer.add(x, adapters, y)
    assert torch.equal(made[[1, 3]], y[[1, 3]])
    assert made[[0, 2, 4]].isfinite().all()


def test_a_number_that_is_not_finite_stays_with_its_own_rows(library):
    layer = Layer(library, "bfloat16")
    x, y = random(6, INPUTS), random(6, OUTPUTS)
    x[2] = float("nan")
    adapters = torch.tensor([2, 2, 2, 1, 0, -1])
    made = layer.add(x, adapters, y)
    assert made[2].isnan().all()
    assert made[[0, 1, 3, 4, 5]].isfinite().all()


def test_a_layer_without_parts_adds_nothing(library):
    layer = Layer(library, "float32", parts=[])
    y = random(4, OUTPUTS)
    assert torch.equal(layer.add(random(4, INPUTS), numbers(4), y), y)


def test_a_pair_is_differentiable(library):
    down, up = random(4, INPUTS), random(OUTPUTS, 4, seed=1)
    pair = LowRankPair(library, down, up, "float32", WeightMemory())
    x = random(3, INPUTS, seed=2).requires_grad_()
    pair(x).sum().backward()
    expected = (up.double() @ down.double()).sum(0).expand(3, -1)
    assert torch.allclose(x.grad.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_of_a_rescaled_part_are_rescaled_in_its_own_rows(library, kind):
    """As DoRA does it: y gain + offset, then what is added; others keep their bits."""
    gain, offset = 0.5 + random(17, seed=1).abs(), random(17, seed=2)
    down, up = random(3, INPUTS, seed=3), random(17, 3, seed=4)
    pair = LowRankPair(library, down, up, kind, WeightMemory(), (gain, offset))
    own = LowRankPart(pair.down.address, pair.up.address, 1, 30)
    own.gain, own.offset = (each.data_ptr() for each in pair.rescaling)
    layer = Layer(library, kind)
    x, y, adapters = random(5, INPUTS), random(5, OUTPUTS, seed=9), torch.tensor([1, -1, 0, 1, 2])
    layer.parts[2] = own
    made = layer.add(x, adapters, y)
    assert torch.equal(made[1], y[1])
    for row in (0, 3):
        part = y[row, 30:47] * gain + offset + up @ (down @ x[row])
        apart = (made[row, 30:47] - part).norm() / part.norm()
        assert apart < TOLERANCE[kind]
        assert torch.equal(made[row, :30], y[row, :30])
        assert torch.equal(made[row, 47:], y[row, 47:])
        assert torch.equal(
            made[row], layer.add(x[row : row + 1], adapters[row : row + 1], y[row : row + 1])[0]
        )
    assert pair.nbytes == pair.down.nbytes + pair.up.nbytes + 2 * 17 * 4
