"""adapter_config.json of a LoRA adapter, as peft writes it: which layers, how much of each.

What would change the result and cannot be applied is refused, with the name of the key.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers_api.checkpoints.headers.path_pattern import MAX_PATTERN, PathPattern
from transformers_api.errors import ModelLoadFailed

MAX_RANK = 1024
MAX_NAMES, MAX_PATTERNS = 10_000, 1000  # in a list; each pattern is held against each layer
MAX_ALPHA = 1e9
ALL_LINEAR = frozenset({"all-linear"})
_LAYER = re.compile(r"\.(\d{1,9})\.")
HEADS = ("lm_head", "embed_out", "output_layer")  # which "all-linear" leaves out
# Keys that change what an adapter does in a way that is not applied here.
REFUSED = {
    "alora_invocation_tokens": "it is active from certain tokens on only",
    "arrow_config": "adapters cannot be routed among each other",
    "bdlora_config": "block-diagonal matrices cannot be applied",
    "kasa_config": "KaSA changes the base's own weights; merge the adapter into it",
    "layer_replication": "the base's layers cannot be repeated",
    "lora_bias": "biases cannot be applied",
    "megatron_config": "layers of Megatron cannot be applied",
    "modules_to_save": "whole layers cannot be replaced; merge the adapter into its base",
    "monteclora_config": "the samples of MonteCLoRA cannot be applied",
    "target_parameters": "parameters outside of linear layers, such as experts, cannot be adapted",
    "trainable_token_indices": "rows of the embedding cannot be replaced",
    "use_bdlora": "block-diagonal matrices cannot be applied",
    "use_qalora": "QALoRA cannot be applied",
}
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # of init_lora_weights


Targets = PathPattern | frozenset[str]  # of whole paths, or their ends


@dataclass(frozen=True)
class AdapterConfig:
    """The part of the file that says how to apply an adapter."""

    rank: int
    alpha: float
    targets: Targets
    excluded: Targets = frozenset()
    layers: frozenset[int] | None = None  # None: all
    layer_patterns: tuple[PathPattern, ...] = ()
    ranks: Mapping[PathPattern, int] = field(default_factory=dict)
    alphas: Mapping[PathPattern, float] = field(default_factory=dict)
    is_rank_stabilized: bool = False
    has_magnitudes: bool = False  # DoRA

    def rank_of(self, path: str) -> int:
        """The rank of the layer at ``path``."""
        return next((own for p, own in self.ranks.items() if p.is_end(path)), self.rank)

    def scale_of(self, path: str) -> float:
        """The factor of the layer's product."""
        rank = self.rank_of(path)
        alpha = next((own for p, own in self.alphas.items() if p.is_end(path)), self.alpha)
        return alpha / math.sqrt(rank) if self.is_rank_stabilized else alpha / rank

    def targets_layer(self, path: str) -> bool:
        """True where the adapter belongs to the layer at ``path``."""
        if _names(self.excluded, path):
            return False
        if self.targets == ALL_LINEAR:
            return path.rpartition(".")[2] not in HEADS
        if not _names(self.targets, path):
            return False
        return self.layers is None or self._layer_of(path) in self.layers

    def _layer_of(self, path: str) -> int | None:
        """The number after the last name of a list of layers in ``path``."""
        dots = [at for at, character in enumerate(path) if character == "."]
        for pattern in self.layer_patterns:
            for dot in reversed(dots):
                for end in pattern.ends(path, dot + 1):
                    if match := _LAYER.match(path, end):
                        return int(match[1])
        return None


def parse_adapter_config(config: Mapping[str, Any], where: str) -> AdapterConfig:
    """The configuration in a file's object; ``where``: the file, for messages.

    Raises ModelLoadFailed, naming the key.
    """
    return _Parser(config, where).config()


class _Parser:
    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.values = {key: value for key, value in config.items() if value is not None}
        self.where = where

    def config(self) -> AdapterConfig:
        self._refuse()
        rank = self._rank("r", self.values.get("r", 8))
        layers = self._layers()
        targets = self._targets("target_modules")
        if not targets:
            raise self._wrong("target_modules", "a pattern, or a list of names of layers")
        if layers is not None and (isinstance(targets, PathPattern) or targets == ALL_LINEAR):
            raise self._wrong("layers_to_transform", "used with a list of target_modules only")
        return AdapterConfig(
            rank=rank,
            alpha=self._alpha("lora_alpha", self.values.get("lora_alpha", 8)),
            targets=targets,
            excluded=self._targets("exclude_modules"),
            layers=layers,
            layer_patterns=self._layer_patterns(),
            ranks={k: self._rank("rank_pattern", v) for k, v in self._by_path("rank_pattern")},
            alphas={k: self._alpha("alpha_pattern", v) for k, v in self._by_path("alpha_pattern")},
            is_rank_stabilized=self._flag("use_rslora"),
            has_magnitudes=self._flag("use_dora"),
        )

    def _refuse(self) -> None:
        kind = self.values.get("peft_type", "LORA")
        if kind != "LORA":
            raise ModelLoadFailed(f"{self.where}: peft_type {_short(kind)}: only LORA is served")
        for key, reason in REFUSED.items():
            if self.values.get(key):
                raise ModelLoadFailed(f"{self.where}: {key}: {reason}")
        if self.values.get("bias", "none") != "none":
            bias = _short(self.values["bias"])
            raise ModelLoadFailed(f"{self.where}: bias {bias}: biases cannot be applied")
        init = self.values.get("init_lora_weights", True)
        if isinstance(init, str) and init.lower().startswith(CHANGES_BASE):
            raise ModelLoadFailed(
                f"{self.where}: init_lora_weights {_short(init)} changes the base's own weights; "
                "save the adapter with path_initial_model_for_weight_conversion"
            )
        self._flag("fan_in_fan_out")  # how the base stores its weights, which it says itself

    def _wrong(self, key: str, expected: str) -> ModelLoadFailed:
        value = _short(self.values.get(key))
        return ModelLoadFailed(f"{self.where}: {key} {value} is not allowed: expected {expected}")

    def _flag(self, key: str) -> bool:
        value = self.values.get(key, False)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def _rank(self, key: str, value: Any) -> int:
        if type(value) is not int or not 1 <= value <= MAX_RANK:
            raise self._wrong(key, f"ranks from 1 to {MAX_RANK}")
        return value

    def _alpha(self, key: str, value: Any) -> float:
        if type(value) not in (int, float) or not abs(value) <= MAX_ALPHA:
            raise self._wrong(key, f"finite numbers up to {MAX_ALPHA:.0f}")
        return float(value)

    def _targets(self, key: str) -> Targets:
        value = self.values.get(key, ())
        if isinstance(value, str):
            return ALL_LINEAR if value in ALL_LINEAR else self._pattern(key, value)
        if not _is_list(value, str) or not all(len(name) <= MAX_PATTERN for name in value):
            raise self._wrong(key, "a pattern, or a list of names of layers")
        return frozenset(value)

    def _layers(self) -> frozenset[int] | None:
        value = self.values.get("layers_to_transform")
        numbers = [value] if type(value) is int else value
        if not numbers and numbers != 0:
            return None
        if not _is_list(numbers, int):
            raise self._wrong("layers_to_transform", "a number, or a list of numbers")
        return frozenset(numbers)

    def _layer_patterns(self) -> tuple[PathPattern, ...]:
        key = "layers_pattern"
        value = self.values.get(key, ())
        patterns = [value] if isinstance(value, str) else value
        if not _is_list(patterns, str) or len(patterns) > MAX_PATTERNS:
            raise self._wrong(key, "a pattern, or a list of patterns")
        return tuple(self._pattern(key, each) for each in patterns if each) or (_ANY_NAME,)

    def _by_path(self, key: str) -> list[tuple[PathPattern, Any]]:
        value = self.values.get(key, {})
        if not isinstance(value, dict) or len(value) > MAX_PATTERNS:
            raise self._wrong(key, f"an object with numbers by up to {MAX_PATTERNS} patterns")
        return [(self._pattern(key, pattern), number) for pattern, number in value.items()]

    def _pattern(self, key: str, pattern: str) -> PathPattern:
        try:
            return PathPattern(pattern)
        except ValueError as error:
            raise self._wrong(key, f"a regular expression that is read here ({error})") from None


_ANY_NAME = PathPattern(r"[^.]*")


def _names(targets: Targets, path: str) -> bool:
    """True where a pattern is all of ``path``, or a name its end."""
    if isinstance(targets, PathPattern):
        return targets.is_whole(path)
    parts = path.split(".")
    return any(".".join(parts[at:]) in targets for at in range(len(parts)))


def _is_list(value: Any, kind: type) -> bool:
    is_list = isinstance(value, list | tuple) and len(value) <= MAX_NAMES
    return is_list and all(type(each) is kind for each in value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"
