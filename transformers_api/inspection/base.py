"""Plain data and the protocol of inspection, for the rest of the program. Torch-free.

Units everywhere: probabilities 0..1; entropy, surprisal and logprob in nats; positions and steps
count from 0. Arrays are numpy's, float32 unless said otherwise. Letters for shapes: L layers,
H query heads, n tokens, V vocabulary, C width of the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, Protocol, TypeVar

import numpy
from numpy.typing import NDArray

from transformers_api.inspection.activations import (
    Activation,
    ActivationPart,
    ActivationSpec,
    RecordedRows,
)
from transformers_api.inspection.attribution_question import Attribution, AttributionQuestion
from transformers_api.inspection.divergence_question import Divergence, DivergenceQuestion
from transformers_api.inspection.editable import Editable, Part
from transformers_api.inspection.grid_question import Grid, GridQuestion
from transformers_api.inspection.lens_maps import DirectionReading as Direction
from transformers_api.inspection.lens_maps import LensFit, LensMaps, LensTable
from transformers_api.inspection.logit_share import LogitParts, LogitPartsQuestion
from transformers_api.inspection.probes import Probe, ProbeReading
from transformers_api.inspection.sae import FeaturePlan
from transformers_api.inspection.uncertainty import Uncertainty

T = TypeVar("T")
Array = NDArray[numpy.float32]
Ids = NDArray[numpy.int64]

# A piece of work in slices: called with the model on the engine thread, it gives a generator that
# yields between two slices, so that those who are being answered keep their pace, and returns the
# result. Each slice runs on the engine thread.
Job = Callable[[Any], Generator[None, None, T]]


class AttentionMode(StrEnum):
    """Sources of a model's attention weights."""

    TAP = "tap"  # recomputed in float32 beside the kernel, from the very q and k that it read
    HOOK = "hook"  # the model computes them anyway; they are read as they pass
    LEGACY = "legacy"  # only when the model is asked for them, in another way of computing
    NONE = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerAttention:
    """The attention of one layer, as far as it can be shown.

    ``heads`` counts queries; head h reads with K and V of ``h // (heads // kv_heads)``.
    """

    layer: int
    type: str  # "full_attention", "sliding_attention", "linear_attention", "mamba", …
    heads: int = 0
    kv_heads: int = 0
    window: int | None = None  # tokens that a query sees, itself included
    sinks: bool = False  # rows sum to 1 less what the head leaves unread
    available: bool = False
    reason: str | None = None  # why not
    max_rel_err: float | None = None  # |P·V - out| / |out| of the check at load


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """The mixture of experts of a model."""

    layers: tuple[int, ...]
    experts: int
    experts_per_token: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Anatomy:
    """The parts of a model, and those that can be shown; found and checked at load."""

    model_type: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    context: int  # tokens
    dtype: str
    mode: AttentionMode
    implementation: str  # "sdpa", "eager", …
    verified: bool  # the rows shown are those that made the output
    max_rel_err: float | None  # the worst layer
    attention: tuple[LayerAttention, ...]  # one per layer
    final_norm: str | None  # where the residual stream ends, as a module's name; None: not found
    lens: bool  # a residual can be read through the model's own head
    lens_is_exact: bool  # and that of the last layer gives the model's own logits, bit for bit
    routing: Routing | None = None
    traces_attention: bool = False  # while it writes, without changing a bit of the answer

    @property
    def layers_with_attention(self) -> list[int]:
        """Those whose weights can be shown."""
        return [layer.layer for layer in self.attention if layer.available]


# -- while it writes


@dataclass(frozen=True, slots=True, kw_only=True)
class TracePlan:
    """The notes to take of every step, for ``Engine.submit``: ``observe={"trace": plan}``."""

    layers: tuple[int, ...] = ()  # whose attention row is noted
    heads: tuple[int, ...] | Literal["mean", "max"] | None = None  # None: all
    attn_topk: int = 0  # only so many keys of each row; 0: all
    topk: int = 0  # likeliest tokens of the model's own distribution
    sampled_topk: int = 0  # and of the distribution that was drawn from
    lens_layers: tuple[int, ...] = ()  # residual streams to read through the head; -1: embedding
    lens_topk: int = 0
    lens_via: LensMaps | None = None  # by which they are mapped before
    resid_norms: bool = False
    router: bool = False
    probes: tuple[Probe, ...] = ()
    features: FeaturePlan | None = None
    activations: tuple[ActivationSpec, ...] = ()
    # Noted of every token that is read, prompts too, in the stream's own bits.
    records: tuple[tuple[int, ActivationPart], ...] = ()
    uncertainty: bool = False
    parts: LogitPartsQuestion | None = None  # of each token; its position and token are left open
    # That what is shown of a token may come to as JSON.
    bytes: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionRow:
    """The attention row of the query that predicts a token, in one layer."""

    layer: int
    key_start: int  # position of the first column; weights before it are 0
    width: int  # K: columns, up to the query's own
    weights: Array  # (H', K), or (H', k) of the heaviest keys, the heaviest first
    keys: Ids | None = None  # (H', k): positions of these
    rest: Array | None = None  # (H',): the weight of the other keys
    sink: Array | None = None  # (H',): what went nowhere


@dataclass(frozen=True, slots=True)
class Likely:
    """The likeliest tokens of a distribution, the likeliest first."""

    token_ids: tuple[int, ...] = ()
    probs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LensReading:
    """The residual stream after one layer, read through the head."""

    layer: int
    top: Likely
    rank_of_sampled: int  # 0: the likeliest
    prob_of_sampled: float
    entropy: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Routed:
    """The routing of the token in one mixture-of-experts layer."""

    layer: int
    experts: tuple[int, ...]
    weights: tuple[float, ...]
    entropy: float  # of the router's softmax over all experts


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTrace:
    """The notes of one step; ``TokenOutput.extras["trace"]``, with the token's own output."""

    step: int  # of the generated tokens
    position: int  # of the token, over prompt and output
    context: int  # tokens that the model saw, the query being the last of them
    start: int  # position of the first of them; above 0 once the window slides
    token_id: int
    logprob: float  # under the model
    entropy: float
    rank: int
    top: Likely
    sampled_prob: float  # under what was drawn from: temperature, penalties and filters applied
    sampled_entropy: float
    sampled_top: Likely
    attention: tuple[AttentionRow, ...] = ()
    lens: tuple[LensReading, ...] = ()
    resid_norms: tuple[float, ...] = ()  # L2, after each layer
    router: tuple[Routed, ...] = ()
    probes: tuple[ProbeReading, ...] = ()
    features: tuple[tuple[int, float], ...] = ()  # of an autoencoder, the largest first
    activations: tuple[Activation, ...] = ()
    uncertainty: Uncertainty | None = None
    parts: LogitParts | None = None  # None: nobody asked, or it cannot be told apart here
    recorded: tuple[RecordedRows, ...] = ()  # of all that was read since the last token


# -- of given tokens

Heads = int | Literal["mean", "max", "all"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionWindow:
    """A part of one layer's attention matrices: rows are queries, columns are keys."""

    weights: Array  # (H', R, C); one head, or one reduction of all, is H' = 1
    sink: Array | None = None  # (H', R)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadGrid:
    """Every head at a glance. Rows of layers without attention are NaN."""

    entropy: Array  # (L, H) each: mean over queries
    distance: Array  # mean of |i - j|, in tokens
    first: Array  # mean weight on position 0
    previous: Array  # on the token before the query
    itself: Array  # on the query's own position
    sink: Array | None  # (L, H)
    thumbs: Array | None  # (L, H, size, size), the mean of the cells that fall together


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptReading:
    """The model's prediction of each token; element i is about token i + 1, from all before."""

    surprisal: Array  # (n - 1,)
    entropy: Array
    rank: Ids
    top_ids: Ids  # (n - 1, k)
    top_logprobs: Array


class Inspector(Protocol):
    """Questions about given tokens. Methods give jobs; whoever has one runs it in slices."""

    def edited(self, plan: Any) -> Inspector:
        """The same, read with an ``edit_plan.EditPlan``; not of attributions: other texts."""
        ...

    def served_by(self, engine: Any) -> Inspector:
        """The same for this engine.base.Engine: the model's own, or one with an adapter."""
        ...

    @property
    def anatomy(self) -> Anatomy:
        """The anatomy, which says what can be asked."""
        ...

    def attention(
        self,
        ids: Sequence[int],
        layer: int,
        heads: Heads,
        rows: tuple[int, int],
        cols: tuple[int, int],
    ) -> Job[AttentionWindow]:
        """Weights of queries ``rows`` on keys ``cols``, both [start, stop)."""
        ...

    def heads(self, ids: Sequence[int], thumb: int) -> Job[HeadGrid]:
        """Statistics of every head, and pictures of ``thumb`` x ``thumb`` cells; 0 for none."""
        ...

    def rollout(self, ids: Sequence[int], layers: tuple[int, int], drop_first: bool) -> Job[Array]:
        """(n, n): the product over layers of half the mean attention and half the identity.

        ``layers``: the first and the last one. With ``drop_first`` nothing is read from the first
        token, and the rest of a row is scaled to sum to 1. Abnar and Zuidema 2020,
        arXiv:2005.00928, section 3. Raises AttentionUnavailable unless each has attention.
        """
        ...

    def read_prompt(self, ids: Sequence[int], topk: int) -> Job[PromptReading]:
        """The surprisal of each token."""
        ...

    def lens(
        self,
        ids: Sequence[int],
        layers: Sequence[int],
        positions: Sequence[int],
        topk: int,
        target: int | None,
        via: LensMaps | None = None,
    ) -> Job[LensTable]:
        """The logit lens; layer -1 is the embedding. ``via``: what streams are mapped by before."""
        ...

    def fit_lens(self, ids: Sequence[int], lens: LensMaps, most: int) -> Job[LensFit]:
        """The distance of what the lens reads from what the model says, at ``most`` positions."""
        ...

    def read_direction(self, ids: Sequence[int], direction: Array, topk: int) -> Job[Direction]:
        """The change of logits with each unit of a direction (C,), where the head reads a text."""
        ...

    def hidden_states(
        self, ids: Sequence[int], layers: Sequence[int], positions: Sequence[int]
    ) -> Job[Array]:
        """(L', P, C): residual streams after the layers, before the final norm."""
        ...

    def attribute(self, ids: Sequence[int], question: AttributionQuestion) -> Job[Attribution]:
        """The contribution of each token to the prediction of one."""
        ...

    def part_numbers(
        self, ids: Sequence[int], places: Sequence[tuple[int, Part]]
    ) -> Job[list[Array]]:
        """The numbers of parts of layers, of each an array (n, width), as the stream has them.

        The engine that serves reads the text: see ``served_by``.
        """
        ...

    def logit_parts(self, ids: Sequence[int], question: LogitPartsQuestion) -> Job[LogitParts]:
        """The shares of the parts of the model in a logit."""
        ...

    def grid(self, ids: Sequence[int], question: GridQuestion) -> Job[Grid]:
        """The prediction of the last token after each of many changes."""
        ...

    def diverge(self, ids: Sequence[int], question: DivergenceQuestion) -> Job[Divergence]:
        """The predictions of an answer to ``ids``, edited beside unedited."""
        ...

    def check_places(self) -> Job[Editable]:
        """The parts that can be changed, verified by edits on the path that serves."""
        ...

    def check_gradients(self) -> Job[bool]:
        """True where gradients reach the embeddings."""
        ...
