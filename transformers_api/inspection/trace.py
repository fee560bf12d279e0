"""Traces: what is noted of every step of the sequences that asked, in the same forward pass.

``TracingRunner`` wraps the engine's runner: attention rows, residual streams and routers are noted
while the model runs. ``TracingSampler`` wraps the sampler: it adds what is known once the token is.
Neither changes a number of the answer, and without a traced sequence neither does anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy
import torch
from torch import Tensor

from transformers_api.engine.backend import Backend
from transformers_api.engine.batch import Batch
from transformers_api.engine.runners.adapted_modules import adapted
from transformers_api.engine.runners.model_runner import Runner
from transformers_api.engine.sampling.sampler import TokenSampler
from transformers_api.engine.scheduler import SlotStore
from transformers_api.engine.sequence import SampledToken, Sequence
from transformers_api.errors import ApiError
from transformers_api.inspection.activations import READ_BY_ATTENTION, ActivationSpec
from transformers_api.inspection.adjoints import MeanDirections
from transformers_api.inspection.attention import Weights
from transformers_api.inspection.attention_edits import edited_rows
from transformers_api.inspection.base import (
    AttentionMode,
    AttentionRow,
    LensReading,
    Likely,
    Routed,
    StepTrace,
    TracePlan,
)
from transformers_api.inspection.distributions import drawn, entropy, likely, rank, token_stats
from transformers_api.inspection.examination import Examined
from transformers_api.inspection.lenses import mapped
from transformers_api.inspection.logit_parts import split_token
from transformers_api.inspection.logit_share import LogitParts
from transformers_api.inspection.parts import lens_logits, residuals_of, routers_of
from transformers_api.inspection.probes import Probe, ProbeReading
from transformers_api.inspection.reading import Way
from transformers_api.inspection.recording import Recorder, Taken
from transformers_api.inspection.sae import FeaturePlan
from transformers_api.inspection.sae import largest as largest_features
from transformers_api.inspection.sureness import divergence, uncertainty_of
from transformers_api.inspection.token_rows import MOVED
from transformers_api.inspection.token_rows import TRACE as NAME


@dataclass(slots=True)
class _Notes:
    """The notes of the forward pass on one sequence; tensors are the notes' own."""

    place: int  # among the sequences of the pass, by slots
    seq: Sequence
    plan: TracePlan
    context: int  # tokens that the model sees, the query being the last
    rows: list[AttentionRow] = field(default_factory=list)
    residuals: dict[int, Tensor] = field(default_factory=dict)  # layer: (C,)
    routed: list[Routed] = field(default_factory=list)
    taken: Taken = field(default_factory=Taken)


class TracingRunner:
    """Wraps a runner; see the module."""

    def __init__(self, inner: Runner, model: Any, examined: Examined, backend: Backend) -> None:
        self.inner = inner
        self.model = model
        self.backend = backend
        self.recorder = Recorder(model, examined.parts, examined.anatomy.attention)
        self.examined = examined
        self.windows = {layer.layer: layer.window for layer in examined.anatomy.attention}

    @property
    def cache(self) -> SlotStore:
        """The inner runner's."""
        return self.inner.cache

    def forward(self, batch: Batch, keep: int = 1) -> Tensor:
        """See Runner."""
        if not any(seq.observe for seq in batch.sequences):
            return self.inner.forward(batch, keep)
        traced = [
            _Notes(seq.slot - batch.first_slot, seq, seq.observe[NAME], seq.num_cached + width)
            for seq, width, ends in zip(batch.sequences, batch.widths, batch.ends, strict=True)
            if ends and NAME in seq.observe
        ]
        noting = self.recorder.edits(batch, NAME)
        inputs = self.recorder.attention_edits(batch, NAME)
        if not (traced or noting or inputs):
            return self.inner.forward(batch, keep)
        with ExitStack() as watch:
            if noting or inputs:
                watch.enter_context(self.backend.editing(self.model, noting, inputs))
            attention = self._watch_attention(watch, traced)
            self._watch_residuals(watch, traced)
            self._watch_routers(watch, traced, batch.num_slots)
            logits = self.inner.forward(batch, keep)
        for layer, (probs, sinks) in attention.items():
            for place, notes in enumerate(n for n in traced if layer in n.plan.layers):
                heads = notes.plan.heads if isinstance(notes.plan.heads, tuple) else ...
                sink = None if sinks is None else sinks[place, heads]
                notes.rows.append(self._row(layer, probs[place, heads], sink, notes))
        for notes in traced:
            notes.taken = self.recorder.take(notes.seq)
            notes.taken.token.moved = notes.seq.extras.pop(MOVED, {})
            notes.seq.extras[NAME] = notes
        return logits

    def clear(self) -> None:
        """See Runner."""
        self.inner.clear()

    def _watch_attention(
        self, watch: ExitStack, traced: list[_Notes]
    ) -> Mapping[int, tuple[Tensor, Tensor | None]]:
        """Note rows as layers attend; those that the pass notes itself are returned."""
        takers = {layer: [n for n in traced if layer in n.plan.layers] for layer in _layers(traced)}
        readers: dict[int, list[tuple[_Notes, ActivationSpec]]] = {}
        for notes in traced:
            for spec in notes.plan.activations:
                if spec.part in READ_BY_ATTENTION:
                    readers.setdefault(spec.layer, []).append((notes, spec))
        if not (takers or readers):
            return {}

        def note(layer: int, weights: Weights) -> None:
            for notes in takers.get(layer, ()):
                notes.rows.append(self._edited_row(layer, weights, notes))
            for notes, spec in readers.get(layer, ()):
                at = notes.place, notes.context
                self.recorder.note_attention(notes.seq, spec, weights, at)

        layers = takers.keys() | readers.keys()
        source = self.examined.source
        watch.enter_context(source.watched(self.model, note, layers))
        if source.mode is not AttentionMode.TAP:
            return {}
        places = {
            layer: tuple(notes.place for notes in those)
            for layer, those in takers.items()
            if layer not in readers and all(notes.seq.edits is None for notes in those)
        }
        return watch.enter_context(self.backend.noting_attention(places))

    def _edited_row(self, layer: int, weights: Weights, notes: _Notes) -> AttentionRow:
        context = notes.context
        heads = notes.plan.heads if isinstance(notes.plan.heads, tuple) else None
        rows, sink = weights.rows(notes.place, slice(-1, None), heads)
        if notes.seq.edits is not None:
            edits: Any = notes.seq.edits
            stop, last = min(rows.shape[2], context), notes.seq.start + context
            cut = rows[..., :stop], sink
            rows, sink = edited_rows(edits, layer, weights, cut, heads, last - 1, last - stop)
        return self._row(layer, rows[:, -1], None if sink is None else sink[:, -1], notes)

    def _row(self, layer: int, rows: Tensor, taken: Tensor | None, notes: _Notes) -> AttentionRow:
        """``rows`` (H', S): of the last token, ``taken`` (H',) by the sinks."""
        plan, context = notes.plan, notes.context
        # the model's own cache may have dropped what lies before a window; ours has others' room
        stop = min(rows.shape[1], context)
        width = min(stop, self.windows.get(layer) or context)
        first = context - width
        shares = rows[:, stop - width : stop]  # (H', K)
        if plan.heads == "mean":
            shares, taken = shares.mean(0, True), None if taken is None else taken.mean(0, True)
        elif plan.heads == "max":
            shares, taken = shares.amax(0, True), None if taken is None else taken.amax(0, True)
        start = notes.seq.start + first
        row = partial(AttentionRow, layer=layer, key_start=start, width=width)
        if not plan.attn_topk:
            return row(weights=_array(shares), sink=_some(taken))
        best, keys = shares.topk(min(plan.attn_topk, width), -1)
        rest = (shares.sum(-1) - best.sum(-1)).clamp_min(0)
        return row(
            weights=_array(best),
            keys=(keys + start).cpu().numpy(),
            rest=_array(rest),
            sink=_some(taken),
        )

    def _watch_residuals(self, watch: ExitStack, traced: list[_Notes]) -> None:
        """The stream at the last token after every layer that somebody wants."""
        parts = self.examined.parts
        everywhere = range(len(parts.layers))
        takers: dict[int, list[_Notes]] = {}
        for notes in traced:
            normed = everywhere if notes.plan.resid_norms else ()
            features = notes.plan.features
            encoded = () if features is None else (features.sae.layer,)
            probed = (layer for probe in notes.plan.probes for layer in probe.directions)
            for layer in {*notes.plan.lens_layers, *normed, *probed, *encoded}:
                takers.setdefault(layer, []).append(notes)

        def keep(layer: int, stream: Tensor) -> None:
            for notes in takers[layer]:
                notes.residuals[layer] = stream[notes.place, -1].clone()

        if takers:
            watch.enter_context(residuals_of(self.model, parts, sorted(takers), keep))

    def _watch_routers(self, watch: ExitStack, traced: list[_Notes], slots: int) -> None:
        takers = [notes for notes in traced if notes.plan.router]
        if not takers:
            return

        def note(layer: int, logits: Tensor, weights: Tensor, experts: Tensor) -> None:
            for notes in takers:
                place = (notes.place + 1) * len(logits) // slots - 1
                notes.routed.append(_routed(layer, logits[place], weights[place], experts[place]))

        watch.enter_context(routers_of(self.model, self.examined.parts, note))


class TracingSampler:
    """Wraps a sampler; see the module."""

    def __init__(
        self,
        inner: TokenSampler,
        model: Any,
        examined: Examined,
        backend: Backend,
    ) -> None:
        self.inner = inner
        self.model = model
        self.examined = examined
        self.backend = backend
        self.means = MeanDirections()

    def sample(self, logits: Tensor, sequences: list[Sequence]) -> list[SampledToken]:
        """See TokenSampler."""
        sampled = self.inner.sample(logits, sequences)
        for row, (seq, token) in enumerate(zip(sequences, sampled, strict=True)):
            notes = seq.extras.pop(NAME, None)
            if notes is not None and token.error is None:
                seq.extras[NAME] = self._trace(notes, logits[row], token.token_id)
        return sampled

    def _trace(self, notes: _Notes, logits: Tensor, token: int) -> StepTrace:
        """``logits`` (V,)."""
        seq, plan = notes.seq, notes.plan
        own = self.backend.token_stats(logits, token, plan.topk)
        stats = own or token_stats(logits, token, plan.topk)
        prob, spread, drawn_top = drawn(logits, seq, token, plan.sampled_topk)
        norms = sorted(notes.residuals) if plan.resid_norms else []
        lens, lens_kl = self._lens(notes, token)
        sure = uncertainty_of(logits, stats.entropy, lens, lens_kl) if plan.uncertainty else None
        return StepTrace(
            step=seq.num_output,
            position=len(seq.tokens),
            context=notes.context,
            start=seq.start,
            token_id=token,
            logprob=stats.logprob,
            entropy=stats.entropy,
            rank=stats.rank,
            top=Likely(tuple(stats.ids), tuple(stats.probs)),
            sampled_prob=prob,
            sampled_entropy=spread,
            sampled_top=drawn_top,
            attention=tuple(sorted(notes.rows, key=lambda row: plan.layers.index(row.layer))),
            lens=lens,
            resid_norms=tuple(
                float(notes.residuals[layer].float().norm()) for layer in norms if layer >= 0
            ),
            router=tuple(notes.routed),
            probes=tuple(_reading(probe, notes.residuals) for probe in plan.probes),
            features=_features(plan.features, notes.residuals),
            activations=tuple(
                taken for spec in plan.activations if (taken := notes.taken.activations.get(spec))
            ),
            uncertainty=sure,
            parts=self._parts(notes, logits, token),
            recorded=tuple(notes.taken.records),
        )

    def _parts(self, notes: _Notes, logits: Tensor, token: int) -> LogitParts | None:
        if notes.plan.parts is None:
            return None
        examined, question = self.examined, replace(notes.plan.parts, token_id=token)
        vocab_size = examined.anatomy.vocab_size
        way = Way(
            parts=examined.parts, vocab_size=vocab_size, slice_tokens=1, reads_in_chunks=False
        )
        rows = notes.taken.token
        try:
            with adapted(self.model, [notes.seq.adapter]):
                # An adapter may change the head.
                means = self.means if notes.seq.adapter is None else MeanDirections()
                return split_token(self.model, way, examined.anatomy, rows, logits, question, means)
        except ApiError:  # numbers that no norm explains: of an edited stream, perhaps
            return None

    def _lens(self, notes: _Notes, token: int) -> tuple[tuple[LensReading, ...], float | None]:
        """The readings, and the divergence of the last layer's from the middle one's."""
        layers = [layer for layer in notes.plan.lens_layers if layer in notes.residuals]
        if not layers:
            return (), None
        via = notes.plan.lens_via
        residuals = torch.stack(
            [mapped(via, layer, notes.residuals[layer][None])[0] for layer in layers]
        )
        with adapted(self.model, [notes.seq.adapter]):
            logits = lens_logits(self.model, self.examined.parts, residuals)  # (N, V)
        logits = logits[:, : self.examined.anatomy.vocab_size]
        lens_kl = None
        if notes.plan.uncertainty and len(layers) > 1:
            *others, last = sorted(layers)
            half = self.examined.anatomy.layers // 2
            middle = min(others, key=lambda layer: abs(layer - half))
            lens_kl = divergence(logits, layers.index(last), layers.index(middle))
        readings = tuple(
            LensReading(
                layer=layer,
                top=likely(probs, notes.plan.lens_topk),
                rank_of_sampled=rank(probs, token),
                prob_of_sampled=float(probs[token]),
                entropy=entropy(probs),
            )
            for layer, probs in zip(layers, logits.softmax(-1), strict=True)
        )
        return readings, lens_kl


def _features(
    plan: FeaturePlan | None, residuals: dict[int, Tensor]
) -> tuple[tuple[int, float], ...]:
    """The largest features of the residual (C,) that they are of."""
    if plan is None or plan.sae.layer not in residuals:
        return ()
    (features,) = plan.sae.encode(_array(residuals[plan.sae.layer])[None])
    return tuple(largest_features(features, plan.topk))


def _reading(probe: Probe, residuals: dict[int, Tensor]) -> ProbeReading:
    """The residuals (C,) along the directions of a probe."""
    layers = tuple(layer for layer in probe.directions if layer in residuals)
    projections, cosines = [], []
    for layer in layers:
        stream, direction = _array(residuals[layer]), probe.directions[layer]
        along = float(stream @ direction) / max(float(numpy.linalg.norm(direction)), 1e-30)
        projections.append(along)
        cosines.append(along / max(float(numpy.linalg.norm(stream)), 1e-30))
    return ProbeReading(
        name=probe.name,
        layers=layers,
        projections=tuple(projections),
        cosines=tuple(cosines),
    )


def _layers(traced: SequenceOf[_Notes]) -> set[int]:
    return {layer for notes in traced for layer in notes.plan.layers}


def _routed(layer: int, logits: Tensor, weights: Tensor, experts: Tensor) -> Routed:
    """Of one token: ``logits`` (E,), ``weights`` and ``experts`` (k,)."""
    return Routed(
        layer=layer,
        experts=tuple(experts.tolist()),
        weights=tuple(weights.float().tolist()),
        entropy=entropy(logits.float().softmax(-1)),
    )


def _array(tensor: Tensor) -> numpy.ndarray[Any, Any]:
    """float32, on the host, owning its numbers."""
    return numpy.ascontiguousarray(tensor.float().cpu().numpy())


def _some(tensor: Tensor | None) -> numpy.ndarray[Any, Any] | None:
    return None if tensor is None else _array(tensor)
