"""The tokens of one choice, as they come, to the pieces of its text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from transformers_api.engine.base import FinishReason, SamplingParams, TokenOutput, TokenScore
from transformers_api.inspection.base import StepTrace
from transformers_api.serving.swap.loaded_model import LoadedModel
from transformers_api.serving.text.detokenizer import detokenizer
from transformers_api.serving.text.stop_strings import (
    StopStrings,
    mark_special_tokens,
    without_marks,
)
from transformers_api.serving.tools.spec import Part

NO_MARKS: Mapping[int, str] = MappingProxyType({})


class TopToken(NamedTuple):
    """A token that could have stood there."""

    token_id: int
    text: str
    bytes: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenDetail:
    r"""One token with its score; ``text`` is like ``bytes:\xe2\x98`` for part of a character.

    ``logprob`` is None for the first token of a prompt, which nothing predicts.
    """

    token_id: int
    text: str
    bytes: bytes
    logprob: float | None
    top: tuple[TopToken, ...] = ()
    offset: int = 0  # characters of the answer before it; of a prompt's token 0
    rank: int | None = None  # of a prompt's token: 1 is the likeliest


@dataclass(slots=True, kw_only=True)  # not frozen: that would cost a token more than its text
class TextDelta:
    """The next piece of one choice; the last piece of each choice has ``finish_reason``.

    ``token_ids`` are all generated tokens, also those that ended the choice; ``logprobs`` only
    those of the text. Both come with the piece that completes their text.
    """

    index: int  # of the choice: all choices of the first prompt, then of the second, …
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenDetail, ...] = ()  # when asked for
    finish_reason: str | None = None  # "stop" or "length"
    stop_reason: str | int | None = None  # the stop string or token id; None at the model's own
    prompt_scores: tuple[TokenDetail, ...] | None = None  # first piece, when asked for
    trace: StepTrace | None = None  # when asked for: then every token has a piece of its own
    parts: tuple[Part, ...] | None = None  # by an upstream, which has told them apart already
    reasoning_tokens: int = 0  # of the whole answer, as an upstream counts them


@dataclass(slots=True)
class _Waiting:
    """A token whose text is not out yet."""

    token_id: int
    detail: TokenDetail | None
    start: int  # characters of the choice before its text
    end: int | None = None  # and after it; None while a character is unfinished


class ChoiceText:
    """Detokenizes, looks for stop strings and keeps count, for one choice."""

    def __init__(
        self,
        index: int,
        prompt_ids: Sequence[int],
        model: LoadedModel,
        params: SamplingParams,
        stop: Sequence[str],
        trace_stops: bool = False,
        shows_stop: bool = False,
        marks: Mapping[int, str] = NO_MARKS,
        strips_blank: bool = False,
    ) -> None:
        self.index = index
        self.finished = False
        self.token_ids: list[int] = []  # generated so far, the one that ends it included
        self.cached_tokens = 0
        self._prompt_ids = prompt_ids
        self._vocabulary = vocabulary = model.vocabulary
        self._params = params
        self._eos_token_ids = model.engine.eos_token_ids
        self._detokenizer = detokenizer(model.tokenizer, prompt_ids, vocabulary=vocabulary)
        self._marks, stops = mark_special_tokens(stop, vocabulary)
        self._stops = StopStrings(stops, included=shows_stop) if stops else None
        self._shows_stop = shows_stop
        self._originals = stops
        scored = params.logprobs is not None or params.prompt_logprobs is not None
        has_stages = self._stops is not None or bool(marks) or strips_blank
        self._is_plain = not scored and not has_stages
        self._marks = {**self._marks, **marks}
        self._strips_blank = strips_blank  # as long as nothing else has come
        self._trace_stops = trace_stops
        self._waiting: list[_Waiting] = []
        self._decoded = 0  # characters
        self._sent = 0  # characters
        self._logprobs: list[float] = []

    @property
    def completion_tokens(self) -> int:
        """Generated so far."""
        return len(self.token_ids)

    @property
    def mean_logprob(self) -> float:
        """Of all generated tokens; 0 where no scores came."""
        return sum(self._logprobs) / len(self._logprobs) if self._logprobs else 0.0

    def take(self, output: TokenOutput) -> TextDelta | None:
        """The piece that this output makes complete; None while everything is held back."""
        if not self._is_plain or output.finish_reason or output.extras or self._waiting:
            return self._take(output)
        # Nearly every token: it is text, and nothing else is to be noted of it.
        token_id = output.token_id
        assert token_id is not None
        self.cached_tokens += output.cached_tokens
        self.token_ids.append(token_id)
        text = self._detokenizer.push(token_id)
        if not text:
            self._waiting.append(_Waiting(token_id, None, self._decoded))
            return None
        self._decoded += len(text)
        self._sent += len(text)
        return TextDelta(index=self.index, text=text, token_ids=(token_id,))

    def _take(self, output: TokenOutput) -> TextDelta | None:
        is_text = self._shows_stop or output.finish_reason is not FinishReason.STOP
        self._count(output)
        text, matched = self._decode(output, is_text), None
        stops, self.finished = self._stops, output.finish_reason is not None
        if stops is not None:
            if len(self.token_ids) > self._params.min_tokens:
                text, match = stops.push(text)
                matched = None if match is None else self._originals[match]
            self.finished = self.finished or matched is not None
            if self.finished:
                text += stops.flush()  # nothing after a match
        self._sent += len(text)
        if self._strips_blank and not (matched is not None and self._shows_stop):
            text = text.lstrip()
            self._strips_blank = not text
        scores = output.prompt_scores
        prompt_scores = None if scores is None else self._prompt_details(scores)
        trace: StepTrace | None = None
        if is_text or self._trace_stops:
            trace = output.extras.get("trace")
        if not (text or self.finished or prompt_scores is not None or trace):
            return None
        ready = self._take_ready()
        ended_by = () if is_text or output.token_id is None else (output.token_id,)
        details = (token.detail for token in ready if matched is None or token.start < self._sent)
        return TextDelta(
            index=self.index,
            text=self._visible(text, matched) if self._marks else text,
            token_ids=(*(token.token_id for token in ready), *ended_by),
            logprobs=tuple(detail for detail in details if detail is not None),
            finish_reason=self._finish_reason(output, matched) if self.finished else None,
            stop_reason=self._stop_token(output) if matched is None else matched,
            prompt_scores=prompt_scores,
            trace=trace,
        )

    def _visible(self, text: str, matched: str | None) -> str:
        """``text`` as a client may read it; of special tokens only those of its own stop string."""
        if matched is None or not self._shows_stop:
            return without_marks(text)
        ends = (stop for stop, original in self._originals.items() if original == matched)
        end = next(stop for stop in ends if text.endswith(stop))
        return without_marks(text.removesuffix(end)) + matched

    def _count(self, output: TokenOutput) -> None:
        self.cached_tokens += output.cached_tokens
        if output.token_id is not None:
            self.token_ids.append(output.token_id)
        if output.score is not None:
            self._logprobs.append(output.score.logprob)

    def _decode(self, output: TokenOutput, is_text: bool) -> str:
        text, token_id = "", output.token_id
        if token_id is not None and is_text:
            # What is unfinished becomes one character, which counts with its first token.
            start = self._decoded + self._detokenizer.is_unfinished
            detail = None
            if self._params.logprobs is not None and output.score is not None:
                detail = self._detail(output.score, start)
            self._waiting.append(_Waiting(token_id, detail, start))
            text = self._detokenizer.push(token_id) + self._marks.get(token_id, "")
        is_over = output.finish_reason is not None
        if is_over:
            text += self._detokenizer.flush()
        self._decoded += len(text)
        if text or is_over:
            # The bytes of an unfinished character behind a finished one are the newest token's.
            whole = self._waiting
            if not is_over and self._detokenizer.is_unfinished:
                whole = whole[:-1]
            for token in whole:
                token.end = self._decoded if token.end is None else token.end
        return text

    def _take_ready(self) -> list[_Waiting]:
        """The tokens whose text is out; at the end all."""
        count = 0
        for token in self._waiting:
            if not self.finished and (token.end is None or token.end > self._sent):
                break
            count += 1
        ready, self._waiting = self._waiting[:count], self._waiting[count:]
        return ready

    def _finish_reason(self, output: TokenOutput, matched: str | None) -> str:
        # A stop string in the very last token is a stop, also where max_tokens came with it.
        by_length = output.finish_reason is FinishReason.LENGTH and matched is None
        return "length" if by_length else "stop"

    def _stop_token(self, output: TokenOutput) -> int | None:
        is_stop = output.finish_reason is FinishReason.STOP
        return output.token_id if is_stop and output.token_id not in self._eos_token_ids else None

    def _prompt_details(self, scores: Sequence[TokenScore | None]) -> tuple[TokenDetail, ...]:
        return tuple(
            self._detail(score) if score is not None else self._unscored(token_id)
            for token_id, score in zip(self._prompt_ids, scores, strict=True)
        )

    def _unscored(self, token_id: int) -> TokenDetail:
        vocabulary = self._vocabulary
        text, raw = vocabulary.token_text(token_id), vocabulary.token_bytes(token_id)
        return TokenDetail(token_id, text, raw, None)

    def _detail(self, score: TokenScore, offset: int = 0) -> TokenDetail:
        vocabulary = self._vocabulary
        top = tuple(
            TopToken(i, vocabulary.token_text(i), vocabulary.token_bytes(i), logprob)
            for i, logprob in score.top
        )
        i = score.token_id
        text, raw = vocabulary.token_text(i), vocabulary.token_bytes(i)
        return TokenDetail(i, text, raw, score.logprob, top, offset, score.rank)
