"""The files of encoders, in the format of sentence-transformers.

``modules.json`` lists the steps from text to vector: a transformer, a pooling, and, where vectors
have length one, a normalisation.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers_api.errors import ModelLoadFailed
from transformers_api.serving.models.headers import read_object
from transformers_api.serving.models.preflight import MODULES
from transformers_api.serving.models.spec import Pooling, PoolingMode

STEPS = ("Transformer", "Pooling", "Normalize")
_FLAGS: dict[str, PoolingMode] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}
_ACTIVATIONS = ("Sigmoid", "Identity")
_NAMES: dict[str, PoolingMode] = {"cls": "cls", "mean": "mean", "lasttoken": "last"}


@dataclass(frozen=True, slots=True)
class EncoderFacts:
    """Pooling and length of an encoder."""

    pooling: Pooling
    max_tokens: int | None  # what it was made for, special tokens included


def read_encoder(folder: Path) -> EncoderFacts:
    """The facts in the folder. Raises ModelLoadFailed for what this server would do differently."""
    steps = _steps(folder)
    names = [name for name, _ in steps]
    if names not in (list(STEPS), list(STEPS[:2])):
        raise ModelLoadFailed(
            f"{folder / MODULES}: the steps {', '.join(names)} are not supported, only "
            f"{', '.join(STEPS[:2])} and perhaps {STEPS[2]}"
        )
    shape = _optional(folder / steps[0][1] / "sentence_bert_config.json")
    usage = _optional(folder / "config_sentence_transformers.json")
    for what, value in (
        ("do_lower_case", shape.get("do_lower_case")),
        ("default_prompt_name", usage.get("default_prompt_name")),
    ):
        if value:
            raise ModelLoadFailed(f"{folder}: {what} {value!r} is not supported")
    limit = shape.get("max_seq_length")
    return EncoderFacts(
        Pooling(_mode(folder / steps[1][1] / "config.json"), normalize=len(steps) == len(STEPS)),
        max_tokens=limit if isinstance(limit, int) and limit > 0 else None,
    )


def reads_sigmoid(folder: Path) -> bool:
    """True where a cross encoder's score goes through a sigmoid, which is what an unnamed one does.

    Raises ModelLoadFailed for another function than that or none, and for prompts.
    """
    usage = _optional(folder / "config_sentence_transformers.json")
    config = read_object(folder / "config.json")
    own = config.get("sentence_transformers")
    named = (
        *(usage.get("activation_fn"), own.get("activation_fn") if isinstance(own, dict) else None),
        config.get("sbert_ce_default_activation_function"),
    )
    name = str(next((value for value in named if value), _ACTIVATIONS[0])).rpartition(".")[2]
    if name not in _ACTIVATIONS:
        raise ModelLoadFailed(f"{folder}: the activation {name} is not supported")
    if prompt := usage.get("default_prompt_name"):
        raise ModelLoadFailed(f"{folder}: default_prompt_name {prompt!r} is not supported")
    return name == _ACTIVATIONS[0]


def _steps(folder: Path) -> list[tuple[str, str]]:
    """(kind, folder inside the model's) of each step."""
    path = folder / MODULES
    try:
        listed = json.loads(path.read_bytes())
        steps = [(str(entry["type"]).rpartition(".")[2], str(entry["path"])) for entry in listed]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ModelLoadFailed(f"{path} cannot be read: {error}") from None
    for _, place in steps:
        if ".." in Path(place).parts or Path(place).is_absolute():
            raise ModelLoadFailed(f"{path}: {place!r} is not a folder of the model")
    return steps


def _mode(path: Path) -> PoolingMode:
    config = read_object(path)
    value = config.get("pooling_mode")
    chosen = [value] if isinstance(value, str) else _flags(config)
    modes = _NAMES | _FLAGS
    if len(chosen) != 1 or chosen[0] not in modes:
        raise ModelLoadFailed(
            f"{path}: the pooling {', '.join(chosen) or 'none'} is not supported, only one of "
            f"{', '.join(_NAMES)}"
        )
    return modes[chosen[0]]


def _flags(config: dict[str, Any]) -> list[str]:
    return [name for name, value in config.items() if name.startswith("pooling_mode_") and value]


def _optional(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}
