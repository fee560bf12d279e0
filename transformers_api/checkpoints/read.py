"""Checkpoints of TinyGPT, niels-gpt and GPT3-dev in their original files, as standard folders.

The family is recognised from the names of the weights (``originals.py`` lists them). Reading is
strict both ways: a weight that is missing, one that is left over and one of another shape are
errors that name it as the original does. Pickles are read as plain weights, never as code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig

from transformers_api.checkpoints import tokenizers
from transformers_api.checkpoints.formats import FAMILIES, Family, State
from transformers_api.checkpoints.headers.originals import ADDED, CONFIGS, HEAD, WRAPPERS
from transformers_api.errors import ModelLoadFailed

LFS_POINTER = b"version https://git-lfs"  # what a file stored elsewhere begins with


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model read from its original file, ready to be saved as a standard folder."""

    family: Family
    config: Any  # a PreTrainedConfig
    weights: State  # by our names, without the tied head
    generation: Mapping[str, Any]
    tokenizer: Any

    @property
    def parameters(self) -> int:
        """The number of weights that will be written."""
        return sum(weight.numel() for weight in self.weights.values())

    def save(self, folder: Path) -> None:
        """Write config.json, generation_config.json, model.safetensors and the tokenizer."""
        new_generation_config: Any = GenerationConfig
        save_file(self.weights, folder / "model.safetensors", metadata={"format": "pt"})
        self.config.save_pretrained(folder)
        new_generation_config(**self.generation).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def read_checkpoint(
    source: Path, family_name: str | None = None, config_file: Path | None = None
) -> Checkpoint:
    """Read a ``.pt`` or ``.pth`` file, or a folder with safetensors. Raises ModelLoadFailed.

    What the weights do not say is taken from ``config_file``, from the checkpoint itself, from a
    config.json beside it, or from the sizes that were published.
    """
    state, own = _read_folder(source) if source.is_dir() else _read_pickle(source)
    state = _plain_names(state, source.name)
    family = _recognise(state, source.name, family_name)
    declared = _read_json(config_file) if config_file else own or _beside(source, family)
    config = family.configure(state, declared)
    config.dtype = str(next(iter(state.values())).dtype).removeprefix("torch.")
    weights = _fitted(family, config, _without_head(family, state), source.name)
    folder = source if source.is_dir() else source.parent
    tokenizer = tokenizers.make(family.tokenizer, folder, config.vocab_size, source.is_dir())
    generation = {
        name: value
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
        if (value := getattr(config, name, None)) is not None
    }
    if family.never_sampled:
        generation["suppress_tokens"] = list(family.never_sampled)
    return Checkpoint(
        family=family,
        config=config,
        weights=weights,
        generation=generation,
        tokenizer=tokenizer,
    )


def _read_pickle(path: Path) -> tuple[State, Mapping[str, Any]]:
    """(weights, the configuration that came with them) of a bare or wrapped state dict."""
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ModelLoadFailed(f"{path.name} is a Git LFS pointer: fetch the file itself")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds for a file that is no checkpoint
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelLoadFailed(f"{path.name} cannot be read as plain weights: {reason}") from error
    if not isinstance(loaded, dict):
        raise ModelLoadFailed(f"{path.name} holds no dict of weights")
    state = next(
        (loaded[name] for name in WRAPPERS if isinstance(loaded.get(name), dict)),
        loaded,
    )
    if not state or not all(isinstance(weight, Tensor) for weight in state.values()):
        raise ModelLoadFailed(f"{path.name} holds no dict of weights")
    configs = [loaded[name] for name in CONFIGS if isinstance(loaded.get(name), dict)]
    return dict(state), configs[0] if configs else {}


def _read_folder(folder: Path) -> tuple[State, Mapping[str, Any]]:
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise ModelLoadFailed(f"{folder} has no weights: no model.safetensors")
    state: State = {}
    try:
        for file in files:
            state |= load_file(file)
    except (SafetensorError, OSError) as error:
        raise ModelLoadFailed(f"{folder.name} cannot be read: {error}") from error
    return state, _read_json(folder / "config.json")


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelLoadFailed(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelLoadFailed(f"{path} is not a JSON object")
    return value


def _beside(source: Path, family: Family) -> Mapping[str, Any]:
    """The config.json beside a bare checkpoint, where it is one of this family."""
    path = source.parent / "config.json"
    config = _read_json(path) if path.is_file() else {}
    return config if family.heads in config else {}


def _plain_names(state: State, name: str) -> State:
    """``state`` by its plain names, without complex buffers, which are computed anew."""
    plain: State = {}
    for key, weight in state.items():
        short = ADDED.sub("", key)
        if short in plain:
            raise ModelLoadFailed(f"{name}: {short} is there twice")
        if not weight.is_complex():
            plain[short] = weight
    return plain


def _recognise(state: State, name: str, family_name: str | None) -> Family:
    fitting = [family for family in FAMILIES if family.is_in(state)]
    if family_name is None and len(fitting) == 1:
        return fitting[0]
    names = ", ".join(family.name for family in FAMILIES)
    if family_name is None:
        raise ModelLoadFailed(
            f"{name}: these weights are of no known family ({names}); the first is "
            f"{next(iter(state), 'missing')}"
        )
    for family in FAMILIES:
        if family.name == family_name:
            if fitting and family not in fitting:
                raise ModelLoadFailed(
                    f"{name} is of the family {fitting[0].name}, not {family_name}"
                )
            return family
    raise ModelLoadFailed(f"{family_name!r} is not a family: expected one of {names}")


def _without_head(family: Family, state: State) -> State:
    """All but the head, which every family ties to its embedding."""
    head = state.get(HEAD)
    if head is not None and not torch.equal(head, state[family.embedding]):
        raise ModelLoadFailed(f"{HEAD} is not {family.embedding}: a tied head was expected")
    return {key: weight for key, weight in state.items() if key != HEAD}


def _fitted(family: Family, config: Any, state: State, name: str) -> State:
    """The weights by our names, each checked against the architecture's own shape."""
    with torch.device("meta"):
        expected = family.model_of(config)(config).state_dict()
    expected.pop(HEAD)
    config.architectures = [family.model_of(config).__name__]
    left, missing, fitted = dict(state), [], {}
    for ours, model in expected.items():
        originals = family.original_names(ours)
        missing += [key for key in originals if key not in left]
        parts = [left.pop(key) for key in originals if key in left]
        if len(parts) != len(originals):
            continue
        weight = parts[0] if len(parts) == 1 else torch.cat(parts)
        weight = weight.T if family.is_transposed(ours, config) else weight
        if weight.shape != model.shape:
            raise ModelLoadFailed(
                f"{name}: {', '.join(originals)} has the shape {list(weight.shape)}, the "
                f"configuration says {list(model.shape)}"
            )
        fitted[ours] = weight.contiguous()
    for what, keys in (("missing", missing), ("not expected", sorted(left))):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise ModelLoadFailed(f"{name}: {what}: {', '.join(keys[:3])}{more}")
    return fitted
