"""The configuration of a model in a GGUF file, as transformers has it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from transformers import CONFIG_MAPPING
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from transformers_api.checkpoints.headers.gguf_file import GgufTensor
from transformers_api.errors import ModelLoadFailed

SHORT = 4096  # entries of an array; longer ones are vocabularies
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
FREQUENCIES = "rope_freqs.weight"  # divisors of the rope's frequencies
LONG, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
IN_CONFIG = (FREQUENCIES, LONG, SHORT_FACTORS)  # tensors that are no weights


def read_config(
    metadata: Mapping[str, Any],
    tensors: Sequence[GgufTensor],
    floats: Mapping[str, numpy.ndarray[Any, Any]],
) -> tuple[Any, dict[str, Any]]:
    """The configuration, and the fields that transformers reads out of the file.

    ``floats``: the numbers of those tensors of ``IN_CONFIG`` that the file has. Raises
    ModelLoadFailed for an architecture that transformers does not read from GGUF files.
    """
    fields = _fields(metadata, tensors)
    if isinstance(tokens := metadata.get("tokenizer.ggml.tokens"), list):
        fields.setdefault("vocab_size", len(tokens))
    if FREQUENCIES in floats:
        fields["rope_scaling"] = _scaled_frequencies(fields, floats[FREQUENCIES])
    elif scaling := _scaling(metadata, floats):
        fields.setdefault("rope_scaling", scaling)
    config = CONFIG_MAPPING[fields["model_type"]].from_dict(dict(fields))
    return config, fields


def _fields(metadata: Mapping[str, Any], tensors: Sequence[GgufTensor]) -> dict[str, Any]:
    """The fields as transformers reads them, from a file with the same header and no weights."""
    import gguf

    architecture = str(metadata["general.architecture"])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "header.gguf"
        writer = gguf.GGUFWriter(path, architecture)
        for key, value in metadata.items():
            if key not in ("general.architecture", "general.alignment"):
                _add(writer, key, value)
        for tensor in tensors:
            writer.add_tensor(tensor.name, numpy.zeros(1, numpy.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        try:
            read: Any = load_gguf_checkpoint
            fields: dict[str, Any] = read(path)["config"]
        except (ValueError, KeyError, IndexError) as error:
            raise ModelLoadFailed(
                f"general.architecture is {architecture!r}, which the installed transformers does "
                f"not read from GGUF files ({error}); take the model's safetensors"
            ) from error
    if fields.get("model_type") not in CONFIG_MAPPING:
        raise ModelLoadFailed(f"general.architecture {architecture!r} is no model of transformers")
    return fields


def _add(writer: Any, key: str, value: Any) -> None:
    from gguf import GGUFValueType as Kind

    kinds = {bool: Kind.BOOL, int: Kind.INT64, float: Kind.FLOAT64, str: Kind.STRING}
    if isinstance(value, list):
        if value and len(value) <= SHORT and type(value[0]) in kinds:
            writer.add_key_value(key, value, Kind.ARRAY, kinds[type(value[0])])
    elif type(value) in kinds:
        writer.add_key_value(key, value, kinds[type(value)])


def _scaled_frequencies(
    fields: Mapping[str, Any], divisors: numpy.ndarray[Any, Any]
) -> dict[str, Any]:
    """The rope whose frequencies are divided by ``divisors``: Llama 3's rule, or one by one."""
    ruled = {"rope_type": "llama3", "factor": float(divisors.max()), **LLAMA3}
    config = CONFIG_MAPPING[fields["model_type"]].from_dict({**fields, "rope_scaling": dict(ruled)})
    plain = CONFIG_MAPPING[fields["model_type"]].from_dict(dict(fields))
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    exponents = torch.arange(0, 2 * len(divisors), 2) / (2 * len(divisors))
    own = 1.0 / plain.rope_parameters["rope_theta"] ** exponents / torch.from_numpy(divisors.copy())
    if scaled.shape == own.shape and torch.allclose(scaled, own, rtol=1e-4):
        return ruled
    factors = divisors.tolist()
    return {
        "rope_type": "longrope",
        "short_factor": factors,
        "long_factor": factors,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": int(fields["max_position_embeddings"]),
    }


def _scaling(
    metadata: Mapping[str, Any], floats: Mapping[str, numpy.ndarray[Any, Any]]
) -> dict[str, Any] | None:
    """The rope for longer texts than the model was made for, where the metadata names one."""
    prefix = f"{metadata['general.architecture']}.rope.scaling"
    kind = metadata.get(f"{prefix}.type")
    made: dict[str, Any] = {}
    if (original := metadata.get(f"{prefix}.original_context_length")) is not None:
        made["original_max_position_embeddings"] = int(original)
    if LONG in floats and SHORT_FACTORS in floats:
        made |= {"rope_type": "longrope", "long_factor": floats[LONG].tolist()}
        made["short_factor"] = floats[SHORT_FACTORS].tolist()
        if (factor := metadata.get(f"{prefix}.attn_factor")) is not None:
            made["attention_factor"] = float(factor)
        return made
    if kind in ("linear", "yarn") and (factor := metadata.get(f"{prefix}.factor")) is not None:
        return made | {"rope_type": kind, "factor": float(factor)}
    return None
