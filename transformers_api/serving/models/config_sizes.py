"""Sizes that config.json promises, held against those in the weights' headers.

A model is built by its configuration before a weight is read, so a number there that the weights
do not bear out (a million layers, a vocabulary of 2^40) would take the memory and the time of one.
No architecture is known here: a size is recognised by its field's name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers_api.checkpoints.headers.safetensors_file import Tensor
from transformers_api.errors import ModelLoadFailed
from transformers_api.serving.models.headers import read_object

MAX_POSITIONS = 1 << 28  # the weights of rotary models do not say how long a text may be
MAX_NESTING = 8
# Allowed where the weights do not show the number itself: layers that share weights, layers of a
# part that is left out (a vision tower), experts in one flat matrix, labels.
SLACK_LAYERS, SLACK_EXPERTS, SLACK_SIZE, SLACK_FACTOR = 512, 1 << 14, 1 << 20, 8

_LAYERS = re.compile(r"n_layers?|num_(hidden_|transformer_)?layers|num_blocks|n_blocks?")
_WIDTHS = re.compile(r"vocab_size|hidden_size|n_embd|d_model")
_POSITIONS = re.compile(r".*(position|ctx|context|window|length).*")
_EXPERTS = re.compile(r".*experts?")
_SIZES = re.compile(r"(n|num|d)_.*|.*(_size|_dims?|_heads|_layers|_rank|_width|_inner)")
# They say nothing of what is built, or by names of their own.
_OTHER_SECTIONS = re.compile(
    r"quantization_config|rope_.*|task_specific_params|auto_map|id2label|label2id|generation_.*"
)
_TEXT_SECTIONS = ("", "text_config", "llm_config", "language_config", "decoder")
_LOOPS = re.compile(r".*(cycles?|loops?|recurrences?|ut_steps)")  # layers that run several times
_INDEX = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True, slots=True)
class _Limits:
    layers: int  # 0: no names with an index
    is_looped: bool
    experts: int
    width: int


def check_sizes(path: Path, tensors: Sequence[Tensor]) -> None:
    """Raise ModelLoadFailed for a configuration of more than ``tensors``, naming the field."""
    config = read_object(path)
    indices = [int(index) for tensor in tensors for index in _INDEX.findall(tensor.name)]
    stacked = [tensor.shape[0] for tensor in tensors if len(tensor.shape) == 3]
    limits = _Limits(
        layers=max(indices, default=-1) + 1,
        is_looped=any(_LOOPS.fullmatch(name) for name in config),
        experts=max([*indices, *stacked, SLACK_EXPERTS]),
        width=max((size for tensor in tensors for size in tensor.shape), default=0),
    )
    is_packed = "quantization_config" in config
    for section, name, value in _fields(config):
        field = f"{section}.{name}" if section else name
        limit = _limit(section, name, limits, is_packed)
        if limit is None:
            continue
        for number in value if isinstance(value, list) else [value]:
            _check_number(f"{path}: {field}", number, limit, name)


def _fields(config: Mapping[str, Any], section: str = "") -> Iterator[tuple[str, str, Any]]:
    """(section, name, value) of each field that might be a size."""
    if section.count(".") >= MAX_NESTING:
        raise ModelLoadFailed(f"config.json: {section} is nested too deep")
    for name, value in config.items():
        if not isinstance(value, dict):
            yield section, name, value
        elif not _OTHER_SECTIONS.fullmatch(name):
            yield from _fields(value, f"{section}.{name}" if section else name)


def _limit(section: str, name: str, limits: _Limits, is_packed: bool) -> int | None:
    """The largest number that the weights allow; None for what is no size."""
    is_text = section in _TEXT_SECTIONS
    if _LAYERS.fullmatch(name):
        shared = max(limits.layers, SLACK_LAYERS)
        is_shown = is_text and limits.layers > 1 and not limits.is_looped
        return limits.layers if is_shown else shared
    if _WIDTHS.fullmatch(name) and is_text and not is_packed:
        return limits.width
    if _POSITIONS.fullmatch(name):
        return MAX_POSITIONS
    if name.endswith(("token_id", "token_index")):
        return None
    if _EXPERTS.fullmatch(name):
        return limits.experts
    if _WIDTHS.fullmatch(name) or _SIZES.fullmatch(name):
        return max(limits.width * SLACK_FACTOR, SLACK_SIZE)
    return None


def _check_number(where: str, number: Any, limit: int, name: str) -> None:
    is_core = _LAYERS.fullmatch(name) or _WIDTHS.fullmatch(name)
    if number is None or (isinstance(number, (bool, str, float)) and not is_core):
        return  # not a size after all
    if type(number) is not int or number < (1 if is_core else -1):
        raise ModelLoadFailed(f"{where} is {number!r}, which is no size")
    if number > limit:
        raise ModelLoadFailed(
            f"{where} is {number}, but the weights are those of {limit} at most: the file is "
            "damaged, or belongs to other weights"
        )
