"""The traces of tokens: from plain data to JSON. Numbers have 5 decimals."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy

from transformers_api.api.http import strict_json
from transformers_api.errors import ApiError
from transformers_api.inspection.activations import Activation
from transformers_api.inspection.base import (
    Anatomy,
    Array,
    AttentionRow,
    LensReading,
    Likely,
    Routed,
    StepTrace,
)
from transformers_api.inspection.logit_share import LogitParts, LogitShare
from transformers_api.inspection.uncertainty import Uncertainty
from transformers_api.serving.generation import GenerationRequest
from transformers_api.serving.inspect import arrays
from transformers_api.serving.inspect.trace_plan import PartsRequest, TraceRequest
from transformers_api.serving.swap.loaded_model import LoadedModel
from transformers_api.serving.text.spans import Span
from transformers_api.serving.text.vocabulary import Vocabulary

Json = dict[str, Any]
VERSION = 1
UNITS = {"entropy": "nats", "surprisal": "nats", "logprob": "nats", "prob": "0..1"}
_LOWEST_LOGPROB = -9999.0  # JSON has no infinity


class TraceWriter:
    """Writes the traces of one request, and counts what they take."""

    def __init__(
        self,
        model: LoadedModel,
        options: TraceRequest,
        prompts: Sequence[Sequence[int]],
        spans: Sequence[Span] = (),
    ) -> None:
        assert model.inspector is not None
        self._anatomy = model.inspector.anatomy
        self._vocabulary = Vocabulary(model.tokenizer)
        self._options = options
        self._prompts = prompts
        self._spans = spans
        self._bytes = 0
        self._seconds = 0.0

    def header(self, prompt: int, index: int, run: Mapping[str, str]) -> Any:
        """The header of the traces of the answer ``index``; ``run``: the field of its run."""
        began = time.perf_counter()
        content = header(self._anatomy, self._vocabulary, self._prompts[prompt], self._spans)
        content |= run
        return self._written({"v": VERSION, "index": index, "noted": True, **content}, began)

    def step(self, trace: StepTrace, index: int, **more: Any) -> Any:
        """One token of the answer ``index``, and ``more`` beside it."""
        began = time.perf_counter()
        return self._written({**step(trace, index, self._options, self._vocabulary), **more}, began)

    def event(self, trace: StepTrace) -> Any:
        """One token, as ``seed_event`` has it."""
        began = time.perf_counter()
        return self._written(seed_event(trace, self._options, self._vocabulary), began)

    @property
    def usage(self) -> Json:
        """Bytes of JSON and milliseconds of work so far."""
        return {"bytes": self._bytes, "ms": round(self._seconds * 1000, 3)}

    def _written(self, value: Json, began: float) -> Any:
        """``value`` as JSON that is ready to be put into a larger one."""
        text = strict_json.dump(value)
        self._bytes += len(text)
        self._seconds += time.perf_counter() - began
        return strict_json.ready(text)


def refused_header(error: ApiError, index: int) -> Json:
    """The header of an answer that goes on without the trace that was asked for."""
    return {
        "v": VERSION,
        "index": index,
        "noted": False,
        "code": error.code,
        "reason": error.message,
    }


def header(
    anatomy: Anatomy, vocabulary: Vocabulary, prompt: Sequence[int], spans: Sequence[Span]
) -> Json:
    """The prompt as the model reads it, the model, the units."""
    return {
        "prompt": {
            "token_ids": list(prompt),
            "tokens": [vocabulary.decoded(i) for i in prompt],
            "spans": [span_json(span) for span in spans],
        },
        "model": {
            "layers": anatomy.layers,
            "heads": anatomy.heads,
            "kv_heads": anatomy.kv_heads,
        },
        "units": UNITS,
        "verified": anatomy.verified,
    }


def span_json(span: Span) -> Json:
    """The role of the tokens [start, end)."""
    return {"role": span.role, "start": span.start, "end": span.end, "section": span.section}


def step(trace: StepTrace, index: int, options: TraceRequest, vocabulary: Vocabulary) -> Json:
    """One token, as ``/v1`` shows it."""
    logprob = _logprob(trace.logprob)
    content: Json = {
        "v": VERSION,
        "index": index,
        "step": trace.step,
        "position": trace.position,
        "token_id": trace.token_id,
        "logprob": logprob,
        "surprisal": 0.0 - logprob,
        "entropy": _round(trace.entropy),
        "rank": trace.rank,
        "sampled": {
            "prob": _round(trace.sampled_prob),
            "entropy": _round(trace.sampled_entropy),
        },
        "topk": [
            {"token_id": i, "token": vocabulary.decoded(i), "logprob": _log(prob)}
            for i, prob in _pairs(trace.top)
        ],
    }
    if options.layers:
        state = _state(trace)
        content["attn"] = [_attention(row, options, state) for row in trace.attention]
    return {**content, **_others(trace, options, vocabulary)}


def describe(model: LoadedModel, request: GenerationRequest) -> Callable[[StepTrace, int], Json]:
    """Return what writes a step of a choice as ``/v1`` shows it, for a run."""
    vocabulary, options = Vocabulary(model.tokenizer), request.trace_options
    assert options is not None
    return lambda trace, index: step(trace, index, options, vocabulary)


def seed_event(trace: StepTrace, options: TraceRequest, vocabulary: Vocabulary) -> Json:
    """One token, as ``/chat/stream`` shows it: as niels-gpt had it, and more.

    ``entropy`` and ``topk`` are of what was drawn from; ``model`` is the model's own view.
    """
    logprob = _logprob(trace.logprob)
    first, *more = trace.attention or (None,)
    content: Json = {
        "step": trace.step,
        "entropy": _round(trace.sampled_entropy),
        "topk": [
            {**_named(i, vocabulary), "prob": _round(prob)} for i, prob in _pairs(trace.sampled_top)
        ],
        "attn": [] if first is None else _rows(first, options),
        "layer": None if first is None else first.layer,
        "key_start": 0 if first is None else first.key_start,
        "model": {
            "logprob": logprob,
            "surprisal": 0.0 - logprob,
            "entropy": _round(trace.entropy),
            "prob": _round(math.exp(logprob)),
            "rank": trace.rank,
            "topk": [
                {**_named(i, vocabulary), "prob": _round(prob)} for i, prob in _pairs(trace.top)
            ],
        },
    }
    if first is not None:
        content |= {"sink": _sink(first), "state": _state(trace)}
    if more:
        content["attn_layers"] = {str(row.layer): _rows(row, options) for row in more}
    return {**content, **_others(trace, options, vocabulary)}


def _others(trace: StepTrace, options: TraceRequest, vocabulary: Vocabulary) -> Json:
    """The fields besides attention, as far as they were requested."""
    content: Json = {}
    if options.lens is not None:
        content["lens"] = [_lens(reading, vocabulary) for reading in trace.lens]
    if options.resid_norms:
        content["resid_norms"] = [_round(norm) for norm in trace.resid_norms]
    if options.probes:
        content["probes"] = [
            {
                "vector": reading.name,
                "layers": list(reading.layers),
                "projection": [_round(each) for each in reading.projections],
                "cosine": [_round(each) for each in reading.cosines],
            }
            for reading in trace.probes
        ]
    if options.features is not None:
        content["features"] = [
            {"id": number, "value": _round(value)} for number, value in trace.features
        ]
    if options.activations:
        content["activations"] = [_activation(own) for own in trace.activations]
    if trace.uncertainty is not None:
        content["uncertainty"] = _uncertainty(trace.uncertainty)
    if options.parts is not None:
        content["parts"] = None if trace.parts is None else _parts(trace.parts, options.parts)
    if options.router:
        content["router"] = [_routed(routed) for routed in trace.router]
    return content


def _uncertainty(own: Uncertainty) -> Json:
    return {
        "entropy": _round(own.entropy),
        "varentropy": _round(own.varentropy),
        "margin": _round(own.margin),
        "settled_layer": own.settled_layer,
        "lens_kl": None if own.lens_kl is None else _round(own.lens_kl),
    }


def _parts(own: LogitParts, options: PartsRequest) -> Json:
    """The largest shares of a logit, and what is left: all together are the logit."""
    values = [share.value for share in own.shares]
    listed = sorted(own.largest(options.topk))
    size = sum(map(abs, values)) + abs(own.constant)
    return {
        "by": options.by,
        "against": options.against,
        "logit": _round(own.logit),
        "model_logit": _round(own.model_logit),
        "shares": [_share(own.shares[at]) for at in listed],
        "rest": _round(sum(values) - sum(values[at] for at in listed)),
        "constant": _round(own.constant),
        "rounding": _round(own.rounding),
        "verified_rel": _round(abs(own.rounding) / size if size else 0.0),
    }


def _share(share: LogitShare) -> Json:
    own: Json = {"head": share.index} if share.part == "head" else {}
    if share.part == "edit":
        own = {"of": share.of}
    return {"part": share.part, "layer": share.layer, **own, "value": _round(share.value)}


def _activation(own: Activation) -> Json:
    """The numbers of a part, or the largest of them with their places."""
    content: Json = {"part": own.part, "layer": own.layer}
    if own.places is None:
        with numpy.errstate(over="ignore"):
            return {**content, **arrays.float16(own.values)}
    return {**content, "idx": own.places.tolist(), "values": arrays.significant(own.values)}


def _attention(row: AttentionRow, options: TraceRequest, state: str) -> Json:
    rows = _rows(row, options)
    weights = rows if isinstance(rows, dict) else {"weights": rows}
    return {
        "layer": row.layer,
        "key_start": row.key_start,
        **weights,
        "sink": _sink(row),
        "state": state,
    }


def _rows(row: AttentionRow, options: TraceRequest) -> Any:
    """The weights of a row (H, K) as the client wants them."""
    if row.keys is not None and row.rest is not None:
        return {
            "shape": [len(row.weights), row.width],
            "idx": row.keys.tolist(),
            "w": arrays.rounded(row.weights),
            "rest": arrays.rounded(row.rest),
        }
    if options.attn == "f16":
        return arrays.float16(row.weights)
    if options.attn == "u8":
        return arrays.uint8(row.weights)
    return arrays.exact(row.weights) if options.attn == "json64" else arrays.rounded(row.weights)


def _sink(row: AttentionRow) -> Any:
    sink: Array | None = row.sink
    return None if sink is None else arrays.rounded(sink)


def _state(trace: StepTrace) -> str:
    """``exact``, or ``truncated`` where the model saw only the end of a text that is too long."""
    return "truncated" if trace.start else "exact"


def _lens(reading: LensReading, vocabulary: Vocabulary) -> Json:
    top = [
        {"token_id": i, "token": vocabulary.decoded(i), "prob": _round(prob)}
        for i, prob in _pairs(reading.top)
    ]
    return {
        "layer": reading.layer,
        **top[0],
        "topk": top,
        "rank_of_sampled": reading.rank_of_sampled,
        "prob_of_sampled": _round(reading.prob_of_sampled),
        "entropy": _round(reading.entropy),
    }


def _routed(routed: Routed) -> Json:
    return {
        "layer": routed.layer,
        "experts": list(routed.experts),
        "weights": [_round(weight) for weight in routed.weights],
        "entropy": _round(routed.entropy),
    }


def _named(token_id: int, vocabulary: Vocabulary) -> Json:
    return {
        "token_id": token_id,
        "token_text": vocabulary.decoded(token_id),
        "token_display": vocabulary.display(token_id),
    }


def _pairs(likely: Likely) -> zip[tuple[int, float]]:
    return zip(likely.token_ids, likely.probs, strict=True)


def _round(value: float) -> float:
    return arrays.digits(value)


def _log(prob: float) -> float:
    return _logprob(math.log(prob)) if prob > 0 else _LOWEST_LOGPROB


def _logprob(value: float) -> float:
    return _round(max(value, _LOWEST_LOGPROB))
