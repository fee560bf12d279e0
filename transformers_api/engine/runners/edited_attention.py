"""Changes of what a model's attention reads, for tokens of one sequence in a pass.

A change gets the queries, keys and values of one sequence, as its attention function got them, and
writes other rows into the function's output. Where a model computes the weights itself, it writes
into these. A pass that calls the model's modules is changed by who wraps attention functions
(inspection/attention.py) and by hooks; a recorded one by its runner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from transformers_api.engine.runners.edited_modules import ModuleEdit, hooked

HIDDEN = -1e4  # a score that a mask adds: the key is not attended to
# Sums are made in float64 and rounded once: in how many rows and keys a pass happens to read a
# text must not show in the bits, and the order of a sum depends on both.
SUMS = torch.float64


class Attending(Protocol):
    """R queries of one sequence, the last of its tokens, in one layer of H heads."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, R, S): heads, queries, keys."""
        ...

    def scores(self, heads: Sequence[int], queries: Sequence[int]) -> Tensor:
        """Scores (H', R', S), float64, a copy; -inf where a key is not attended to."""
        ...

    def sinks(self, heads: Sequence[int], queries: Sequence[int]) -> Tensor | None:
        """Scores (H', R' | 1, 1) of attention that goes nowhere."""
        ...

    def write(
        self, heads: Sequence[int], queries: Sequence[int], weights: Tensor, where: Tensor
    ) -> None:
        """Let these ``weights`` (H', R', S) be the attention ``where`` (H', R') is True."""
        ...


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """A part of a call of an attention function; meets Attending."""

    query: Tensor  # (H, R, D)
    key: Tensor  # (G, S, D)
    value: Tensor  # (G, S, D')
    masks: tuple[Tensor, ...]  # (H | 1, R, S) each: boolean, or added to the scores
    output: Tensor  # (R, H, D'), which is written into
    options: Mapping[str, Any]  # of the function

    @property
    def shape(self) -> tuple[int, int, int]:
        """See Attending."""
        return self.query.shape[0], self.query.shape[1], self.key.shape[1]

    def scores(self, heads: Sequence[int], queries: Sequence[int]) -> Tensor:
        """See Attending."""
        query = self.query[list(heads)][:, list(queries)].to(SUMS)
        scaling = self.options.get("scaling")
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        scores = query @ self.key[self._groups(heads)].to(SUMS).transpose(-1, -2) * scale
        if (cap := self.options.get("softcap")) is not None:
            scores = torch.tanh(scores / cap) * cap
        for mask in self.masks:
            own = mask[:, list(queries)]
            scores = masked(scores, own if len(own) == 1 else own[list(heads)])
        return scores

    def sinks(self, heads: Sequence[int], queries: Sequence[int]) -> Tensor | None:
        """See Attending."""
        sinks = self.options.get("s_aux")
        return None if sinks is None else sinks.to(SUMS).reshape(-1, 1, 1)[list(heads)]

    def write(
        self, heads: Sequence[int], queries: Sequence[int], weights: Tensor, where: Tensor
    ) -> None:
        """See Attending."""
        made = weights @ self.value[self._groups(heads)].to(SUMS)
        chosen, rows = where.nonzero(as_tuple=True)
        at = torch.tensor(list(queries), device=rows.device)[rows]
        head = torch.tensor(list(heads), device=rows.device)[chosen]
        self.output[at, head] = made[chosen, rows].to(self.output.dtype)

    def _groups(self, heads: Sequence[int]) -> list[int]:
        group = len(self.query) // len(self.key)
        return [head // group for head in heads]


@dataclass(frozen=True, slots=True)
class ComputedAttention:
    """Weights (H, R, S) that the model computed itself, and multiplies; meets Attending."""

    weights: Tensor
    has_sinks: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        """See Attending."""
        heads, queries, keys = self.weights.shape
        return heads, queries, keys

    def scores(self, heads: Sequence[int], queries: Sequence[int]) -> Tensor:
        """See Attending. Their logarithms are scores but for a constant."""
        return self.weights[list(heads)][:, list(queries)].to(SUMS).log()

    def sinks(self, heads: Sequence[int], queries: Sequence[int]) -> Tensor | None:
        """See Attending."""
        if not self.has_sinks:
            return None
        own = self.weights[list(heads)][:, list(queries)].to(SUMS)
        return (1 - own.sum(-1, keepdim=True)).clamp_min(0).log()

    def write(
        self, heads: Sequence[int], queries: Sequence[int], weights: Tensor, where: Tensor
    ) -> None:
        """See Attending."""
        chosen, rows = where.nonzero(as_tuple=True)
        at = torch.tensor(list(queries), device=rows.device)[rows]
        head = torch.tensor(list(heads), device=rows.device)[chosen]
        self.weights[head, at] = weights[chosen, rows].to(self.weights.dtype)


@dataclass(frozen=True, slots=True)
class AttentionInputs:
    """Queries, keys and values of R tokens, as a layer's attention reads them; written into.

    Keys and values are those that the cache has. Shapes are (R, heads, numbers of each).
    """

    query: Tensor
    key: Tensor
    value: Tensor

    def of(self, part: str) -> Tensor:
        """Those of "q", "k" or "v"."""
        return {"q": self.query, "k": self.key, "v": self.value}[part]


def masked(scores: Tensor, mask: Tensor) -> Tensor:
    """``scores`` with -inf where a boolean ``mask`` is False, or the mask added."""
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, -torch.inf)
    return (scores + mask.float()).masked_fill(mask <= HIDDEN, -torch.inf)


@dataclass(frozen=True, slots=True)
class AttentionEdit:
    """A change of the attention of one layer, for one sequence of a pass.

    Its tokens are the ``count`` from ``start`` on, of ``total`` ones; then it has ``context`` of
    them in the row ``slot`` of the cache. ``weights``: the module whose output has the weights,
    where in it, and True where they need not sum to 1; None: the layer calls an attention function.
    ``before`` changes what that reads, of these tokens; not ``writes``: it only looks at it.
    """

    layer: int
    start: int
    count: int
    total: int
    context: int
    slot: int
    apply: Callable[[Attending], None] | None = None
    weights: tuple[str, int, bool] | None = None
    before: Callable[[AttentionInputs], None] | None = None
    writes: bool = True


_current: ContextVar[Sequence[AttentionEdit]] = ContextVar("attention edits", default=())


def current_attention_edits() -> Sequence[AttentionEdit]:
    """The edits of the pass that runs, or is about to."""
    return _current.get()


@contextmanager
def editing_attention(edits: Sequence[AttentionEdit]) -> Iterator[None]:
    """Let passes within the block be changed, after what blocks around it change."""
    with _attention_edits((*_current.get(), *edits)):
        yield


def unedited_attention() -> AbstractContextManager[None]:
    """Let nothing within the block be changed, whatever blocks around it say."""
    return _attention_edits(())


@contextmanager
def _attention_edits(edits: Sequence[AttentionEdit]) -> Iterator[None]:
    token = _current.set(edits)
    try:
        yield
    finally:
        _current.reset(token)


@contextmanager
def edited_model(
    model: Any, edits: Sequence[ModuleEdit], attention: Sequence[AttentionEdit]
) -> Iterator[None]:
    """Apply edits wherever the model's modules are called, within the block."""
    with ExitStack() as stack:
        stack.enter_context(hooked(model, edits))
        stack.enter_context(editing_attention(attention))
        for edit in attention:
            if edit.weights is not None and edit.apply is not None:
                name, index, has_sinks = edit.weights
                module = model.get_submodule(name)
                hook = partial(_change_weights, edit, index, has_sinks)
                stack.callback(module.register_forward_hook(hook).remove)
        yield


def _change_weights(
    edit: AttentionEdit,
    index: int,
    has_sinks: bool,
    _module: nn.Module,
    _args: Any,
    output: Any,
) -> Any:
    weights = output[index] if isinstance(output, tuple) else output  # (B, H, T, S)
    own = weights.clone()
    sequence, queries = part_of(edit, own.shape[0], own.shape[2])
    assert edit.apply is not None
    edit.apply(ComputedAttention(own[sequence, :, queries, : edit.context], has_sinks))
    if not isinstance(output, tuple):
        return own
    return type(output)((*output[:index], own, *output[index + 1 :]))


def part_of(edit: AttentionEdit, sequences: int, width: int) -> tuple[int, slice]:
    """The sequence of a call, and its queries, that are edited.

    A model that keeps no state reads a sequence again from its start: more tokens than new ones.
    """
    before = sequences * width - edit.total if sequences == 1 else 0
    sequence, first = divmod(edit.start, width)
    return sequence, slice(first, first + edit.count + before)
