"""The instruction sets of this processor that `make test` compiles and runs kernels for.

A compilation takes a core for a quarter of a minute, and each has to be made once for a change.
"""

from __future__ import annotations

from transformers_api.kernels.variants import VARIANTS, Variant, usable

AMX = next(variant for variant in VARIANTS if variant.name == "amx")
# Nearly the code of others: in `make test-all` alone. Where there is AMX, that has the pairs of
# bfloat16 of "avx512_bf16" for few rows, and "avx512" all else of it; "avx2_vnni" has the products
# of AVX-512 in half a register.
REPEATED = {"avx512_bf16", "avx2_vnni"} if AMX in usable() else set()


def distinct() -> list[Variant]:
    """Those that differ in code; the best first."""
    return [variant for variant in usable() if variant.name not in REPEATED]
