"""Edits of modules through the runner that serves, beside hooks of a plain copy of the model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from transformers_api.engine.base import SamplingParams, SequenceRequest, TokenStream
from transformers_api.engine.batch import Batch
from transformers_api.engine.llm_engine import BatchingEngine
from transformers_api.engine.places import LayerPlaces, model_places
from transformers_api.engine.runners.edited_modules import ModuleEdit
from transformers_api.engine.runners.model_runner import innermost
from transformers_api.engine.sequence import Sequence

Change = Callable[[Tensor], Tensor]
PROMPTS = [[5, 6, 7, 8, 9], [11, 12, 13, 14, 15], [21, 22, 23, 24, 25]]
NEXT = [31, 32, 33]
EDITED = 1  # of these rows


def read(
    engine: BatchingEngine, backend: Any, changes: Mapping[tuple[str, str], Change]
) -> list[Tensor]:
    """Logits (3, V) of prompts and of a step after them; ``changes`` of one row's tokens."""
    runner = innermost(engine.runner)

    def visit(model: Any) -> list[Tensor]:
        sequences = [_sequence(ids, slot) for slot, ids in enumerate(PROMPTS)]
        runner.cache.reserve(len(PROMPTS), 16)
        made = []
        for widths in ([len(ids) for ids in PROMPTS], [1] * len(NEXT)):
            edits = [
                ModuleEdit(name, side, _of_row(change, widths))
                for (name, side), change in changes.items()
            ]
            with ExitStack() as stack:
                if edits:
                    stack.enter_context(backend.editing(model, edits))
                made.append(runner.forward(Batch(sequences, widths))[:, -1].clone())
            for seq, width, token in zip(sequences, widths, NEXT, strict=True):
                seq.num_cached += width
                seq.tokens.append(token)
        runner.clear()
        return made

    return engine.call(visit).result()


def expected(model: Any, changes: Mapping[tuple[str, str], Change]) -> list[Tensor]:
    """The same of the edited row (V,), by torch's own hooks, all tokens at once."""
    own = copy.deepcopy(model)
    for (name, side), change in changes.items():
        module = own.get_submodule(name)
        if side == "in":
            module.register_forward_pre_hook(lambda _, args, c=change: (c(args[0]), *args[1:]))
        else:
            module.register_forward_hook(lambda _, _args, out, c=change: _first(out, c))
    ids = torch.tensor([PROMPTS[EDITED] + NEXT[EDITED : EDITED + 1]])
    with torch.no_grad():
        logits = own(input_ids=ids, use_cache=False).logits[0]
    return [logits[-2], logits[-1]]


def every_change(model: Any) -> dict[str, dict[tuple[str, str], Change]]:
    """A change of each part of the second layer, and of the embedding."""
    places = model_places(copy.deepcopy(model))
    layer: LayerPlaces = places[1]
    width = model.get_input_embeddings().weight.shape[1]
    vector = torch.linspace(-1, 1, width)
    assert layer.attn is not None
    assert layer.mlp is not None
    changes: dict[str, dict[tuple[str, str], Change]] = {
        "embedding": {(places[0].layer, "in"): lambda x: x + vector},
        "resid": {(layer.layer, "out"): lambda x: x + vector},
        "attn": {(layer.attn.name, "out"): lambda x: x * 0.25},
        "mlp": {(layer.mlp.name, "out"): lambda x: x * 0},
    }
    if layer.reader:
        changes["head"] = {(layer.reader, "in"): lambda x: _without(x, 8, 16)}
    if layer.down:
        changes["neuron"] = {(layer.down, "in"): lambda x: _without(x, 3, 30)}
    return changes


def _without(x: Tensor, start: int, stop: int) -> Tensor:
    x = x.clone()
    x[..., start:stop] = 0
    return x


def _of_row(change: Change, widths: list[int]) -> Callable[[Tensor], None]:
    rows = slice(sum(widths[:EDITED]), sum(widths[: EDITED + 1]))

    def apply(x: Tensor) -> None:
        x[rows] = change(x[rows])

    return apply


def _first(output: Any, change: Change) -> Any:
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)


def _sequence(ids: list[int], slot: int) -> Sequence:
    request, stream = SequenceRequest(ids, SamplingParams(max_tokens=4)), TokenStream(1, print)
    seq = Sequence(request, stream, 0, eos_token_ids=frozenset(), max_model_len=64)
    seq.slot = slot
    return seq
