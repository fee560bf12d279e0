"""Weights that do not fit a configuration, as an error that names file, tensor and shapes.

Buffers that older versions of transformers saved beside the weights (causal masks, rotary
frequencies, positions) fit no model of today and mean nothing: a model computes its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from transformers_api.checkpoints.headers.text_names import text_weights
from transformers_api.errors import ModelLoadFailed

LISTED = 3
_MASKS = re.compile(r"(.*\.)?(attn|attention|self_attn|self_attention)\.(bias|causal_mask)")
_SCALARS = re.compile(r"(.*\.)?(attn|attention|self_attn|self_attention)\.masked_bias")
_TABLES = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|rotary_emb\.(cos|sin)_cached|position_ids)")

Stored = Mapping[str, tuple[str, list[int]]]  # tensor name -> (file name, shape)


def check_weights(info: Mapping[str, Any], folder: Path, *, is_part: bool = False) -> None:
    """Raise ModelLoadFailed unless every weight of the file is in the model, and the reverse.

    ``is_part``: the model is the language part of the file; the weights of its towers are not used.
    """
    stored = stored_tensors(folder) if any(info.values()) else {}
    if wrong := sorted(info.get("mismatched_keys") or (), key=str):
        raise ModelLoadFailed(f"The weights do not fit the configuration: {_shapes(wrong, stored)}")
    for kind in ("missing_keys", "unexpected_keys"):
        names = sorted(str(name) for name in info.get(kind) or ())
        if kind == "unexpected_keys":
            names = [name for name in names if not is_old_buffer(name, stored)]
            if is_part:
                own = text_weights(stored)  # other names are those that they got while loading
                names = [name for name in names if name in own or name not in stored]
        if names:
            entries = [f"{name}{_place(name, stored)}" for name in names[:LISTED]]
            raise ModelLoadFailed(
                f"The weights do not fit the configuration: {kind.replace('_', ' ')}: "
                f"{', '.join(entries)}{_more(names)}"
            )


def is_old_buffer(name: str, stored: Stored) -> bool:
    """True for a mask or a table that a model computes, by its name and its shape."""
    if name not in stored:
        return False
    shape = stored[name][1]
    if _MASKS.fullmatch(name):
        return len(shape) in (2, 4) and shape[-1] == shape[-2] and math.prod(shape[:-2]) == 1
    if _SCALARS.fullmatch(name):
        return math.prod(shape) == 1
    return _TABLES.fullmatch(name) is not None


def _shapes(wrong: list[Any], stored: Stored) -> str:
    entries = [
        f"{name}{_place(str(name), stored)} has the shape {list(of_file)}, the configuration says "
        f"{list(of_model)}"
        for name, of_file, of_model in wrong[:LISTED]
    ]
    return "; ".join(entries) + _more(wrong)


def _place(name: str, stored: Stored) -> str:
    return f" ({stored[name][0]})" if name in stored else ""


def _more(names: list[Any]) -> str:
    return f" and {len(names) - LISTED} more" if len(names) > LISTED else ""


def stored_tensors(folder: Path) -> Stored:
    """The tensors of a folder by the headers of its safetensors."""
    stored = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                stored[name] = path.name, list(file.get_slice(name).get_shape())
    return stored
