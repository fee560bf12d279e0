"""Reading tokens in slices, so that others are answered in between. On the engine thread."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from transformers_api.errors import ModelNotCapable
from transformers_api.inspection.parts import Parts, lens_logits, residuals_of
from transformers_api.inspection.token_rows import Moved

HEAD_ROWS = 64  # positions that go through the head together: [n, V] is never there as a whole
Slices = Generator[None, None, None]  # a pause where it yields; see base.Job


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """The way to read a model: tokens per slice, or 0 for all at once where it cannot be cut."""

    parts: Parts
    vocab_size: int  # ids that the tokenizer has
    slice_tokens: int
    reads_in_chunks: bool
    edits: TextEdits | None = None  # of the text that is read

    def width(self, rows: int = 1) -> int:
        """Tokens of each of ``rows`` sequences in one slice; 0: all."""
        return max(self.slice_tokens // rows, 1) if self.reads_in_chunks else 0

    def check_gradients(self) -> None:
        """Raise ModelNotCapable where no gradient passes the edits."""
        edits = () if self.edits is None else self.edits.edits.edits
        if any(edit.feature is not None for edit in edits):
            raise ModelNotCapable(
                'an edit of a feature has no gradient; use method "occlusion", "exact" of a grid',
                param="method",
            )

    def armed(self, model: Any, arm: Arm) -> Arm:
        """``arm``, after the edits: it observes what they have made."""
        if self.edits is None:
            return arm
        edits = self.edits

        @contextmanager
        def both(start: int, stop: int) -> Iterator[None]:
            with edits.editing(model, start, stop), arm(start, stop):
                yield

        return both


class TextEdits(Protocol):
    """Edits of a text; see ``edits.EditedText``."""

    edits: Any  # an EditPlan
    moved: Moved  # of the last token of the last slice

    def editing(self, model: Any, start: int, stop: int) -> AbstractContextManager[None]:
        """While it lasts, tokens [start, stop) are read with the edits."""
        ...


@dataclass(frozen=True, slots=True)
class Chunk:
    """One forward pass over tokens [start, stop) of B sequences."""

    start: int
    stop: int
    logits: Tensor  # (B, kept, V') of the last tokens; V' is the head's own


class SeenEnough(Exception):
    """Raised by who watches a forward pass: what comes after this layer is not needed."""


Arm = Callable[[int, int], AbstractContextManager[Any]]


def unarmed(_start: int, _stop: int) -> AbstractContextManager[Any]:
    """No hooks."""
    return nullcontext()


def read(
    model: Any, ids: Tensor, width: int, arm: Arm = unarmed, *, whole_logits: bool = False
) -> Iterator[Chunk]:
    """Read ``ids`` (B, T), ``width`` tokens at a time or, for 0, in one go.

    The context that ``arm(start, stop)`` gives lasts for the forward pass over these tokens, never
    while the caller has a chunk. Logits are those of the last token of each chunk, or of all;
    none where the pass was ended by SeenEnough.

    Beyond the first chunk a model with sliding windows attends to the keys in its window only: of S
    keys the last belongs to token ``stop`` - 1.
    """
    count = ids.shape[1]
    step = min(width, count) or count
    options: dict[str, Any] = {"use_cache": step < count, "return_dict": True}
    if step < count:
        config = model.config.get_text_config(decoder=True)
        options["past_key_values"] = DynamicCache(config=config)
    if not whole_logits and model._supports_logits_to_keep():
        options["logits_to_keep"] = 1
    for start in range(0, count, step):
        stop = min(start + step, count)
        logits = ids.new_empty(1, 0, 0, dtype=torch.float32)
        with arm(start, stop), suppress(SeenEnough):
            logits = model(input_ids=ids[:, start:stop], **options).logits
        yield Chunk(start, stop, logits if whole_logits else logits[:, -1:])


def last_logits(model: Any, way: Way, ids: list[int], arm: Arm) -> Generator[None, None, Tensor]:
    """The logits (V',) of the last token; ``arm`` observes the chunk that it is in."""
    tokens = torch.tensor([ids], device=model.device)
    logits = torch.empty(0)

    def armed(first: int, last: int) -> AbstractContextManager[Any]:
        return arm(first, last) if last == len(ids) else unarmed(first, last)

    for chunk in read(model, tokens, way.width(), way.armed(model, armed)):
        logits = chunk.logits[0, -1]
        yield
    return logits


def each_logits(
    model: Any, way: Way, ids: list[int], take: Callable[[int, Tensor], None], first: int = 0
) -> Slices:
    """``take(start, logits (R, V) float32)`` of the tokens from ``first`` on, a few at a time."""
    last = len(way.parts.layers) - 1
    residuals: list[Tensor] = []

    def arm(_start: int, _stop: int) -> AbstractContextManager[None]:
        residuals.clear()
        return residuals_of(model, way.parts, [last], lambda _, each: residuals.append(each[0]))

    by_lens = way.parts.lens_is_exact
    rows = torch.tensor([ids], device=model.device)
    hooks = arm if by_lens else unarmed
    armed = way.armed(model, hooks)
    for chunk in read(model, rows, way.width(), armed, whole_logits=not by_lens):
        yield
        for offset in range(max(first - chunk.start, 0), chunk.stop - chunk.start, HEAD_ROWS):
            here = slice(offset, offset + HEAD_ROWS)
            if by_lens:
                logits = lens_logits(model, way.parts, residuals[0][here])
            else:
                logits = chunk.logits[0, here].float()
            take(chunk.start + offset, logits[:, : way.vocab_size])
            yield


def residuals_at(
    model: Any, way: Way, ids: list[int], layers: list[int], positions: list[int]
) -> Generator[None, None, Tensor]:
    """Residual streams (L', P, C) after ``layers``, -1 being the embedding, at ``positions``."""
    chosen = sorted(set(positions))
    streams: dict[int, list[Tensor]] = {layer: [] for layer in layers}

    def arm(start: int, stop: int) -> AbstractContextManager[None]:
        here = [position - start for position in chosen if start <= position < stop]
        return residuals_of(
            model,
            way.parts,
            list(streams),
            lambda layer, each: streams[layer].append(each[0, here]),
        )

    tokens = torch.tensor([ids], device=model.device)
    for _ in read(model, tokens, way.width(), way.armed(model, arm)):
        yield
    order = [chosen.index(position) for position in positions]
    return torch.stack([torch.cat(streams[layer])[order] for layer in layers])
