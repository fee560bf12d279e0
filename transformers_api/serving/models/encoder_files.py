"""The files of encoders, in the format of sentence-transformers.

``modules.json`` lists the steps from text to vector: a transformer, a pooling, layers that the
vector goes through, and, where vectors have length one, a normalisation.
``config_sentence_transformers.json`` has the prompts that stand before texts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from transformers_api.errors import ModelLoadFailed
from transformers_api.serving.models.headers import is_path, read_object
from transformers_api.serving.models.preflight import MODULES, PICKLES, WEIGHTS
from transformers_api.serving.models.spec import (
    Pooling,
    PoolingMode,
    Prompts,
    Similarity,
    StepKind,
    VectorStep,
)

USAGE = "config_sentence_transformers.json"
# The names that the first step's own file has had.
SHAPES = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
_STEPS: dict[str, StepKind] = {
    "Dense": "dense",
    "LayerNorm": "layer_norm",
    "Normalize": "normalize",
}
_NOTHING = ("Dropout",)  # of steps that do nothing once a model is trained
# In the order in which sentence-transformers puts several one after the other.
_FLAGS: dict[str, PoolingMode] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "last",
}
_NAMES: dict[str, PoolingMode] = {**{mode: mode for mode in _FLAGS.values()}, "lasttoken": "last"}
_ACTIVATIONS = ("Sigmoid", "Identity")
# Of a Dense step: activations by torch's names.
DENSE_ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "SiLU", "Sigmoid", "Softmax", "Softplus")


@dataclass(frozen=True, slots=True)
class EncoderFacts:
    """The facts in an encoder's files."""

    pooling: Pooling
    max_tokens: int | None  # what it was made for, special tokens included
    steps: tuple[VectorStep, ...] = ()  # between the pooling and the normalisation
    prompts: Prompts = Prompts()  # noqa: RUF009 - it is frozen
    similarity: Similarity = "cosine"
    lowercase: bool = False  # texts become small letters first


def read_encoder(folder: Path) -> EncoderFacts:
    """The facts in the folder. Raises ModelLoadFailed for what this server would do differently."""
    steps = _steps(folder)
    names = [name for name, _ in steps]
    supported = ("Transformer", "Pooling", *_STEPS, *_NOTHING)
    if names[:2] != ["Transformer", "Pooling"] or not {*names[2:]} <= {*_STEPS, *_NOTHING}:
        raise ModelLoadFailed(
            f"{folder / MODULES}: the steps {', '.join(names)} are not supported, only "
            f"{supported[0]}, {supported[1]} and then {', '.join(supported[2:])}"
        )
    if steps[0][1] not in ("", "."):
        raise ModelLoadFailed(
            f"{folder / MODULES}: the transformer lies in {steps[0][1]!r}, not in the folder itself"
        )
    after = [_step(folder, name, place) for name, place in steps[2:] if name not in _NOTHING]
    normalizes = bool(after) and after[-1].kind == "normalize"
    shape = next((_optional(folder / name) for name in SHAPES if (folder / name).is_file()), {})
    usage = _optional(folder / USAGE)
    limit = shape.get("max_seq_length")
    mode, include_prompt = _pooling(folder / steps[1][1] / "config.json")
    return EncoderFacts(
        Pooling(mode, normalizes, include_prompt),
        max_tokens=limit if isinstance(limit, int) and limit > 0 else None,
        steps=tuple(after[:-1] if normalizes else after),
        prompts=_prompts(folder / USAGE, usage),
        similarity=_similarity(folder / USAGE, usage),
        lowercase=bool(shape.get("do_lower_case")),
    )


def reads_sigmoid(folder: Path) -> bool:
    """True where a cross encoder's score goes through a sigmoid, which is what an unnamed one does.

    Raises ModelLoadFailed for another function than that or none, and for prompts.
    """
    usage = _optional(folder / USAGE)
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
        if not is_path(place) or ".." in Path(place).parts or Path(place).is_absolute():
            raise ModelLoadFailed(f"{path}: {place!r} is not a folder of the model")
    return steps


def _step(folder: Path, name: str, place: str) -> VectorStep:
    """A step after the pooling, whose files are checked."""
    kind, path = _STEPS[name], folder / place
    config = _optional(path / "config.json")
    named = [config.get(field) for field in ("module_input_name", "module_output_name")]
    if not all(each in (None, "sentence_embedding") for each in named):
        raise ModelLoadFailed(f"{path}: a step for single tokens is not supported")
    if kind == "normalize":
        return VectorStep(kind, path, config)
    activation = str(config.get("activation_function") or "Tanh").rpartition(".")[2]
    if kind == "dense" and activation not in DENSE_ACTIVATIONS:
        raise ModelLoadFailed(f"{path}: the activation {activation} is not supported")
    if config.get("use_residual"):
        raise ModelLoadFailed(f"{path}: use_residual is not supported")
    if not (path / WEIGHTS).is_file():
        pickles = [file.name for pattern in PICKLES for file in path.glob(pattern)]
        own = f", only in the pickle format ({pickles[0]}), which is refused" if pickles else ""
        raise ModelLoadFailed(f"{path} has no {WEIGHTS}{own}")
    return VectorStep(kind, path, config)


def _pooling(path: Path) -> tuple[PoolingMode | tuple[PoolingMode, ...], bool]:
    config = read_object(path)
    value = config.get("pooling_mode")
    if isinstance(value, str):
        chosen = [value]
    elif isinstance(value, list) and value:
        chosen = [str(each) for each in value]
    else:
        chosen = _flags(config)
    names: dict[str, PoolingMode] = _NAMES | _FLAGS
    if not chosen or not {*chosen} <= names.keys():
        raise ModelLoadFailed(
            f"{path}: the pooling {', '.join(chosen) or 'none'} is not supported, only "
            f"{', '.join(_NAMES)}"
        )
    modes = tuple(names[each] for each in chosen)
    return modes[0] if len(modes) == 1 else modes, config.get("include_prompt") is not False


def _flags(config: dict[str, Any]) -> list[str]:
    active = [name for name, value in config.items() if name.startswith("pooling_mode_") and value]
    order = list(_FLAGS)
    return sorted(active, key=lambda name: order.index(name) if name in order else len(order))


def _prompts(path: Path, usage: dict[str, Any]) -> Prompts:
    texts = usage.get("prompts") or {}
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
        raise ModelLoadFailed(f"{path}: prompts is no object of texts")
    default = usage.get("default_prompt_name")
    if default is not None and not (isinstance(default, str) and default in texts):
        raise ModelLoadFailed(f"{path}: default_prompt_name {default!r} is none of its prompts")
    return Prompts(texts, default)


def _similarity(path: Path, usage: dict[str, Any]) -> Similarity:
    names: dict[str, Similarity] = {name: name for name in get_args(Similarity)}
    name = usage.get("similarity_fn_name") or "cosine"
    if not isinstance(name, str) or name not in names:
        raise ModelLoadFailed(f"{path}: the similarity {name!r} is none of {', '.join(names)}")
    return names[name]


def _optional(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}
