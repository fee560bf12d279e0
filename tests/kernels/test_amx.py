"""The tile unit of AMX: what its stand-in computes, and what of it other instructions give too."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from tests.instruction_sets import AMX
from tests.kernels.conftest import AMX_BY_LOOPS, STAND_INS, driven
from tests.repeats import slow
from transformers_api.kernels import variants
from transformers_api.kernels.abi import Library
from transformers_api.kernels.build import build
from transformers_api.kernels.modules.linear import PackedWeight
from transformers_api.kernels.modules.weight_memory import WeightMemory
from transformers_api.kernels.variants import NativeUnavailable, cpu_flags

(STAND_IN,) = (variant for variant in STAND_INS if variant.name == "amx_by_loops")
(OTHER,) = (variant for variant in variants.VARIANTS if variant.name == "avx512_bf16")
(PLAIN,) = (variant for variant in variants.VARIANTS if variant.name == "avx512")
# The unit itself where there is one; the loops are compared with it by `make test-all`.
TILES = AMX if AMX in variants.usable() else STAND_IN
needs_avx512 = pytest.mark.skipif(bool(STAND_IN.missing(cpu_flags())), reason="needs AVX-512")

# Prints the sums of one row, in hexadecimal, or dies; from lines of C++ that fill a, b, c.
PROGRAM = """
#include <immintrin.h>
#include <cstdint>
struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
  void shape(int tile, int height, int bytes) { rows[tile] = height, row_bytes[tile] = bytes; }
};
union Row { float f[16]; int32_t i[16]; uint8_t u[64]; int8_t s[64]; uint16_t h[32]; };
uint16_t bf16(float x) { Row r; r.f[0] = x; return r.i[0] >> 16; }
int main() {
  alignas(64) Row a[16] = {}, b[16] = {}, c[16] = {};
  Config config;
  config.shape(0, 1, 64), config.shape(4, 1, 64), config.shape(6, 16, 64);
  %s
  for (int n = 0; n < 2; n++) std::printf("%%08x ", c[0].i[n]);
}
"""
LOADED = """
  _tile_loadconfig(&config);
  _tile_loadd(0, c, 64); _tile_loadd(4, a, 64); _tile_loadd(6, b, 64);
"""
BF16 = LOADED + "_tile_dpbf16ps(0, 4, 6); _tile_stored(0, c, 64); _tile_release();"
CODES = LOADED + "_tile_dpbsud(0, 4, 6); _tile_stored(0, c, 64); _tile_release();"


def run(tmp_path: Path, lines: str) -> subprocess.CompletedProcess[str]:
    program = tmp_path / "program"
    flags = [flag for flag in STAND_IN.flags if not flag.startswith("-DISA")]
    command = [
        "g++",
        "-std=c++17",
        "-ffp-contract=off",
        *flags,
        "-x",
        "c++",
        "-",
        "-o",
        str(program),
    ]
    subprocess.run(command, input=PROGRAM % lines, text=True, check=True, timeout=110)
    return subprocess.run([program], capture_output=True, text=True, check=False)


# a row of ``a`` is (x0, x1), (x2, x3), ...; column 0 of ``b`` the same; written by hand from the manual
BF16_SUMS = {
    "even and odd products are summed apart": (
        # even: 1, then 2**-24 is lost, twice; odd: 2**-24 + 2**-24 = 2**-23, which is not
        "for (int s = 0; s < 3; s++) a[0].h[2*s] = bf16(1), a[0].h[2*s+1] = bf16(s ? 0x1p-24f : 0);"
        "b[0].h[0] = bf16(1); b[1].h[0] = b[2].h[0] = bf16(0x1p-24f);"
        "b[1].h[1] = b[2].h[1] = bf16(1);",
        "3f800001",
    ),
    "a product and its sum are rounded once": (
        # 1 - (1 - 2**-7)(1 + 2**-7) = 2**-14, which rounding the product to 24 bits leaves
        "a[0].h[0] = bf16(1); b[0].h[0] = bf16(1);"
        "a[0].h[2] = bf16(-1 + 0x1p-7f); b[1].h[0] = bf16(1 + 0x1p-7f);",
        "38800000",
    ),
    "the sum before is added last": (
        # 2**24 + (1 + 1), where 2**24 + 1 + 1 would stay what it was
        "c[0].f[0] = 0x1p24f; a[0].h[0] = a[0].h[2] = bf16(1); b[0].h[0] = b[1].h[0] = bf16(1);",
        "4b800001",
    ),
    "denormal operands are zero": (
        "a[0].h[0] = 1; b[0].h[0] = bf16(0x1p126f); c[0].i[0] = 1;",
        "00000000",
    ),
    "denormal results are zero": (
        "a[0].h[0] = bf16(0x1p-70f); b[0].h[0] = bf16(0x1p-70f);",
        "00000000",
    ),
    "half of a unit goes to the even neighbour": (
        "c[0].f[0] = 1; a[0].h[0] = bf16(0x1p-24f); b[0].h[0] = bf16(1);",
        "3f800000",
    ),
}


@needs_avx512
@pytest.mark.parametrize("case", BF16_SUMS)
def test_products_of_bfloat16_are_summed_as_the_manual_says(tmp_path, case):
    lines, expected = BF16_SUMS[case]
    assert run(tmp_path, lines + BF16).stdout.split()[0] == expected


@needs_avx512
def test_products_of_codes_are_exact_and_only_the_weights_have_no_sign(tmp_path):
    lines = (
        "for (int s = 0; s < 16; s++) for (int j = 0; j < 4; j++)"
        "  a[0].s[4*s+j] = -128, b[s].u[j] = 255, b[s].u[4+j] = 1;"
        "c[0].i[0] = 7;"
    )
    assert run(tmp_path, lines + CODES).stdout.split() == [
        f"{(64 * -128 * 255 + 7) % 2**32:08x}",
        f"{64 * -128 % 2**32:08x}",
    ]


@needs_avx512
def test_fewer_rows_and_lanes_than_a_register_holds_are_all_that_is_read_and_written(tmp_path):
    lines = (
        "config.shape(4, 1, 8), config.shape(6, 2, 4), config.shape(0, 1, 4);"
        "for (int s = 0; s < 16; s++) for (int j = 0; j < 8; j++) a[0].u[4*s+j%4] = b[s].u[j] = 1;"
        "c[0].i[1] = 99;"
    )
    assert run(tmp_path, lines + CODES).stdout.split() == [f"{8:08x}", f"{99:08x}"]


@needs_avx512
@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        ("config.shape(6, 15, 64);" + BF16, "rows of another length than weights"),
        ("config.shape(0, 2, 64);" + CODES, "sums and rows of different heights"),
        ("config.shape(6, 16, 32);" + BF16, "sums and weights of different widths"),
        *slow(
            ("config.shape(4, 17, 64);" + BF16, "more than 16 rows"),
            ("config.shape(4, 0, 0);" + BF16, "a register that is not configured"),
            ("config.palette = 2;" + BF16, "a palette that is not 1"),
            ("_tile_zero(0);", "used without a configuration"),
            (BF16 + "_tile_zero(0);", "used without a configuration"),
            (LOADED + "_tile_dpbf16ps(0, 4, 4);", "a register that is used twice"),
        ),
    ],
)
def test_what_the_processor_would_not_do_the_stand_in_does_not_either(tmp_path, lines, fault):
    done = run(tmp_path, lines)
    assert done.returncode < 0
    assert fault in done.stderr


def packed(library: Library, kind: str, n: int, k: int) -> PackedWeight:
    seeded = torch.Generator().manual_seed(n)
    weight = PackedWeight(library, [torch.randn(n, k, generator=seeded)], kind, WeightMemory())
    weight.set_bias(torch.randn(n, generator=seeded))
    return weight


SHAPES = pytest.mark.parametrize("shape", [(64, 32), (50, 77), (192, 576), (33, 2048)], ids=str)


@needs_avx512
@SHAPES
def test_four_bits_give_the_bits_of_avx512_for_any_number_of_rows(native_cache, shape):
    by_tiles, other = (
        packed(Library(build(native_cache, variant=variant), threads=2), "int4", *shape)
        for variant in (TILES, PLAIN)
    )
    x = torch.randn(100, shape[1], generator=torch.Generator().manual_seed(1))
    x[3] *= 1e-30
    x[5] *= 1e30
    for rows in (*range(1, 36), 48, 49, 64, 65, 100):
        assert torch.equal(by_tiles.multiply(x[:rows]), other.multiply(x[:rows])), rows


@needs_avx512
@SHAPES
def test_eight_bits_that_bfloat16_can_hold_give_its_bits_for_any_number_of_rows(
    native_cache, shape
):
    library, seeded = Library(build(native_cache, variant=TILES), threads=2), torch.Generator()
    codes = torch.randint(-127, 128, shape, generator=seeded.manual_seed(1)).float()
    codes[:, ::32] = 127  # so that each scale is a power of two
    codes *= 2.0 ** torch.randint(-12, 3, (shape[0], 1), generator=seeded)
    narrow, wide = (
        PackedWeight(library, [codes], kind, WeightMemory()) for kind in ("int8", "bfloat16")
    )
    x = torch.randn(100, shape[1], generator=seeded)
    for rows in (*range(1, 36), 48, 49, 64, 65, 100):
        assert torch.equal(narrow.multiply(x[:rows]), wide.multiply(x[:rows])), rows


@needs_avx512
def test_eight_bits_become_bfloat16_near_them_and_neither_smaller_nor_larger(native_cache):
    library = Library(build(native_cache, variant=TILES), threads=2)
    weight = PackedWeight(
        library,
        [torch.randn(640, 320, generator=torch.Generator().manual_seed(1))],
        "int8",
        WeightMemory(),
    )
    multiplied, exact = weight.multiply(torch.eye(320)).T, weight.dense()
    assert torch.equal(multiplied, multiplied.bfloat16().float())
    assert torch.equal(multiplied == 0, exact == 0)
    errors = (multiplied / exact - 1)[exact != 0]
    assert errors.abs().max() < 1.4 / 256  # half a unit is 1 / 256 of the smallest in its binade
    assert errors.mean().abs() < 0.05 / 256
    assert errors.std() < 0.5 / 256


@needs_avx512
def test_weights_behind_the_end_of_a_row_reach_no_sum(native_cache):
    # 77 inputs are no whole number of tiles: what follows them is the next panel
    library = Library(build(native_cache, variant=TILES), threads=1)
    weight = torch.ones(64, 77)
    weight[32:] = float("nan")
    given = PackedWeight(library, [weight], "bfloat16", WeightMemory()).multiply(torch.ones(3, 77))
    assert torch.equal(given[:, :32], torch.full((3, 32), 77.0))


@needs_avx512
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_instructions_themselves_give_the_bits_of_the_loops(tmp_path):
    """Where the processor has none, each is trapped and done by the loops: traps.cpp."""
    ours = driven(["g++"], STAND_IN, tmp_path)
    theirs = driven(["g++"], AMX, tmp_path, sources=[AMX_BY_LOOPS / "traps.cpp"])
    assert len(theirs) > 50_000
    assert theirs == ours


def test_a_system_that_refuses_the_tile_unit_leaves_the_next_best(monkeypatch):
    monkeypatch.setattr(variants, "cpu_flags", lambda: set(AMX.features))
    monkeypatch.setattr(variants, "ask_for_tile_unit", lambda: "Operation not permitted")
    reason = "the system refuses the processor's tile unit: Operation not permitted"
    assert variants.choose().name == OTHER.name
    assert variants.withheld() == reason
    with pytest.raises(NativeUnavailable, match=reason):
        variants.choose("amx")


def test_a_system_that_grants_the_tile_unit_is_asked_once_the_processor_has_it(monkeypatch):
    monkeypatch.setattr(variants, "ask_for_tile_unit", lambda: None)
    monkeypatch.setattr(variants, "cpu_flags", lambda: set(AMX.features))
    assert variants.choose().name == "amx"
    assert variants.withheld() is None
    monkeypatch.setattr(variants, "ask_for_tile_unit", lambda: pytest.fail("asked"))
    monkeypatch.setattr(variants, "cpu_flags", lambda: set(OTHER.features))
    assert variants.choose().name == OTHER.name
