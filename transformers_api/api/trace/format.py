"""What was noted of every token: from plain data to JSON. Numbers have 5 decimals."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from transformers_api.api.http import strict_json
from transformers_api.inspection.base import (
    Anatomy,
    Array,
    AttentionRow,
    LensReading,
    Likely,
    Routed,
    StepTrace,
)
from transformers_api.serving.inspect import arrays
from transformers_api.serving.inspect.trace_plan import TraceRequest
from transformers_api.serving.models.spec import LoadedModel
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
        asked: TraceRequest,
        prompts: Sequence[Sequence[int]],
        spans: Sequence[Span] = (),
    ) -> None:
        assert model.inspector is not None
        self._anatomy = model.inspector.anatomy
        self._words = Vocabulary(model.tokenizer)
        self._asked = asked
        self._prompts = prompts
        self._spans = spans
        self._bytes = 0
        self._seconds = 0.0

    def header(self, prompt: int, index: int) -> Any:
        """What the traces of the answer ``index`` are about."""
        begun = time.perf_counter()
        told = header(self._anatomy, self._words, self._prompts[prompt], self._spans)
        return self._written({"v": VERSION, "index": index, **told}, begun)

    def step(self, trace: StepTrace, index: int, **more: Any) -> Any:
        """One token of the answer ``index``, and ``more`` beside it."""
        begun = time.perf_counter()
        return self._written({**step(trace, index, self._asked, self._words), **more}, begun)

    def event(self, trace: StepTrace) -> Any:
        """One token, as ``seed_event`` has it."""
        begun = time.perf_counter()
        return self._written(seed_event(trace, self._asked, self._words), begun)

    @property
    def usage(self) -> Json:
        """Bytes of JSON and milliseconds of work so far."""
        return {"bytes": self._bytes, "ms": round(self._seconds * 1000, 3)}

    def _written(self, value: Json, begun: float) -> Any:
        """``value`` as JSON that is ready to be put into a larger one."""
        text = strict_json.dump(value)
        self._bytes += len(text)
        self._seconds += time.perf_counter() - begun
        return strict_json.ready(text)


def header(
    anatomy: Anatomy, words: Vocabulary, prompt: Sequence[int], spans: Sequence[Span]
) -> Json:
    """The prompt as the model reads it, the model, the units."""
    return {
        "prompt": {
            "token_ids": list(prompt),
            "tokens": [words.decoded(i) for i in prompt],
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
    """Who said the tokens [start, end)."""
    return {"role": span.role, "start": span.start, "end": span.end, "section": span.section}


def step(trace: StepTrace, index: int, asked: TraceRequest, words: Vocabulary) -> Json:
    """What ``/v1`` shows of a token."""
    logprob = _logprob(trace.logprob)
    told: Json = {
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
            {"token_id": i, "token": words.decoded(i), "logprob": _log(prob)}
            for i, prob in _pairs(trace.top)
        ],
    }
    if asked.layers:
        state = _state(trace)
        told["attn"] = [_attention(row, asked, state) for row in trace.attention]
    return {**told, **_others(trace, asked, words)}


def seed_event(trace: StepTrace, asked: TraceRequest, words: Vocabulary) -> Json:
    """What ``/chat/stream`` shows of a token, as niels-gpt had it and more.

    ``entropy`` and ``topk`` are of what was drawn from; ``model`` is the model's own view.
    """
    logprob = _logprob(trace.logprob)
    first, *more = trace.attention or (None,)
    told: Json = {
        "step": trace.step,
        "entropy": _round(trace.sampled_entropy),
        "topk": [
            {**_named(i, words), "prob": _round(prob)} for i, prob in _pairs(trace.sampled_top)
        ],
        "attn": [] if first is None else _rows(first, asked),
        "layer": None if first is None else first.layer,
        "key_start": 0 if first is None else first.key_start,
        "model": {
            "logprob": logprob,
            "surprisal": 0.0 - logprob,
            "entropy": _round(trace.entropy),
            "prob": _round(math.exp(logprob)),
            "rank": trace.rank,
            "topk": [{**_named(i, words), "prob": _round(prob)} for i, prob in _pairs(trace.top)],
        },
    }
    if first is not None:
        told |= {"sink": _sink(first), "state": _state(trace)}
    if more:
        told["attn_layers"] = {str(row.layer): _rows(row, asked) for row in more}
    return {**told, **_others(trace, asked, words)}


def _others(trace: StepTrace, asked: TraceRequest, words: Vocabulary) -> Json:
    """What there is besides attention, as far as it was asked for."""
    told: Json = {}
    if asked.lens is not None:
        told["lens"] = [_lens(reading, words) for reading in trace.lens]
    if asked.resid_norms:
        told["resid_norms"] = [_round(norm) for norm in trace.resid_norms]
    if asked.router:
        told["router"] = [_routed(routed) for routed in trace.router]
    return told


def _attention(row: AttentionRow, asked: TraceRequest, state: str) -> Json:
    rows = _rows(row, asked)
    shown = rows if isinstance(rows, dict) else {"weights": rows}
    return {
        "layer": row.layer,
        "key_start": row.key_start,
        **shown,
        "sink": _sink(row),
        "state": state,
    }


def _rows(row: AttentionRow, asked: TraceRequest) -> Any:
    """The weights of a row (H, K) as the client wants them."""
    if row.keys is not None and row.rest is not None:
        return {
            "shape": [len(row.weights), row.width],
            "idx": row.keys.tolist(),
            "w": arrays.rounded(row.weights),
            "rest": arrays.rounded(row.rest),
        }
    if asked.attn == "f16":
        return arrays.float16(row.weights)
    if asked.attn == "u8":
        return arrays.uint8(row.weights)
    return arrays.exact(row.weights) if asked.attn == "json64" else arrays.rounded(row.weights)


def _sink(row: AttentionRow) -> Any:
    sink: Array | None = row.sink
    return None if sink is None else arrays.rounded(sink)


def _state(trace: StepTrace) -> str:
    """Whether the model saw the whole text or, once that is too long, the end of it."""
    return "truncated" if trace.start else "exact"


def _lens(reading: LensReading, words: Vocabulary) -> Json:
    top = [
        {"token_id": i, "token": words.decoded(i), "prob": _round(prob)}
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


def _named(token_id: int, words: Vocabulary) -> Json:
    return {
        "token_id": token_id,
        "token_text": words.decoded(token_id),
        "token_display": words.display(token_id),
    }


def _pairs(likely: Likely) -> zip[tuple[int, float]]:
    return zip(likely.token_ids, likely.probs, strict=True)


def _round(value: float) -> float:
    return round(value, arrays.DECIMALS)


def _log(prob: float) -> float:
    return _logprob(math.log(prob)) if prob > 0 else _LOWEST_LOGPROB


def _logprob(value: float) -> float:
    return _round(max(value, _LOWEST_LOGPROB))
