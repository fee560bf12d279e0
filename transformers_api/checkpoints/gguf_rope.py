"""The rope of a GGUF file: how positions are scaled, by its metadata and by tensors of factors.

A tensor of factors holds what the frequency of each pair is divided by. Where Llama 3's formula
gives these numbers they become its parameters, else they stand in the configuration one by one.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any

from transformers_api.checkpoints.headers.gguf_file import GgufHeader
from transformers_api.errors import ModelLoadFailed

FACTORS = "rope_freqs.weight"
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
F32 = 0  # ggml's number of the type
TOLERANCE = 1e-5  # of a factor: they are stored in single precision
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
USUAL = (8.0, 32.0, 16.0)  # factors of Llama 3.1 and 3.2
_BETAS = {"beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}


def apply(config: Any, header: GgufHeader) -> None:
    """Put a file's scaling into ``config.rope_parameters``. Raises ModelLoadFailed."""
    metadata = header.metadata
    prefix = f"{metadata['general.architecture']}.rope.scaling."
    scaling = {
        key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)
    }
    scaled = _scaled(config, header, scaling)
    if not scaled:
        return
    if not isinstance(getattr(config, "rope_parameters", None), dict):
        raise ModelLoadFailed(f"{prefix}type: this architecture's positions cannot be scaled")
    own = config.rope_parameters
    # Gemma's: only layers that see the whole text are scaled
    whole = own.get("full_attention", own)
    if scaled["rope_type"] == whole.get("rope_type"):
        whole.update(scaled)
    else:
        scaled |= {
            name: whole[name] for name in ("rope_theta", "partial_rotary_factor") if name in whole
        }
        whole.clear()
        whole.update(scaled)


def _scaled(config: Any, header: GgufHeader, scaling: dict[str, Any]) -> dict[str, Any]:
    tensors = {tensor.name for tensor in header.tensors}
    if FACTORS in tensors:
        return _by_factors(config, read_factors(header, FACTORS))
    if {LONG, SHORT} <= tensors:
        return _long_rope(config, header, scaling)
    kind, factor = scaling.get("type"), float(scaling.get("factor", 1.0))
    if kind in (None, "none") or (kind == "linear" and factor == 1.0):
        return {}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return _yarn(config, scaling, factor)
    raise ModelLoadFailed(
        f"{header.metadata['general.architecture']}.rope.scaling.type is {kind!r}, which cannot be "
        "read"
    )


def _yarn(config: Any, scaling: dict[str, Any], factor: float) -> dict[str, Any]:
    length = scaling.get("original_context_length") or config.max_position_embeddings
    scaled = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": int(length),
    }
    for name, key in _BETAS.items():
        if key in scaling:
            scaled[name] = float(scaling[key])
    if "attn_factor" in scaling:  # times what the length itself gives
        own = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
        scaled["attention_factor"] = float(scaling["attn_factor"]) * own
    return scaled


def _long_rope(config: Any, header: GgufHeader, scaling: dict[str, Any]) -> dict[str, Any]:
    length = int(scaling.get("original_context_length") or config.max_position_embeddings)
    config.original_max_position_embeddings = length
    scaled = {
        "rope_type": "longrope",
        "long_factor": read_factors(header, LONG),
        "short_factor": read_factors(header, SHORT),
        "original_max_position_embeddings": length,
    }
    if "attn_factor" in scaling:
        scaled["attention_factor"] = float(scaling["attn_factor"])
    return scaled


def _by_factors(config: Any, factors: list[float]) -> dict[str, Any]:
    """Llama 3's parameters, where they give these factors; else the factors themselves."""
    theta, size = float(config.rope_parameters["rope_theta"]), 2 * len(factors)
    for factor in (round(max(factors), 4), *USUAL):  # which no pair of a small head may reach
        llama3 = LLAMA3 | {"rope_type": "llama3", "factor": factor}
        expected = llama3_factors(theta, size, llama3)
        pairs = zip(factors, expected, strict=True)
        if all(math.isclose(own, other, rel_tol=TOLERANCE) for own, other in pairs):
            return llama3
    return {
        "rope_type": "longrope",
        "long_factor": factors,
        "short_factor": factors,
        "original_max_position_embeddings": config.max_position_embeddings,
        "attention_factor": 1.0,
    }


def llama3_factors(theta: float, size: int, parameters: dict[str, Any]) -> list[float]:
    """The divisors of a head's frequencies by Llama 3's formula. ``size``: of what is rotated."""
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    length, factor = parameters["original_max_position_embeddings"], parameters["factor"]
    return [
        _llama3_factor(2 * math.pi * theta ** (index / size), factor, low, high, length)
        for index in range(0, size, 2)
    ]


def _llama3_factor(wave: float, factor: float, low: float, high: float, length: int) -> float:
    if wave < length / high:
        return 1.0
    if wave > length / low:
        return factor
    smooth = (length / wave - low) / (high - low)
    return 1 / ((1 - smooth) / factor + smooth)


def read_factors(header: GgufHeader, name: str) -> list[float]:
    """The numbers of a tensor of factors. Raises ModelLoadFailed unless all are above zero."""
    tensor = next(tensor for tensor in header.tensors if tensor.name == name)
    if tensor.kind != F32 or len(tensor.shape) != 1:
        raise ModelLoadFailed(f"tensor {name} is no row of numbers in single precision")
    with header.files[tensor.file].open("rb") as file:
        file.seek(tensor.offset)
        factors: Sequence[float] = struct.unpack(f"<{tensor.elements}f", file.read(tensor.bytes))
    if not all(math.isfinite(factor) and factor > 0 for factor in factors):
        raise ModelLoadFailed(f"tensor {name} has factors that are not above zero")
    return list(factors)
