"""Weights in ggml's blocks: what becomes of them, against gguf's own numbers."""

from __future__ import annotations

import gguf
import numpy
import pytest
import torch

from transformers_api.kernels.modules import linear
from transformers_api.kernels.modules.blocks import KINDS, PLAIN, Blocks, Pieces
from transformers_api.kernels.modules.linear import PackedWeight
from transformers_api.kernels.modules.weight_memory import WeightMemory
from transformers_api.serving.models import weight_fidelity

# Bytes of a block that are a half-precision number: a scale, or a minimum.
HALVES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    "MXFP4": (),
}
EXACT = sorted(weight_fidelity.EXACT)
MOST_LOST = {"Q4_K": 3e-4, "IQ4_XS": 3e-4}  # by rounding scales to half precision; else to int8
SHAPE = (50, 512)


def random_blocks(kind: str, shape: tuple[int, int] = SHAPE, seed: int = 0):
    """Blocks of random bytes with sane scales, and what gguf makes of them."""
    number = gguf.GGMLQuantizationType[kind]
    weights, size = gguf.GGML_QUANT_SIZES[number]
    draw = numpy.random.default_rng(seed)
    blocks = draw.integers(0, 256, (shape[0], shape[1] // weights, size), dtype=numpy.uint8)
    for at in HALVES[kind]:
        numbers = draw.normal(0, 0.1, blocks.shape[:2]).astype(numpy.float16)
        blocks[..., at : at + 2] = numbers[..., None].view(numpy.uint8)
    if kind == "MXFP4":
        blocks[..., 0] = draw.integers(118, 132, blocks.shape[:2])
    data = blocks.reshape(shape[0], -1)
    values = gguf.dequantize(data, number).reshape(shape)
    return Blocks(torch.from_numpy(data.reshape(-1)), kind, shape), torch.from_numpy(values)


def lost(made: torch.Tensor, values: torch.Tensor) -> float:
    return float((made.double() - values.double()).norm() / values.double().norm())


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_read_as_gguf_reads_them(library, kind):
    blocks, values = random_blocks(kind)
    assert torch.equal(blocks.rows(library, 7, 20), values[7:27])


def test_every_kind_has_ggmls_number_and_a_test():
    numbers = {kind: int(gguf.GGMLQuantizationType[kind]) for kind in KINDS}
    assert numbers == {kind: number for kind, (number, _) in KINDS.items()}
    assert KINDS.keys() == HALVES.keys()
    assert KINDS.keys() > weight_fidelity.EXACT | weight_fidelity.HALF_SCALES
    assert MOST_LOST.keys() == weight_fidelity.HALF_SCALES


@pytest.mark.parametrize("kind", EXACT)
def test_kinds_that_the_layout_has_room_for_keep_their_very_numbers(library, kind):
    blocks, values = random_blocks(kind)
    packed = PackedWeight(library, [blocks], blocks.width, WeightMemory())
    assert torch.equal(packed.dense(), values)
    assert packed.error == 0


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in EXACT])
def test_other_kinds_lose_little_and_the_loss_is_measured(library, kind):
    blocks, values = random_blocks(kind)
    packed = PackedWeight(library, [blocks], blocks.width, WeightMemory())
    loss = lost(packed.dense(), values)
    assert 0 < loss < MOST_LOST.get(kind, 0.01)
    assert packed.error == pytest.approx(loss, rel=0.01)


@pytest.mark.parametrize(("kind", "width"), [("Q4_0", "int8"), ("Q8_0", "int4"), ("Q6_K", "int4")])
def test_another_width_can_be_asked_for(library, kind, width):
    blocks, values = random_blocks(kind)
    packed = PackedWeight(library, [blocks], width, WeightMemory())
    loss = lost(packed.dense(), values)
    assert loss < (0.12 if width == "int4" else 0.01)
    assert packed.error == pytest.approx(loss, rel=0.01, abs=1e-9)


@pytest.mark.parametrize("width", ["float32", "bfloat16"])
def test_blocks_can_be_numbers_again(library, width):
    blocks, values = random_blocks("Q5_K")
    packed = PackedWeight(library, [blocks], width, WeightMemory())
    assert torch.equal(packed.dense(), values.to(getattr(torch, width)).float())


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "Q8_0"])
def test_rows_come_in_the_order_that_is_asked_for(library, kind):
    blocks, values = random_blocks(kind)
    order = torch.randperm(SHAPE[0], generator=torch.Generator().manual_seed(3))
    ordered = Blocks(blocks.memory, kind, SHAPE, order)
    plain = PackedWeight(library, [blocks], blocks.width, WeightMemory())
    packed = PackedWeight(library, [ordered], blocks.width, WeightMemory())
    assert torch.equal(ordered.rows(library, 0, 50), values[order])
    assert torch.equal(packed.dense(), plain.dense()[order])


@pytest.mark.parametrize("kinds", [("Q4_0", "Q4_1", "Q4_K"), ("Q8_0", "Q5_0", "Q6_K")])
def test_blocks_and_plain_numbers_lie_below_each_other(library, kinds):
    rows = (7, 40, 21)
    blocks = [random_blocks(kind, (n, 256), n)[0] for kind, n in zip(kinds, rows, strict=True)]
    own = torch.randn(5, 256, generator=torch.Generator().manual_seed(1))
    width = blocks[0].width
    packed = PackedWeight(library, [*blocks, own], width, WeightMemory())
    parts = packed.dense().split([*rows, 5])
    for part, block in zip(parts, blocks, strict=False):
        alone = PackedWeight(library, [block], width, WeightMemory())
        assert torch.equal(part, alone.dense())
    assert torch.equal(parts[-1], PackedWeight(library, [own], width, WeightMemory()).dense())


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_products_are_those_of_the_numbers_themselves(library, kind):
    blocks, values = random_blocks(kind)
    x = torch.randn(9, SHAPE[1], generator=torch.Generator().manual_seed(2))
    steps = x.view(9, -1, 32).abs().amax(-1, keepdim=True) / 127
    rounded, error = ((x.view(9, -1, 32) / steps).round() * steps).view(9, -1), 1e-5
    if kind == "Q8_0" and library.isa.startswith("amx"):  # the unit multiplies bfloat16
        rounded, error = x.bfloat16(), 2.5e-3
    made = PackedWeight(library, [blocks], blocks.width, WeightMemory()).multiply(x)
    exact = rounded.double() @ values.double().T
    assert ((made - exact).norm() / exact.norm()).item() < error


def in_int4(library, kinds):
    blocks = [random_blocks(kind, (90, 1056), seed)[0] for seed, kind in enumerate(kinds)]
    return PackedWeight(library, blocks, "int4", WeightMemory())


@pytest.mark.parametrize("rows", [1, 3, 8, 40])
def test_q4_0_keeps_its_numbers_and_products_without_the_bytes_of_minima(library, rows):
    alone, beside = in_int4(library, ["Q4_0"]), in_int4(library, ["Q4_0", "Q4_1"])
    assert alone.nbytes == 96 * 1056 * 9 // 16
    assert beside.nbytes == 192 * 1056 * 5 // 8
    assert torch.equal(alone.dense(), beside.dense()[:90])
    x = torch.randn(rows, 1056, generator=torch.Generator().manual_seed(rows))
    assert torch.equal(alone.multiply(x), beside.multiply(x)[:, :90])


def test_memory_of_another_size_is_refused(library):
    blocks, _ = random_blocks("Q4_0")
    short = Blocks(blocks.memory[:-1], "Q4_0", SHAPE)
    with pytest.raises(ValueError, match="are no Q4_0"):
        PackedWeight(library, [short], "int4", WeightMemory())


@pytest.mark.parametrize("width", ["float32", "bfloat16", "int8", "int4"])
def test_a_matrix_that_comes_in_pieces_is_packed_as_a_whole_one(library, monkeypatch, width):
    monkeypatch.setattr(linear, "UNPACKED_BYTES", 1)  # a panel at a time
    torch.manual_seed(0)
    numbers = torch.randn(90, 96)
    blocks, _ = random_blocks("Q4_1", (70, 96))
    row = len(blocks.memory) // 70

    def piece(first, count):
        return Blocks(blocks.memory[first * row : (first + count) * row], "Q4_1", (count, 96))

    pieces = [
        Pieces((90, 96), lambda first, count: numbers[first : first + count].half()),
        Pieces((70, 96), piece),
    ]
    whole = [numbers.half(), blocks]
    made, expected = (
        PackedWeight(library, matrices, width, WeightMemory()) for matrices in (pieces, whole)
    )
    assert torch.equal(made.dense(), expected.dense())
    assert made.error == expected.error


@pytest.mark.parametrize("kind", [*KINDS, *PLAIN])
@pytest.mark.parametrize("rows", [1, 5])
def test_products_with_blocks_are_those_with_their_values(library, kind, rows):
    blocks, values = random_blocks(kind) if kind in KINDS else plain_blocks(kind)
    x = torch.randn(2, rows, SHAPE[1])
    wanted = x.double() @ values.double().t()
    assert_near(blocks.multiply(library, x), wanted, 1e-5)
    order = torch.randperm(SHAPE[0])
    ordered = Blocks(blocks.memory, kind, SHAPE, order)
    assert_near(ordered.multiply(library, x), wanted[..., order], 1e-5)
    halves = x.bfloat16()
    made = blocks.multiply(library, halves)
    assert made.dtype == torch.bfloat16
    assert_near(made, halves.double() @ values.double().t(), 1e-2)


def plain_blocks(kind: str):
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
    numbers = torch.randn(SHAPE, dtype=torch.float32).to(dtype)
    return Blocks(numbers.view(-1).view(torch.uint8), kind, SHAPE), numbers.float()


def assert_near(made, wanted, tolerance):
    assert made.shape == wanted.shape
    assert lost(made, wanted) < tolerance


def test_a_matrix_of_which_blocks_are_no_part_is_not_multiplied_with_them(library):
    memory = torch.zeros(2 * 33 * 4, dtype=torch.uint8)  # rows of 33 float32
    with pytest.raises(ValueError, match="no F32"):
        Blocks(memory, "F32", (2, 33)).multiply(library, torch.zeros(1, 33))
