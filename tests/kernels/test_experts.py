"""Mixtures of experts: each row by the experts that it chose, the same bits in any company."""

from __future__ import annotations

import pytest
import torch

from transformers_api.kernels.modules.experts import PackedExperts, _multiply
from transformers_api.kernels.modules.linear import PackedWeight
from transformers_api.kernels.modules.weight_memory import WeightMemory

KINDS = ["float32", "bfloat16", "int8", "int4"]
TOLERANCE = {"float32": 1e-6, "bfloat16": 5e-3, "int8": 2e-2, "int4": 0.12}
EXPERTS, WIDTH, SIZE = 5, 70, 96


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def choices(rows: int, count: int = EXPERTS) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randint(0, count, (rows,), generator=generator)


def packed(library, kind, matrices, biases=None):
    memory = WeightMemory()
    weights = [PackedWeight(library, [matrix], kind, memory) for matrix in matrices]
    for weight, bias in zip(weights, biases if biases is not None else (), strict=False):
        weight.set_bias(bias)
    return PackedExperts(library, weights)


def expected(matrices, biases, x, indices):
    rows = x.double().repeat_interleave(len(indices) // len(x), 0)
    products = [row @ matrices[e].double().T for row, e in zip(rows, indices, strict=True)]
    return torch.stack(products) + biases[indices].double()


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_goes_through_the_experts_that_it_chose(library, kind):
    matrices, biases = random(EXPERTS, WIDTH, SIZE), random(EXPERTS, WIDTH, seed=1)
    layer = packed(library, kind, matrices, biases)
    for rows, share in ((1, 1), (1, 3), (7, 2), (40, 1), (130, 2)):
        x, indices = random(rows, SIZE, seed=2), choices(rows * share)
        made = layer.multiply(x, indices)
        wanted = expected(matrices, biases, x, indices)
        assert (made - wanted).norm() < TOLERANCE[kind] * wanted.norm(), (rows, share)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_same_bits_whoever_chose_its_experts_too(library, kind):
    layer = packed(library, kind, random(EXPERTS, WIDTH, SIZE))
    x, indices = random(90, SIZE, seed=3), choices(90)
    together = layer.multiply(x, indices)
    for row in (0, 1, 44, 89):
        alone = layer.multiply(x[row : row + 1], indices[row : row + 1])
        assert torch.equal(alone[0], together[row])
    others = indices.clone()
    others[1:] = (others[1:] + 1) % EXPERTS
    assert torch.equal(layer.multiply(x, others)[0], together[0])
    library.set_threads(1)
    assert torch.equal(layer.multiply(x, indices), together)
    library.set_threads(2)


def test_an_expert_that_nobody_chose_need_not_be_finite(library):
    matrices = random(EXPERTS, WIDTH, SIZE)
    matrices[2] = float("nan")
    layer = packed(library, "bfloat16", matrices)
    assert layer.multiply(random(3, SIZE), torch.tensor([0, 1, 4])).isfinite().all()


@pytest.mark.parametrize("index", [-1, EXPERTS, EXPERTS + 1])
def test_an_expert_that_does_not_exist_adds_nothing(library, index):
    layer = packed(library, "float32", random(EXPERTS, WIDTH, SIZE))
    x = random(2, SIZE)
    made = layer.multiply(x, torch.tensor([index, 3]))
    assert not made[0].any()
    assert torch.equal(made[1:], layer.multiply(x[1:], torch.tensor([3])))


def test_rows_of_bfloat16_give_bfloat16(library):
    layer = packed(library, "bfloat16", random(EXPERTS, WIDTH, SIZE))
    x, indices = random(6, SIZE).bfloat16(), choices(6)
    made = layer.multiply(x, indices)
    assert made.dtype == torch.bfloat16
    assert torch.equal(made, layer.multiply(x.float(), indices).bfloat16())


def test_a_gradient_flows_back_through_the_chosen_experts(library):
    matrices, indices = random(EXPERTS, WIDTH, SIZE), choices(8)
    layer = packed(library, "float32", matrices)
    x = random(4, SIZE).requires_grad_()
    weight = random(8, WIDTH, seed=5)
    (_multiply(layer, x, indices) * weight).sum().backward()
    rows = x.detach().double().requires_grad_()
    biases = torch.zeros(EXPERTS, WIDTH)
    (expected(matrices, biases, rows, indices) * weight).sum().backward()
    assert torch.allclose(x.grad, rows.grad.float(), atol=1e-4)
