"""Packed weights: right within their precision, and the same to the bit in any company."""

from __future__ import annotations

import pytest
import torch

from transformers_api.kernels.abi import TYPES, WEIGHT_TYPES, Library, Weight
from transformers_api.kernels.build import build
from transformers_api.kernels.modules.linear import JoinedWeights, PackedWeight, multiply
from transformers_api.kernels.modules.weight_memory import WeightMemory

SHAPES = [
    (1, 1),
    (3, 5),
    (16, 64),
    (31, 63),
    (32, 64),
    (33, 65),
    (100, 200),
    (192, 576),
    (576, 130),
]
KINDS = ["float32", "bfloat16", "int8", "int4"]
# relative to the norm of the exact result: float32 rounding, bfloat16's 8 bits, int8's 7 twice, and
# the 4 of int4, for groups of random numbers
TOLERANCE = {"float32": 1e-6, "bfloat16": 5e-3, "int8": 2e-2, "int4": 0.12}
ROWS = [*range(1, 30), 37, 64, 65, 100, 256]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed(library, weight, kind, bias=None):
    result = PackedWeight(library, [weight], kind, WeightMemory())
    if bias is not None:
        result.set_bias(bias)
    return result


def error(given: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((given.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_product_is_right_within_its_precision(library, kind, shape):
    weight, bias, x = random(*shape), random(shape[0], seed=1), random(7, shape[1], seed=2)
    wanted = x.double() @ weight.double().T + bias.double()
    given = packed(library, weight, kind, bias).multiply(x)
    assert given.dtype == torch.float32
    assert error(given, wanted) < TOLERANCE[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_rows_give_bfloat16(library, kind):
    weight, x = random(65, 100), random(5, 100, seed=1).bfloat16()
    given = packed(library, weight, kind).multiply(x)
    assert given.dtype == torch.bfloat16
    assert error(given, x.double() @ weight.double().T) < TOLERANCE[kind] + 5e-3


def test_bfloat16_loses_nothing_but_the_rounding_of_weights_and_rows(library):
    weight, x = random(70, 300), random(9, 300, seed=1)
    wanted = x.bfloat16().double() @ weight.bfloat16().double().T
    assert error(packed(library, weight, "bfloat16").multiply(x), wanted) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(33, 65), (192, 576)], ids=str)
def test_a_row_is_the_same_to_the_bit_in_any_company(library, kind, shape):
    weight, x = packed(library, random(*shape), kind, random(shape[0])), random(256, shape[1])
    alone = torch.cat([weight.multiply(x[i : i + 1]) for i in range(len(x))])
    for count in ROWS:
        for begin in {0, (256 - count) // 2, 256 - count}:
            given = weight.multiply(x[begin : begin + count])
            assert torch.equal(given, alone[begin : begin + count]), (count, begin)


@pytest.mark.parametrize("kind", KINDS)
def test_the_number_of_threads_changes_no_bit(library, kind):
    weight, x = packed(library, random(1000, 96), kind), random(70, 96, seed=1)
    results = []
    for threads in (1, 2, 3, 5, 2):
        library.set_threads(threads)
        results.append(weight.multiply(x))
    assert all(torch.equal(result, results[0]) for result in results)


def test_many_small_calls_with_more_threads_than_cores_all_come_out_right(library):
    library.set_threads(5)
    weight = packed(library, random(320, 64), "float32")
    x = random(12, 64, seed=1)
    wanted = weight.multiply(x)
    assert all(torch.equal(weight.multiply(x), wanted) for _ in range(2000))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so_and_stays_in_its_row(library, kind, poison):
    weight, x = packed(library, random(40, 100), kind), random(5, 100, seed=1)
    clean = weight.multiply(x)
    x[2, 57] = poison
    given = weight.multiply(x)
    assert not given[2].isfinite().any()
    others = [0, 1, 3, 4]
    assert torch.equal(given[others], clean[others])


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_give_zeros(library, kind):
    assert not packed(library, torch.zeros(40, 70), kind).multiply(random(3, 70)).any()
    assert not packed(library, random(40, 70), kind).multiply(torch.zeros(3, 70)).any()


def test_rows_that_do_not_lie_together_and_rows_that_are_not_there(library):
    weight, x = packed(library, random(40, 70), "float32"), random(4, 6, 70)
    assert torch.equal(weight.multiply(x[:, -1:]), weight.multiply(x)[:, -1:])
    assert weight.multiply(x[:0]).shape == (0, 6, 40)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_packed_weights_can_be_read_back(library, kind, dtype):
    weight = random(70, 130).to(dtype)
    found = packed(library, weight, kind)
    assert error(found.dense(), weight) < TOLERANCE[kind]
    if kind == "bfloat16" and dtype == torch.bfloat16:
        assert torch.equal(found.dense(), weight.float())
    numbers = torch.tensor([[3, 69], [0, 3]])
    assert torch.equal(found.rows(numbers), found.dense()[numbers])


def test_a_row_that_is_not_there_is_nan_and_reads_no_foreign_memory(library):
    found = packed(library, random(70, 130), "int8").rows(torch.tensor([70, -1, 69, 1 << 40]))
    assert found[[0, 1, 3]].isnan().all()
    assert found[2].isfinite().all()


def packed_by_its_functions(library: Library, kind: str, dense: torch.Tensor) -> torch.Tensor:
    weight = Weight(WEIGHT_TYPES[kind], 0, *dense.shape)
    memory = torch.zeros(library.with_gil.packed_bytes(weight), dtype=torch.uint8)
    weight.data = memory.data_ptr()
    arguments = [weight, dense.data_ptr(), TYPES[dense.dtype], 0, len(dense)]
    if kind == "int4":
        sums = torch.zeros(len(dense), 2, dtype=torch.float64)
        library.with_gil.pack_int4(*arguments, sums.data_ptr())
    else:
        library.with_gil.pack(*arguments)
    return memory


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_instruction_set_packs_the_same_bytes(library, native_cache, kind, dtype):
    best = Library(build(native_cache), threads=2)
    for shape in [(50, 77), (64, 96), (1, 1)]:
        dense = random(*shape).to(dtype)
        memories = [packed_by_its_functions(each, kind, dense) for each in (library, best)]
        assert torch.equal(*memories)


def test_int8_takes_little_more_than_a_byte_per_weight(library):
    assert packed(library, random(512, 576), "int8").nbytes <= 1.07 * 512 * 576


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_passes_through(library, kind):
    weight = packed(library, random(40, 70), kind)
    x = random(3, 5, 70, seed=1).requires_grad_()
    back = random(3, 5, 40, seed=2)
    multiply(weight, x).backward(back)
    assert error(x.grad, back.double() @ weight.dense().double()) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_of_few_outputs_is_that_of_all_with_zeros(library, kind):
    weight = packed(library, random(90, 70), kind)
    back = torch.zeros(2, 90)
    back[0, [3, 89]] = torch.tensor([1.0, -0.5])
    x = random(2, 70, seed=1).requires_grad_()
    multiply(weight, x).backward(back)
    assert error(x.grad, back.double() @ weight.dense().double()) < 1e-6
    assert not x.grad[1].any()


@pytest.mark.parametrize("kind", KINDS)
def test_joined_layers_give_what_each_would_alone(library, kind):
    weights, x = [random(n, 70, seed=n) for n in (33, 5, 64)], random(3, 70)
    joined = JoinedWeights(PackedWeight(library, weights, kind, WeightMemory()), [33, 5, 64])
    for _ in range(2):
        for i, weight in enumerate(weights):
            assert torch.equal(joined.part(i, x), packed(library, weight, kind).multiply(x))


def test_a_joined_layer_that_is_asked_again_reads_its_input_again(library):
    joined = JoinedWeights(
        PackedWeight(library, [random(8, 70), random(8, 70, seed=1)], "float32", WeightMemory()),
        [8, 8],
    )
    x = random(3, 70)
    before = joined.part(0, x)
    x.mul_(2)
    assert error(joined.part(0, x), 2 * before) < 1e-6


@pytest.mark.parametrize("size", [8, 64, 256, 264, 1000, 4096])
def test_a_checksum_changes_with_every_word_and_with_the_words_places(library, size):
    data = torch.arange(1, size + 1, dtype=torch.int64).mul(37).to(torch.uint8)

    def checksum() -> int:
        return library.without_gil.checksum(data.data_ptr(), size)

    sums = [checksum()]
    for at in range(0, size, 8):
        data[at] ^= 1
        sums.append(checksum())
        data[at] ^= 1
    assert checksum() == sums[0]
    if size > 8:
        data[:] = data.roll(8)
        sums.append(checksum())
    assert len(set(sums)) == len(sums)
