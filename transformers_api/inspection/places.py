"""The acting check: an edit on the path that serves gives what the same edit of modules gives.

A place where a recorded pass may be stopped need not be one where an edit acts: what comes after
may have been computed already. So every layer is edited once, in a row of its own, by the runner
that serves and by hooks in the model's modules, and the logits are compared. A row that nobody
edits has to stay as it was, to the bit.
"""

from __future__ import annotations

import logging
from collections.abc import Generator
from collections.abc import Sequence as SequenceOf
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from transformers_api.engine.backend import Backend
from transformers_api.engine.base import SamplingParams, SequenceRequest, TokenStream
from transformers_api.engine.batch import Batch
from transformers_api.engine.llm_engine import BatchingEngine
from transformers_api.engine.places import LayerPlaces
from transformers_api.engine.runners.edited_attention import AttentionEdit, edited_model
from transformers_api.engine.runners.edited_modules import ModuleEdit
from transformers_api.engine.sequence import Sequence
from transformers_api.inspection.attention import AttentionSource
from transformers_api.inspection.attention_check import Sizes, checking, noting
from transformers_api.inspection.base import AttentionMode, LayerAttention
from transformers_api.inspection.editable import INPUTS, PARTS, Editable, Part, Places
from transformers_api.inspection.parts import Parts

log = logging.getLogger(__name__)
TOKENS = 2  # of each row
FLOAT32, ROUNDED = 1e-3, 3e-2  # relative, of the logits
COMPANY = 3  # times what unedited rows differ by, for the same reason
EMBEDDING = -1
PROBES = 8  # until one is right
MOST_ROWS = 16  # of a pass
Row = tuple[int, tuple[Part, ...]]  # the parts of a layer that are edited in a row
NOBODY: Row = (0, ())


def head_dim(places: LayerPlaces, attention: LayerAttention) -> int:
    """Numbers of each head's output, one head behind the other; 0 where that is not so."""
    heads, width = attention.heads, places.reader_width
    return width // heads if heads and width % heads == 0 else 0


def head_dims(
    places: SequenceOf[LayerPlaces], attention: SequenceOf[LayerAttention]
) -> dict[int, int]:
    """The same of every layer."""
    pairs = zip(places, attention, strict=False)
    return {layer: head_dim(*pair) for layer, pair in enumerate(pairs)}


@dataclass(frozen=True, slots=True)
class Module:
    """A module and the side of it that is a part of a layer; ``factor``: see Writer."""

    name: str
    side: Any  # "in", "out"
    factor: float = 1.0


def module_of(places: SequenceOf[LayerPlaces], layer: int, part: Part) -> Module | None:
    """The module of a part of a layer; None where there is none."""
    if layer == EMBEDDING:
        return Module(places[0].layer, "in") if part == "resid" else None
    own = places[layer]
    if part not in PARTS:  # of attention
        return None
    if part == "resid":
        return Module(own.layer, "out")
    if part in ("attn", "mlp"):
        writer = own.attn if part == "attn" else own.mlp
        return None if writer is None else Module(writer.name, "out", writer.factor)
    name = own.reader if part == "head" else own.down
    return None if name is None else Module(name, "in")


class ActingCheck:
    """The check of the model of an engine, in slices between its steps; on its thread."""

    def __init__(
        self,
        engine: BatchingEngine,
        backend: Backend,
        parts: Parts,
        attention: SequenceOf[LayerAttention],
        source: AttentionSource,
    ) -> None:
        self.engine = engine
        self.source = source
        self.backend = backend
        self.layers: SequenceOf[LayerPlaces] = ()
        self._finder = parts.places
        self.attention = attention
        self._sizes: dict[int, Sizes] = {}  # of what attention reads, by layer
        self._attending: frozenset[int] = frozenset()  # whose weights can be changed
        self.has_experts = parts.routing is not None

    def run(self, model: Any) -> Generator[None, None, Editable]:
        """The parts that can be changed; none where the model's code fails."""
        self.layers = self._finder.of(model)
        if not self.layers:
            return Editable()
        try:
            return (yield from self._run(model))
        except Exception:  # of that code, which may be anybody's
            log.warning("%s: edits were not checked", type(model).__name__, exc_info=True)
            return Editable()

    def _run(self, model: Any) -> Generator[None, None, Editable]:
        ids = self._ids(0)
        self._attending = self._attending_layers(model, ids)
        rows = [(layer, self._parts(layer)) for layer in range(EMBEDDING, len(self.layers))]
        own = yield from self._served(model, ids, [NOBODY])
        unedited = _off(own[0], self._expected(model, ids, [NOBODY])[0])
        most = max(self._tolerance(), COMPANY * unedited)
        offs, are_equal = yield from self._offs(model, rows, most)
        places = []
        for (layer, parts), off in zip(rows, offs, strict=True):
            each = dict.fromkeys(parts, off)
            if off > most and len(parts) > 1:
                alone: list[Row] = [(layer, (part,)) for part in parts]
                by_part, _ = yield from self._offs(model, alone, most)
                each = dict(zip(parts, by_part, strict=True))
            places.append(self._places(layer, each, most))
        is_equal = are_equal and (self.backend.is_batch_invariant or not self.has_experts)
        return Editable(tuple(places), is_equal)

    def _offs(
        self, model: Any, rows: SequenceOf[Row], most: float
    ) -> Generator[None, None, tuple[list[float], bool]]:
        """See ``_probed``; of the tokens that agree best: what is wrong is wrong with any."""
        offs, are_equal = yield from self._probed(model, rows, self._ids(0))
        for probe in range(1, PROBES):
            wrong = [at for at, off in enumerate(offs) if off > most]
            if not wrong:
                break
            others = [rows[at] for at in wrong]
            again, _ = yield from self._probed(model, others, self._ids(probe))
            for at, off in zip(wrong, again, strict=True):
                offs[at] = min(offs[at], off)
        return offs, are_equal

    def _probed(
        self, model: Any, rows: SequenceOf[Row], ids: list[int]
    ) -> Generator[None, None, tuple[list[float], bool]]:
        """The relative error of each row's edit; True where one beside them stays as it was."""
        offs: list[float] = []
        are_equal = True
        left = list(rows)
        while left:
            count = max((yield from self._room()) - 1, 1)
            served = yield from self._served(model, ids, [*left[:count], NOBODY])
            own = left[: min(count, len(served))]
            left = left[len(own) :]
            expected = self._expected(model, ids, own)
            offs += [_off(a, b) for a, b in zip(served[: len(own)], expected, strict=True)]
            if len(offs) == len(own) and len(served) > len(own):
                plain = yield from self._served(model, ids, [NOBODY] * len(served))
                are_equal = len(plain) < len(served) or torch.equal(plain[-1], served[-1])
        return offs, are_equal

    def _room(self) -> Generator[None, None, int]:
        """Rows that nobody uses, of which there will be one at least."""
        scheduler = self.engine.scheduler
        while not (room := scheduler.num_slots - len(scheduler.running)):
            yield
        return min(room, MOST_ROWS)

    def _served(
        self, model: Any, ids: list[int], rows: SequenceOf[Row]
    ) -> Generator[None, None, Tensor]:
        """Logits (B, V) of each row's last token, by the runner; of as many as there is room for.

        They lie behind those of the sequences that run; what was kept of finished ones is let go.
        """
        scheduler = self.engine.scheduler
        while True:
            yield
            rows = rows[: (yield from self._room())]
            cache, first = scheduler.cache, len(scheduler.running)
            length = max([TOKENS, *(seq.room for seq in scheduler.running)])
            if cache.reserve(first + len(rows), length) is not None:
                break
            rows = rows[: max(len(rows) // 2, 1)]
        scheduler.forget()
        sequences = [_sequence(ids, first + slot) for slot in range(len(rows))]
        for seq in sequences:
            seq.tokens.pop()
        if cache.in_pieces:
            self._pass(model, sequences, rows, TOKENS - 1)
        else:  # prompts are read one by one
            for seq, row in zip(sequences, rows, strict=True):
                self._pass(model, [seq], [row], TOKENS - 1)
        for seq in sequences:
            seq.num_cached, seq.tokens = TOKENS - 1, list(ids)
        return self._pass(model, sequences, rows, 1)  # reads what the first has left in the cache

    def _pass(
        self, model: Any, sequences: list[Sequence], rows: SequenceOf[Row], width: int
    ) -> Tensor:
        edits = self._edits(rows, width)
        first, stop = sequences[0].slot, sequences[0].num_cached + width
        attention = self._attention_edits(rows, width, first, stop)
        is_edited = edits or attention
        with self.backend.editing(model, edits, attention) if is_edited else nullcontext():
            logits = self.engine.runner.forward(Batch(sequences, [width] * len(sequences)))
        return logits[:, -1].float().clone()

    def _expected(
        self,
        model: Any,
        ids: list[int],
        rows: SequenceOf[Row],
        notes: SequenceOf[AttentionEdit] = (),
    ) -> Tensor:
        """The same by the model's modules, without a cache."""
        options = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
        tokens = torch.tensor([ids] * len(rows), device=model.device)
        attention = [*self._attention_edits(rows, TOKENS, 0, TOKENS), *notes]
        with edited_model(model, self._edits(rows, TOKENS), attention):
            output = model(input_ids=tokens, use_cache=False, return_dict=True, **options)
        logits: Tensor = output.logits[:, -1, : self.engine.vocab_size].float()
        return logits

    def _ids(self, probe: int) -> list[int]:
        generator = torch.Generator().manual_seed(probe)
        return torch.randint(0, self.engine.vocab_size, (TOKENS,), generator=generator).tolist()

    def _tolerance(self) -> float:
        return FLOAT32 if self.engine.facts.weights == "float32" else ROUNDED

    def _parts(self, layer: int) -> tuple[Part, ...]:
        own = [part for part in PARTS if module_of(self.layers, layer, part) is not None]
        own = [part for part in own if part != "head" or self._head_dim(layer)]
        if layer in self._sizes:
            own += INPUTS
        return (*own, "weights") if layer in self._attending else tuple(own)

    def _attending_layers(self, model: Any, ids: list[int]) -> frozenset[int]:
        """The layers whose attention weights are computed while it writes, and used."""
        layers = [each.layer for each in self.attention if each.available]
        if self.source.mode is AttentionMode.TAP:
            place = 0, TOKENS, TOKENS, TOKENS, 0
            notes = [noting(layer, place, self._sizes) for layer in layers]
            self._expected(model, ids, [NOBODY], notes)
            return frozenset(layers)
        if self.source.mode is not AttentionMode.HOOK:
            return frozenset()
        # Some modules only tell which weights they have used.
        rows: list[Row] = [(layer, ("weights",)) for layer in layers]
        changed, plain = (self._expected(model, ids, each) for each in (rows, [NOBODY] * len(rows)))
        pairs = zip(layers, changed, plain, strict=True)
        return frozenset(layer for layer, own, before in pairs if not torch.equal(own, before))

    def _head_dim(self, layer: int) -> int:
        return head_dim(self.layers[layer], self.attention[layer])

    def _places(self, layer: int, off: dict[Part, float], most: float) -> Places:
        wrong = frozenset(part for part, each in off.items() if not each <= most)
        for part in wrong:
            log.warning("Layer %d: edits of %s are off by %g", layer, part, off[part])
        if layer == EMBEDDING:
            return Places(layer=layer, off=off, unverified=wrong)
        own, size = self.layers[layer], self._head_dim(layer)
        return Places(
            layer=layer,
            off=off,
            unverified=wrong,
            heads=own.reader_width // size if size else 0,
            head_dim=size,
            neurons=own.down_width,
            inputs=self._sizes.get(layer, {}),
        )

    def _edits(self, rows: SequenceOf[Row], tokens: int) -> list[ModuleEdit]:
        """The edits of a pass that reads so many tokens of each row."""
        edits: dict[tuple[str, Any], list[Any]] = {}
        for row, (layer, parts) in enumerate(rows):
            for part in parts:
                module = module_of(self.layers, layer, part)
                if module is None:  # weights
                    continue
                width = self.layers[layer].down_width // 2
                if part == "head":
                    width = self._head_dim(layer)
                # A model that keeps no state reads a sequence again from its start.
                own = slice(row * tokens, (row + 1) * tokens) if len(rows) > 1 else slice(None)
                change = partial(_change, part, own, width)
                edits.setdefault((module.name, module.side), []).append(change)
        return [
            ModuleEdit(name, side, partial(_each, changes))
            for (name, side), changes in edits.items()
        ]

    def _attention_edits(
        self, rows: SequenceOf[Row], width: int, first: int, stop: int
    ) -> list[AttentionEdit]:
        """Those of a pass that reads ``width`` tokens, up to ``stop``, of rows from a slot on."""
        edits = []
        for row, (layer, parts) in enumerate(rows):
            place = row * width, width, len(rows) * width, stop, first + row
            heads = self.attention[layer].heads if self.attention else 0
            edits.append(checking(layer, parts, heads, place, self.source))
        return [edit for edit in edits if edit is not None]


def _each(changes: SequenceOf[Any], rows: Tensor) -> None:
    for change in changes:
        change(rows)


def _change(part: Part, tokens: slice, width: int, rows: Tensor) -> None:
    """Change some of the ``rows`` (N, C) so that the logits show it."""
    own = rows[tokens]
    if part == "resid":
        signs = torch.arange(own.shape[1], device=own.device) % 3 - 1
        own += signs * own.float().square().mean(-1, keepdim=True).sqrt().to(own.dtype)
    elif part in ("attn", "mlp"):
        own *= 0.5
    else:
        own[:, :width] = 0


def _off(own: Tensor, right: Tensor) -> float:
    return float(((own - right).norm() / right.norm().clamp_min(1e-30)).nan_to_num(torch.inf))


def _sequence(ids: list[int], slot: int) -> Sequence:
    request = SequenceRequest(ids, SamplingParams(max_tokens=2))
    stream = TokenStream(1, lambda _: None)
    seq = Sequence(request, stream, 0, eos_token_ids=frozenset(), max_model_len=1 << 30)
    seq.slot = slot
    return seq
