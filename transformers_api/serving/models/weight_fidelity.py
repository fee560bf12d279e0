"""The fate of a GGUF file's weights in a loaded model, by ggml's name of their type."""

from __future__ import annotations

from collections.abc import Mapping

# Their codes and scales go into the kernels' layout as they are.
EXACT = frozenset({"Q4_0", "Q4_1", "Q5_0", "Q8_0", "IQ4_NL", "MXFP4"})
# Codes as they are, scales of groups in half precision: 0.02 % of the weights' norm.
HALF_SCALES = frozenset({"Q4_K", "IQ4_XS"})
FLOATS: Mapping[str, str] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
VECTORS = 50  # one weight of so many is one of a norm or a router, which stay float32
SCALES, ROUNDED = "exact, scales in half precision", "int8, less than 1 % off"


def weight_fidelity(types: Mapping[str, int], quantization: str, dtype: str) -> dict[str, str]:
    """Type of a file -> how exact it is, the most frequent first; empty without a file.

    ``quantization`` and ``dtype`` are those of the loaded model: "gguf" keeps blocks, "none" makes
    numbers of ``dtype`` of them, and "int8" and "int4" round those again.
    """
    names = sorted(types, key=lambda name: -types[name])
    made = {name: _fidelity(name, quantization, dtype) for name in names}
    if types.get("F32", 0) * VECTORS < sum(types.values()):
        made |= {"F32": "exact"} if "F32" in made else {}
    return made


def _fidelity(name: str, quantization: str, dtype: str) -> str:
    if quantization in ("int8", "int4"):
        return f"{quantization}, rounded anew"
    if quantization == "gguf" and name not in FLOATS:
        if name in EXACT:
            return "exact"
        return SCALES if name in HALF_SCALES else ROUNDED
    is_exact = dtype == "float32" or FLOATS.get(name) == dtype
    return "exact" if is_exact else f"{dtype}"
