"""The native API's answers: from pieces of text to dictionaries and events. No Flask."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers_api.api.http.dialects import PLAIN
from transformers_api.api.http.request_context import Formatter
from transformers_api.serving.generation import Generation
from transformers_api.serving.models.description import Description
from transformers_api.serving.models.spec import ModelSpec
from transformers_api.serving.swap.residency import SwapperStatus
from transformers_api.serving.text.choice_text import TextDelta

log = logging.getLogger(__name__)
Json = dict[str, Any]

# What a model's shape is called here, and in the configurations of transformers.
_SHAPE = {
    "vocab_size": ("vocab_size",),
    "block_size": ("block_size", "prompt_window", "n_positions", "max_position_embeddings"),
    "n_embd": ("n_embd", "hidden_size"),
    "n_head": ("n_head", "num_attention_heads"),
    "n_layer": ("n_layer", "num_hidden_layers"),
    "n_experts": ("n_experts", "num_experts", "num_local_experts"),
    "top_experts": ("top_experts", "num_experts_per_tok"),
}


@dataclass(frozen=True, kw_only=True)
class Heading:
    """The fields of a request that its answer repeats."""

    model: str
    prompts: Sequence[str]
    is_batch: bool  # then prompts, texts and counts are lists
    full_text: bool
    parameters: Mapping[str, Any]


class GenerateFormatter(Formatter):
    """The answer of /generate, whole and as events."""

    dialect = PLAIN

    def __init__(
        self,
        heading: Heading,
        prompts: Sequence[Sequence[int]],
        began: float,
        encoded: float,
    ) -> None:
        self.prompts = prompts
        self._heading = heading
        self._began = began  # time.perf_counter(), as the others
        self._encoded = encoded
        self._first: float | None = None
        self._pieces: list[list[str]] = [[] for _ in prompts]
        self._tokens = [0] * len(prompts)
        self._reasons = [""] * len(prompts)

    def whole(self, generation: Generation) -> Json:
        """The whole answer."""
        for delta in generation:
            if delta is not None:
                self._take(delta)
        return self._complete(generation)

    def frames(self, delta: TextDelta) -> Sequence[bytes]:
        """An event with the piece of text, where there is any."""
        self._take(delta)
        if not delta.text:
            return ()
        return (self.dialect.frame({"index": delta.index, "text": delta.text}),)

    def closing(self, generation: Generation | None) -> Iterator[bytes]:
        """The whole answer."""
        if generation is not None:
            yield self.dialect.frame({"done": True, **self._complete(generation)})

    def _take(self, delta: TextDelta) -> None:
        if delta.text and self._first is None:
            self._first = time.perf_counter()
        self._pieces[delta.index].append(delta.text)
        self._tokens[delta.index] += len(delta.token_ids)
        if delta.finish_reason is not None:
            self._reasons[delta.index] = delta.finish_reason
            # Not a stop string, then the token that ended it, which is no text.
            ended_by_token = delta.finish_reason == "stop" and not isinstance(
                delta.stop_reason, str
            )
            self._tokens[delta.index] -= ended_by_token

    def _complete(self, generation: Generation) -> Json:
        generated = time.perf_counter()
        heading, texts = self._heading, ["".join(pieces) for pieces in self._pieces]
        if heading.full_text:
            texts = [prompt + text for prompt, text in zip(heading.prompts, texts, strict=True)]
        spent_s = generated - self._encoded
        count = sum(self._tokens)
        log.info("%s: %d tokens in %.3f s (%.1f/s)", heading.model, count, spent_s, count / spent_s)
        return {
            "generated_text": self._one_or_many(texts),
            "prompt": self._one_or_many(heading.prompts),
            "model_used": heading.model,
            "model": heading.model,
            "tokens_generated": self._one_or_many(self._tokens),
            "finish_reason": self._one_or_many(self._reasons),
            "generation_time": round(spent_s, 3),
            "tokens_per_second": round(count / spent_s, 2),
            "parameters": dict(heading.parameters),
            "timings": {
                "encode_ms": _ms(self._encoded - self._began),
                "time_to_first_token_ms": _ms((self._first or generated) - self._encoded),
                "generation_ms": _ms(spent_s),
                "decode_ms": _ms(time.perf_counter() - generated),
                "total_ms": _ms(time.perf_counter() - self._began),
                "avg_ms_per_token": _ms(spent_s / count) if count else 0.0,
                "prompt_tokens": generation.usage.prompt_tokens,
            },
        }

    def _one_or_many(self, values: Sequence[Any]) -> Any:
        return list(values) if self._heading.is_batch else values[0]


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 3)


def model(spec: ModelSpec, files: Description, refusal: str | None, status: SwapperStatus) -> Json:
    """A model of the list: what the registry says of it, else its files."""
    described = {
        "name": spec.name,
        "description": spec.metadata.get("description", ""),
        "parameters": spec.metadata.get("parameter_count") or _rounded(files.parameters),
        "loaded": status.holds(spec.name),
        "config": spec.metadata.get("config") or _shape(files.config),
    }
    return described if refusal is None else {**described, "servable": False, "reason": refusal}


def _rounded(parameters: int | None) -> str | None:
    """A number as people name a model's size: 51M, 1.3B."""
    if parameters is None:
        return None
    if parameters >= 1_000_000_000:
        return f"{parameters / 1e9:.3g}B"
    if parameters >= 1_000_000:
        return f"{parameters / 1e6:.0f}M"
    return f"{parameters / 1e3:.0f}K" if parameters >= 1000 else str(parameters)


def model_state(spec: ModelSpec, status: SwapperStatus, error: str | None) -> Json:
    """The progress of a model's loading; ``error``: of the last load that failed."""
    is_coming = status.loading == spec.resident.name
    if status.holds(spec.name):
        state = "loaded"
    elif is_coming or spec.name in status.waiting:
        state = "loading"
    else:
        state = "failed" if error else "not_loaded"
    return {
        "state": state,
        "progress": status.progress if is_coming else float(state == "loaded"),
        "progress_text": status.progress_text if is_coming else "",
        "error": error if state == "failed" else None,
    }


def _shape(config: Mapping[str, Any]) -> Json:
    """The shape in a configuration, in TinyGPT's words."""
    shape = {
        name: next((config[key] for key in keys if config.get(key) is not None), None)
        for name, keys in _SHAPE.items()
    }
    if not shape["n_experts"]:
        del shape["n_experts"], shape["top_experts"]
    return {name: value for name, value in shape.items() if value is not None}
