"""A gap to be filled: a completion of a body, and the answer as llama-server has it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers_api.api.http.dialects import LLAMA_CPP
from transformers_api.api.http.request_context import Formatter
from transformers_api.api.openai import requests
from transformers_api.api.openai.views import CompletionTask
from transformers_api.config.settings import Settings
from transformers_api.serving.generation import Generation, GenerationRequest, collect
from transformers_api.serving.swap.loaded_model import LoadedModel
from transformers_api.serving.text import infilling
from transformers_api.serving.text.choice_text import TextDelta
from transformers_api.serving.text.infilling import OtherFile

Json = dict[str, Any]
EXTRA = "input_extra"


class InfillTask(CompletionTask):
    """A completion whose prompt stands around it."""

    field = "input_prefix"
    is_relayed = False

    def __init__(self, body: Mapping[str, Any]) -> None:
        prefix = body["input_prefix"] + body["prompt"]
        # With no tokens to be made one is made and left out: the prompt is read for later.
        self._only_reads = body["max_tokens"] == 0
        most = 1 if self._only_reads else body["max_tokens"]
        shared = {"prompt": [prefix], "add_special_tokens": True, "echo": False, "max_tokens": most}
        super().__init__({**body, **shared})
        self.suffix = body["input_suffix"]
        self.files = [OtherFile(file["filename"], file["text"]) for file in body[EXTRA]]
        self.texts = [prefix, body["input_suffix"]]
        self.texts += [text for file in self.files for text in (file.name, file.text)]

    def prepare(self, model: LoadedModel, settings: Settings) -> GenerationRequest:
        """See Task."""
        request = super().prepare(model, settings)
        return replace(request, constrain=None) if self._only_reads else request

    def encoded(
        self, model: LoadedModel, max_tokens: int
    ) -> tuple[list[list[int]], frozenset[int]]:
        """See CompletionTask."""
        tokens = requests.infill_tokens(model, "input_suffix")
        (prefix,) = self.body["prompt"]
        ids = infilling.encode(tokens, prefix, self.suffix or "", files=self.files)
        return [ids], tokens.ends

    def formatter(self, model: LoadedModel, request: GenerationRequest) -> Formatter:
        """See Task."""
        name = self.body.get("model") or model.spec.name
        return InfillFormatter(name, request.prompts, only_reads=self._only_reads)


class InfillFormatter(Formatter):
    """The text in the gap, whole or in pieces."""

    dialect = LLAMA_CPP

    def __init__(
        self, model: str, prompts: Sequence[Sequence[int]], *, only_reads: bool = False
    ) -> None:
        self.prompts = prompts
        self._model = model
        self._only_reads = only_reads
        self._reason: tuple[str, str | int | None] = ("length", None)
        self._began = time.monotonic()

    def whole(self, generation: Generation) -> Json:
        """The whole answer."""
        (choice,) = collect(generation)
        self._reason = choice.finish_reason, choice.stop_reason
        return self._last(generation, "" if self._only_reads else choice.text)

    def frames(self, delta: TextDelta) -> Sequence[bytes]:
        """An event for each piece."""
        if delta.finish_reason is not None:
            self._reason = delta.finish_reason, delta.stop_reason
        if not delta.text or self._only_reads:
            return ()
        piece = {"index": 0, "content": delta.text, "tokens": [], "stop": False}
        return (self.dialect.frame(piece),)

    def closing(self, generation: Generation | None) -> Iterator[bytes]:
        """The last event, with counts and times."""
        assert generation is not None
        yield self.dialect.frame(self._last(generation, ""))

    def _last(self, generation: Generation, content: str) -> Json:
        used, now = generation.usage, time.monotonic()
        first = generation.first_token_at or now
        reason, stop = self._reason
        word = stop if isinstance(stop, str) else ""
        predicted = 0 if self._only_reads else used.completion_tokens
        return {
            "index": 0,
            "content": content,
            "tokens": [],
            "id_slot": -1,
            "stop": True,
            "model": self._model,
            "stop_type": "limit" if reason == "length" else "word" if word else "eos",
            "stopping_word": word,
            "tokens_predicted": predicted,
            "tokens_evaluated": used.prompt_tokens,
            "tokens_cached": used.cached_tokens,
            "truncated": False,
            "timings": {
                **_pace("prompt", used.prompt_tokens - used.cached_tokens, first - self._began),
                **_pace("predicted", predicted, now - first),
            },
        }


def _pace(name: str, tokens: int, seconds: float) -> Json:
    milliseconds = max(seconds, 0.0) * 1e3
    return {
        f"{name}_n": tokens,
        f"{name}_ms": milliseconds,
        f"{name}_per_token_ms": milliseconds / tokens if tokens else 0.0,
        f"{name}_per_second": tokens * 1e3 / milliseconds if milliseconds else 0.0,
    }
