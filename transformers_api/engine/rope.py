"""Rotary embeddings whose factors depend on how long the sequence is (LongRoPE).

transformers takes the length from the positions of a pass: the largest of a batch, or a chunk's
instead of its prompt's. Here a pass can be told the length, and its sequences are of one kind.
"""

from __future__ import annotations

import contextvars
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

LENGTH_DEPENDENT = {"dynamic", "longrope"}
_length: contextvars.ContextVar[int | None] = contextvars.ContextVar("length", default=None)


@contextmanager
def sequence_length(tokens: int | None) -> Iterator[None]:
    """While it lasts, passes are of sequences of so many tokens. None: as their positions say."""
    token = _length.set(tokens)
    try:
        yield
    finally:
        _length.reset(token)


def follow_lengths(model: nn.Module) -> None:
    """Make the model's rotary embeddings obey ``sequence_length``."""
    for module in model.modules():
        if original_lengths(module):
            module.register_forward_pre_hook(_with_last_position, with_kwargs=True)
            module.register_forward_hook(_without_last_position)


def original_lengths(module: nn.Module) -> set[int]:
    """Lengths of a rotary embedding beyond which it takes its long factors; empty: there are none.

    Dynamic NTK scaling is none of these: it begins beyond the longest sequence that is served.
    """
    types = getattr(module, "rope_type", None)
    parameters = getattr(getattr(module, "config", None), "rope_parameters", None)
    if not types or not isinstance(parameters, dict):
        return set()
    own = [parameters[name] for name in types] if isinstance(types, dict) else [parameters]
    return {
        int(each["original_max_position_embeddings"])
        for each in own
        if each and each.get("rope_type") == "longrope"
    }


def switching_lengths(model: nn.Module, window: int) -> set[int]:
    """Lengths below ``window`` at which factors change, in any part of the model."""
    lengths = {n for module in model.modules() for n in original_lengths(module)}
    return {n for n in lengths if n < window}


@contextmanager
def fixed_factors(model: nn.Module, is_long: bool) -> Iterator[None]:
    """While it lasts, rotary embeddings have the factors of short or of long sequences.

    They do not look at positions meanwhile, which a recorded pass could not.
    """
    changed: list[tuple[Any, Any, dict[str, Tensor]]] = []
    modules: list[Any] = list(model.modules())
    try:
        for module in modules:
            types: Any = getattr(module, "rope_type", None)
            own = set(types.values()) if isinstance(types, dict) else {types}
            if not own & LENGTH_DEPENDENT:
                continue
            _set_factors(module, is_long)
            names = [name for name in module._buffers if name.endswith("inv_freq")]
            buffers = {name: getattr(module, name) for name in names}
            changed.append((module, types, buffers))
            for name, factors in buffers.items():
                setattr(module, name, factors.clone())
            is_dict = isinstance(types, dict)
            module.rope_type = dict.fromkeys(types, "default") if is_dict else "default"
        yield
    finally:
        for module, types, buffers in changed:
            module.rope_type = types
            for name, factors in buffers.items():
                setattr(module, name, factors)


def _set_factors(module: Any, is_long: bool) -> None:
    """Let a rotary embedding compute the factors that it would for a sequence of this kind."""
    lengths = original_lengths(module)
    if not lengths:
        return  # dynamic scaling begins beyond what is served
    kinds = (
        [{"layer_type": each} for each in module.rope_type]
        if isinstance(module.rope_type, dict)
        else [{}]
    )
    with sequence_length(max(lengths) + is_long):
        for kind in kinds:
            module(torch.zeros(1), position_ids=torch.zeros(1, 1, dtype=torch.int64), **kind)


def reads_again(model: Any, original: int) -> bool:
    """True where ``generate()`` drops its cache when a sequence grows beyond ``original``."""

    class Full(DynamicCache):
        def get_seq_length(self, layer_idx: int = 0) -> int:
            return original

    ids = torch.zeros(1, original + 1, dtype=torch.long, device=model.device)
    inputs = model.prepare_inputs_for_generation(
        ids,
        past_key_values=Full(config=model.config.get_text_config(decoder=True)),
        attention_mask=torch.ones_like(ids),
        use_cache=True,
        next_sequence_length=1,
        is_first_iteration=False,
    )
    return inputs.get("past_key_values") is None


def _with_last_position(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Add the sequence's last position to those of the pass (…, T): the module reads it."""
    length = _length.get()
    if length is None:
        return None
    positions: Tensor = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
    last = positions.new_full((*positions.shape[:-1], 1), length - 1)
    extended = torch.cat([positions, last], -1)
    if "position_ids" in kwargs:
        return args, {**kwargs, "position_ids": extended}
    return (args[0], extended, *args[2:]), kwargs


def _without_last_position(module: nn.Module, args: Any, output: Any) -> Any:
    """Cut the added position from what comes out: (…, T, D), one or several."""
    if _length.get() is None:
        return None
    if isinstance(output, Tensor):
        return output[..., :-1, :]
    return tuple(each[..., :-1, :] for each in output)
