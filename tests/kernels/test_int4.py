"""Weights of four bits: what is kept of them, and products as plain torch would make them."""

from __future__ import annotations

import math

import pytest
import torch

from transformers_api.kernels.modules.linear import PackedWeight
from transformers_api.kernels.modules.weight_memory import WeightMemory

GROUP = 32


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed(library, weight, kind="int4"):
    return PackedWeight(library, [weight], kind, WeightMemory())


def groups(weight: torch.Tensor) -> torch.Tensor:
    """(n, 32): what shares a scale and a minimum."""
    return weight.reshape(-1, GROUP)


def error(given: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((given.double() - wanted.double()).norm() / wanted.double().norm())


def from_end_to_end(weight: torch.Tensor) -> torch.Tensor:
    """The plain way: sixteen steps from a group's smallest number to its largest."""
    found = groups(weight)
    low, high = found.amin(1, keepdim=True), found.amax(1, keepdim=True)
    step = (high - low) / 15
    return (((found - low) / step).round() * step + low).view_as(weight)


def in_bytes(x: torch.Tensor) -> torch.Tensor:
    """Inputs as they are multiplied: rounded to whole shares of 1/127 of each group's largest."""
    wide = torch.nn.functional.pad(x, (0, -x.shape[1] % GROUP)).view(len(x), -1, GROUP)
    step = wide.abs().amax(-1, keepdim=True) / 127
    return ((wide / step).round() * step).view(len(x), -1)[:, : x.shape[1]]


def made_of_four_bits(rows: int, columns: int, largest: int) -> torch.Tensor:
    """As a four-bit file says it: 0..15 times a scale, plus a minimum, both in half precision.

    Not every group needs all of them; ``largest`` is what occurs in all.
    """
    count = rows * columns // GROUP
    draw = torch.Generator().manual_seed(1)
    steps = torch.randint(0, largest + 1, (count, GROUP), generator=draw)
    steps[:, 0], steps[:, 1] = 0, largest
    scale, low = (random(count, 1, seed=n).half().float() for n in (2, 3))
    return (steps * scale.abs() + low).view(rows, columns)


@pytest.mark.parametrize("shape", [(33, 65), (192, 576), (40, 31)], ids=str)
def test_a_product_is_that_of_the_weights_that_are_kept_and_of_inputs_in_bytes(library, shape):
    weight, x = packed(library, random(*shape)), random(9, shape[1], seed=1)
    wanted = in_bytes(x).double() @ weight.dense().double().T
    assert error(weight.multiply(x), wanted) < 1e-5


def test_each_group_keeps_sixteen_evenly_spaced_numbers(library):
    kept = groups(packed(library, random(70, 128)).dense())
    for group in kept:
        found = group.unique()
        assert 2 <= len(found) <= 16
        steps = (found - found[0]) / found.diff().min()
        assert torch.allclose(steps, steps.round(), atol=2e-2)


def test_the_search_loses_less_than_rounding_from_end_to_end(library):
    weight = random(64, 1024)
    kept = packed(library, weight)
    plain = error(from_end_to_end(weight), weight)
    assert error(kept.dense(), weight) < 0.9 * plain
    worse = (
        groups(kept.dense() - weight).norm(dim=1)
        > groups(from_end_to_end(weight) - weight).norm(dim=1) * 1.01
    )
    assert not worse.any()


def test_what_was_lost_is_told(library):
    weight = random(100, 320)
    kept = packed(library, weight)
    assert math.isclose(kept.error, error(kept.dense(), weight), rel_tol=1e-3)
    assert packed(library, weight, "int8").error == 0.0


@pytest.mark.parametrize("largest", [15, 12, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_come_from_four_bits_lose_nothing_but_their_own_rounding(
    library, dtype, largest
):
    weight = made_of_four_bits(64, 256, largest)
    kept = packed(library, weight.to(dtype))
    assert kept.error < (1e-6 if dtype == torch.float32 else 4e-3)
    assert error(kept.dense(), weight) < (1e-6 if dtype == torch.float32 else 4e-3)


def test_groups_of_one_number_are_kept_in_half_precision(library):
    weight = random(40, 1).repeat(1, 64)
    assert torch.equal(packed(library, weight).dense(), weight.half().float())


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e6])
def test_weights_that_half_precision_does_not_hold_count_as_lost(library, poison):
    weight = random(40, 64)
    weight[7, 3] = poison
    assert packed(library, weight).error > 0.5


def test_five_bits_are_taken_for_a_weight(library):
    assert packed(library, random(512, 576)).nbytes == 512 * 576 * 5 // 8


def test_layers_that_share_a_call_are_packed_as_each_alone(library):
    parts = [random(n, 96, seed=n) for n in (5, 33, 20)]
    together = PackedWeight(library, parts, "int4", WeightMemory()).dense()
    assert torch.equal(together, torch.cat([packed(library, part).dense() for part in parts]))
