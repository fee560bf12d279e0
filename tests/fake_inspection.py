"""A stand-in for what looks inside: two layers, four heads, made-up numbers of the right shape."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy

from transformers_api.inspection.activations import Activation, ActivationSpec, RecordedRows
from transformers_api.inspection.attribution_question import Attribution, AttributionQuestion
from transformers_api.inspection.base import (
    Anatomy,
    Array,
    AttentionMode,
    AttentionRow,
    AttentionWindow,
    HeadGrid,
    Heads,
    Job,
    LayerAttention,
    LensReading,
    Likely,
    PromptReading,
    StepTrace,
    TracePlan,
)
from transformers_api.inspection.divergence_question import Divergence, DivergenceQuestion
from transformers_api.inspection.editable import INPUTS, PARTS, Editable, Part, Places
from transformers_api.inspection.grid_question import Grid, GridQuestion
from transformers_api.inspection.lens_maps import DirectionReading, LensFit, LensMaps, LensTable
from transformers_api.inspection.logit_share import LogitParts, LogitPartsQuestion, LogitShare

LAYERS, HEADS, KV_HEADS, WIDTH = 2, 4, 2, 8


def fake_layer(layer: int, **fields: Any) -> LayerAttention:
    """Full attention in four heads; ``fields`` replace those of LayerAttention."""
    given = {
        "type": "full_attention",
        "heads": HEADS,
        "kv_heads": KV_HEADS,
        "available": True,
        "max_rel_err": 1e-7,
    }
    return LayerAttention(layer=layer, **(given | fields))


def fake_places(layer: int) -> Places:
    """All parts of a layer with 16 neurons; of the embedding its stream."""
    if layer < 0:
        return Places(layer=layer, off={"resid": 1e-7})
    off = dict.fromkeys({*PARTS, *INPUTS, "weights"}, 1e-7)
    size = WIDTH // HEADS
    inputs: dict[Part, tuple[int, int]] = {
        "q": (HEADS, size),
        "k": (KV_HEADS, size),
        "v": (KV_HEADS, size),
    }
    return Places(layer=layer, off=off, heads=HEADS, head_dim=size, neurons=16, inputs=inputs)


def fake_anatomy(**fields: Any) -> Anatomy:
    """``fields`` replace those of Anatomy."""
    given: dict[str, Any] = {
        "model_type": "fake",
        "layers": LAYERS,
        "heads": HEADS,
        "kv_heads": KV_HEADS,
        "head_dim": WIDTH // HEADS,
        "hidden_size": WIDTH,
        "vocab_size": 259,
        "context": 2048,
        "dtype": "float32",
        "mode": AttentionMode.TAP,
        "implementation": "sdpa",
        "verified": True,
        "max_rel_err": 1e-7,
        "final_norm": "model.norm",
        "lens": True,
        "lens_is_exact": True,
        "traces_attention": True,
    } | fields
    given.setdefault("attention", tuple(fake_layer(i) for i in range(given["layers"])))
    return Anatomy(**given)


def weights(layer: int, heads: int, keys: int) -> Array:
    """(H, K): rows that sum to 1 and differ from head to head and from layer to layer."""
    ramp = numpy.arange(1, keys + 1, dtype=numpy.float64)[None]
    powers = 0.5 * numpy.arange(1, heads + 1)[:, None] + layer
    rows = ramp**powers
    return (rows / rows.sum(axis=1, keepdims=True)).astype(numpy.float32)


def matrix(layer: int, heads: int, tokens: int) -> Array:
    """(H, n, n): lower triangular."""
    full = numpy.zeros((heads, tokens, tokens), numpy.float32)
    for query in range(tokens):
        full[:, query, : query + 1] = weights(layer, heads, query + 1)
    return full


def reduced(rows: Array, heads: Any) -> Array:
    """Over the first axis as ``heads`` says."""
    if heads in ("mean", "max"):
        return numpy.asarray(getattr(rows, heads)(axis=0, keepdims=True))
    if isinstance(heads, int):
        return rows[heads : heads + 1]
    return rows[list(heads)] if isinstance(heads, tuple) else rows


def likely(token_id: int, count: int, vocab: int = 259) -> Likely:
    """The token itself with 0.6, then its neighbours, each half as likely."""
    ids = tuple((token_id + i) % vocab for i in range(count))
    return Likely(ids, tuple(0.6 * 0.5**i for i in range(count)))


def fake_step(
    plan: TracePlan, prompt: Sequence[int], step: int, token_id: int, greedy: bool
) -> StepTrace:
    """What an engine would have noted."""
    context = len(prompt) + step
    sampled = Likely((token_id,), (1.0,)) if greedy else likely(token_id, plan.sampled_topk)
    return StepTrace(
        step=step,
        position=context,
        context=context,
        start=0,
        token_id=token_id,
        logprob=math.log(0.6),
        entropy=1.25,
        rank=0,
        top=likely(token_id, plan.topk),
        sampled_prob=1.0 if greedy else 0.6,
        sampled_entropy=0.0 if greedy else 1.0,
        sampled_top=Likely(
            sampled.token_ids[: plan.sampled_topk], sampled.probs[: plan.sampled_topk]
        ),
        attention=tuple(_row(plan, layer, context) for layer in plan.layers),
        lens=tuple(
            LensReading(
                layer=layer,
                top=likely(token_id + 1, plan.lens_topk),
                rank_of_sampled=3,
                prob_of_sampled=0.01,
                entropy=2.0,
            )
            for layer in plan.lens_layers
        ),
        resid_norms=(35.25, 88.125) if plan.resid_norms else (),
        activations=tuple(_activation(spec, context - 1) for spec in plan.activations),
        recorded=tuple(
            RecordedRows(
                part=part,
                layer=layer,
                start=context - 1 if step else 0,
                bits=rows_of(range(context - 1 if step else 0, context), layer)
                .astype(numpy.float16)
                .view(numpy.uint16),
                dtype="float16",
            )
            for layer, part in plan.records
        ),
    )


def rows_of(positions: Sequence[int], layer: int) -> Array:
    """(n, C) made-up numbers of tokens."""
    return numpy.array(
        [[place + 0.25 * layer + column for column in range(WIDTH)] for place in positions],
        numpy.float32,
    )


def _activation(spec: ActivationSpec, position: int) -> Activation:
    values = rows_of([position], spec.layer)
    if not spec.topk:
        return Activation(part=spec.part, layer=spec.layer, values=values)
    places = numpy.argsort(-numpy.abs(values))[:, : spec.topk]
    best = numpy.take_along_axis(values, places, 1)
    return Activation(part=spec.part, layer=spec.layer, values=best, places=places)


def _row(plan: TracePlan, layer: int, keys: int) -> AttentionRow:
    rows = reduced(weights(layer, HEADS, keys), plan.heads)
    if not plan.attn_topk:
        return AttentionRow(layer=layer, key_start=0, width=keys, weights=rows)
    order = numpy.argsort(-rows, axis=1)[:, : plan.attn_topk]
    heaviest = numpy.take_along_axis(rows, order, axis=1)
    return AttentionRow(
        layer=layer,
        key_start=0,
        width=keys,
        weights=heaviest,
        keys=order.astype(numpy.int64),
        rest=(1 - heaviest.sum(axis=1)).clip(0).astype(numpy.float32),
    )


def sliced(work: Callable[[], Any], slices: int = 2) -> Job[Any]:
    """A job that yields between so many slices and then gives what ``work`` makes."""

    def job(_model: Any) -> Generator[None, None, Any]:
        for _ in range(slices):
            yield
        return work()

    return job


class FakeInspector:
    """Meets inspection.base.Inspector. ``asked`` records (method, ids) in order."""

    def __init__(self, anatomy: Anatomy | None = None, gradients: bool = True) -> None:
        self.anatomy = anatomy or fake_anatomy()
        self.gradients = gradients
        layers = range(-1, self.anatomy.layers)
        self.editable = Editable(tuple(fake_places(layer) for layer in layers), True)
        self.asked: list[tuple[str, list[int]]] = []

    def served_by(self, engine: Any) -> FakeInspector:
        return self

    def attention(
        self,
        ids: Sequence[int],
        layer: int,
        heads: Heads,
        rows: tuple[int, int],
        cols: tuple[int, int],
    ) -> Job[AttentionWindow]:
        self.asked.append(("attention", list(ids)))
        full = reduced(matrix(layer, HEADS, len(ids)), heads)
        return sliced(lambda: AttentionWindow(weights=full[:, slice(*rows), slice(*cols)]))

    def heads(self, ids: Sequence[int], thumb: int) -> Job[HeadGrid]:
        self.asked.append(("heads", list(ids)))
        shape = (self.anatomy.layers, HEADS)
        numbers = [numpy.full(shape, value, numpy.float32) for value in (1.2, 4.1, 0.6, 0.02, 0.1)]
        for layer in self.anatomy.attention:
            if not layer.available:
                for array in numbers:
                    array[layer.layer] = numpy.nan
        thumbs = numpy.full((*shape, thumb, thumb), 0.25, numpy.float32) if thumb else None
        names = ("entropy", "distance", "first", "previous", "itself")
        grid = HeadGrid(**dict(zip(names, numbers, strict=True)), sink=None, thumbs=thumbs)
        return sliced(lambda: grid)

    def rollout(self, ids: Sequence[int], layers: tuple[int, int], drop_first: bool) -> Job[Array]:
        self.asked.append(("rollout", list(ids)))
        return sliced(lambda: matrix(0, 1, len(ids))[0])

    def read_prompt(self, ids: Sequence[int], topk: int) -> Job[PromptReading]:
        self.asked.append(("read_prompt", list(ids)))
        count = len(ids) - 1
        following = numpy.array(ids[1:], numpy.int64)
        reading = PromptReading(
            surprisal=numpy.full(count, 0.5, numpy.float32),
            entropy=numpy.full(count, 1.5, numpy.float32),
            rank=numpy.zeros(count, numpy.int64),
            top_ids=(following[:, None] + numpy.arange(topk)) % 259,
            top_logprobs=numpy.tile(-0.5 - numpy.arange(topk, dtype=numpy.float32), (count, 1)),
        )
        return sliced(lambda: reading)

    def lens(
        self,
        ids: Sequence[int],
        layers: Sequence[int],
        positions: Sequence[int],
        topk: int,
        target: int | None,
        via: LensMaps | None = None,
    ) -> Job[LensTable]:
        self.asked.append(("lens", list(ids)))
        shape = (len(positions), len(layers))
        tops = numpy.broadcast_to(numpy.arange(97, 97 + topk), (*shape, topk))
        table = LensTable(
            top_ids=tops.astype(numpy.int64),
            top_probs=numpy.full((*shape, topk), 0.3, numpy.float32),
            entropy=numpy.full(shape, 2.1, numpy.float32),
            target_ids=numpy.full(len(positions), 97 if target is None else target, numpy.int64),
            target_rank=numpy.full(shape, 5, numpy.int64),
            target_prob=numpy.full(shape, 0.01, numpy.float32),
        )
        return sliced(lambda: table)

    def fit_lens(self, ids: Sequence[int], lens: LensMaps, most: int) -> Job[LensFit]:
        count = len(lens.layers)
        fit = LensFit(layers=lens.layers, lens=(0.25,) * count, plain=(0.5,) * count)
        return sliced(lambda: fit)

    def read_direction(
        self, ids: Sequence[int], direction: Array, topk: int
    ) -> Job[DirectionReading]:
        return sliced(lambda: DirectionReading(((97, 1.5),), ((98, -0.5),)))

    def part_numbers(
        self, ids: Sequence[int], places: Sequence[tuple[int, Part]]
    ) -> Job[list[Array]]:
        rows = numpy.random.default_rng(0).normal(size=(len(ids), WIDTH)).astype(numpy.float32)
        return sliced(lambda: [rows for _ in places])

    def hidden_states(
        self, ids: Sequence[int], layers: Sequence[int], positions: Sequence[int]
    ) -> Job[Array]:
        self.asked.append(("hidden_states", list(ids)))
        shape = (len(layers), len(positions), self.anatomy.hidden_size)
        size = math.prod(shape)
        return sliced(lambda: numpy.arange(size, dtype=numpy.float32).reshape(shape))

    def attribute(self, ids: Sequence[int], question: AttributionQuestion) -> Job[Attribution]:
        self.asked.append(("attribute", list(ids)))
        count = question.position + 1
        token_id = 97 if question.token_id is None else question.token_id
        answer = Attribution(
            scores=numpy.linspace(-1, 1, count, dtype=numpy.float32),
            token_id=token_id,
            logprob=-0.25,
            value=-0.25 if question.of == "logprob" else 7.5,
            convergence_delta=0.01 if question.method == "integrated_gradients" else None,
        )
        return sliced(lambda: answer)

    def check_places(self) -> Job[Editable]:
        return sliced(lambda: self.editable, slices=0)

    def logit_parts(self, ids: Sequence[int], question: LogitPartsQuestion) -> Job[LogitParts]:
        self.asked.append(("logit_parts", list(ids)))
        shares = LogitShare("embed", -1, 1.0), LogitShare("attn", 0, 0.5), LogitShare("mlp", 0, 2)
        parts = LogitParts(
            token_id=97,
            logit=3.75,
            model_logit=3.75,
            is_capped=False,
            shares=shares,
            constant=0.25,
            rounding=0.0,
            sum=3.75,
        )
        return sliced(lambda: parts)

    def grid(self, ids: Sequence[int], question: GridQuestion) -> Job[Grid]:
        self.asked.append(("grid", list(ids)))
        values = numpy.linspace(-1, 1, len(question.cells), dtype=numpy.float32)
        donor = None if question.donor is None else 2.0
        grid = Grid(values=values, plain=1.0, donor=donor, answer=97, against=None)
        return sliced(lambda: grid)

    def diverge(self, ids: Sequence[int], question: DivergenceQuestion) -> Job[Divergence]:
        self.asked.append(("diverge", list(ids)))
        count = len(question.answer)
        divergence = Divergence(
            kl=numpy.full(count, 0.25, numpy.float32),
            logprob_without=numpy.full(count, -0.5, numpy.float32),
            top_ids=numpy.full((count, question.topk), 97, numpy.int64),
            top_logprobs=numpy.full((count, question.topk), -0.5, numpy.float32),
        )
        return sliced(lambda: divergence)

    def check_gradients(self) -> Job[bool]:
        return sliced(lambda: self.gradients, slices=0)
