"""adapter_config.json of a LoRA adapter, as peft writes it: which layers, how much of each.

What would change the result and cannot be applied is refused, with the name of the key.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers_api.errors import ModelLoadFailed

MAX_RANK = 1024
MAX_PATTERNS, MAX_PATTERN = 10_000, 500  # in a list; characters of one
MAX_REPEATS = 4  # of a pattern: each may cost another factor of a path's length
ALL_LINEAR = "all-linear"
HEADS = ("lm_head", "embed_out", "output_layer")  # which "all-linear" leaves out
# Keys that change what an adapter does in a way that is not applied here.
REFUSED = {
    "alora_invocation_tokens": "it is active from certain tokens on only",
    "arrow_config": "adapters cannot be routed among each other",
    "bdlora_config": "block-diagonal matrices cannot be applied",
    "layer_replication": "the base's layers cannot be repeated",
    "lora_bias": "biases cannot be applied",
    "megatron_config": "layers of Megatron cannot be applied",
    "modules_to_save": "whole layers cannot be replaced; merge the adapter into its base",
    "target_parameters": "parameters outside of linear layers, such as experts, cannot be adapted",
    "trainable_token_indices": "rows of the embedding cannot be replaced",
    "use_bdlora": "block-diagonal matrices cannot be applied",
    "use_dora": "DoRA cannot be applied; merge the adapter into its base",
    "use_qalora": "QALoRA cannot be applied",
}
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # of init_lora_weights


@dataclass(frozen=True)
class AdapterConfig:
    """The part of the file that says how to apply an adapter."""

    rank: int
    alpha: float
    targets: str | tuple[str, ...]  # a pattern, or ends of paths
    excluded: str | tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None  # None: all
    layer_patterns: tuple[str, ...] = ()
    ranks: Mapping[str, int] = field(default_factory=dict)  # by patterns of paths
    alphas: Mapping[str, float] = field(default_factory=dict)
    is_rank_stabilized: bool = False

    def rank_of(self, path: str) -> int:
        """The rank of the layer at ``path``."""
        return self.ranks.get(_first_match(self.ranks, path), self.rank)

    def scale_of(self, path: str) -> float:
        """The factor of the layer's product."""
        rank = self.rank_of(path)
        alpha = self.alphas.get(_first_match(self.alphas, path), self.alpha)
        return alpha / math.sqrt(rank) if self.is_rank_stabilized else alpha / rank

    def targets_layer(self, path: str) -> bool:
        """True where the adapter belongs to the layer at ``path``."""
        if self.excluded and _names(self.excluded, path):
            return False
        if self.targets == ALL_LINEAR:
            return path.rpartition(".")[2] not in HEADS
        if not _names(self.targets, path):
            return False
        if self.layers is None or isinstance(self.targets, str):
            return True
        patterns = self.layer_patterns or (r"[^.]*",)
        matches = (re.match(rf".*\.{pattern}\.(\d+)\.", path) for pattern in patterns)
        number = next((int(match[1]) for match in matches if match), None)
        return number in self.layers


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
        if layers is not None and isinstance(targets, str):
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
        if type(value) not in (int, float) or not math.isfinite(value) or abs(value) > 1e9:
            raise self._wrong(key, "finite numbers")
        return float(value)

    def _targets(self, key: str) -> str | tuple[str, ...]:
        value = self.values.get(key, ())
        if isinstance(value, str):
            return value if value == ALL_LINEAR else self._pattern(key, value)
        if not _is_list(value, str) or not all(len(name) <= MAX_PATTERN for name in value):
            raise self._wrong(key, "a pattern, or a list of names of layers")
        return tuple(value)

    def _layers(self) -> tuple[int, ...] | None:
        value = self.values.get("layers_to_transform")
        numbers = [value] if type(value) is int else value
        if not numbers and numbers != 0:
            return None
        if not _is_list(numbers, int):
            raise self._wrong("layers_to_transform", "a number, or a list of numbers")
        return tuple(numbers)

    def _layer_patterns(self) -> tuple[str, ...]:
        value = self.values.get("layers_pattern", ())
        patterns = [value] if isinstance(value, str) else value
        if not _is_list(patterns, str):
            raise self._wrong("layers_pattern", "a pattern, or a list of patterns")
        return tuple(self._pattern("layers_pattern", each) for each in patterns if each)

    def _by_path(self, key: str) -> list[tuple[str, Any]]:
        value = self.values.get(key, {})
        if not isinstance(value, dict) or len(value) > MAX_PATTERNS:
            raise self._wrong(key, "an object with numbers by patterns of layers")
        return [(self._pattern(key, pattern), number) for pattern, number in value.items()]

    def _pattern(self, key: str, pattern: str) -> str:
        """``pattern``, unless to match a path with it may take long."""
        bare = re.sub(r"\[[^\]]*\]", "c", re.sub(r"\\.", "c", pattern))
        repeats = re.findall(r"[*+{]", bare)
        if len(pattern) > MAX_PATTERN or len(repeats) > MAX_REPEATS or re.search(r"\)[*+{]", bare):
            raise self._wrong(
                key, f"patterns with at most {MAX_REPEATS} repetitions, and none of a group"
            )
        try:
            re.compile(pattern)
        except re.error as error:
            raise self._wrong(key, f"a regular expression ({error})") from None
        return pattern


def _names(targets: str | tuple[str, ...], path: str) -> bool:
    """True where a pattern is all of ``path``, or a name its end."""
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in targets)


def _first_match(patterns: Mapping[str, Any], path: str) -> str:
    """The first pattern that is an end of ``path``; "" where none is."""
    return next((p for p in patterns if re.match(rf"(.*\.)?({p})$", path)), "")


def _is_list(value: Any, kind: type) -> bool:
    is_list = isinstance(value, list | tuple) and len(value) <= MAX_PATTERNS
    return is_list and all(type(each) is kind for each in value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"
