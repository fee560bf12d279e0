"""The positions of an edit: from what a request says to ranges of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from transformers_api.errors import InvalidRequest
from transformers_api.inspection.edit_plan import Range
from transformers_api.serving.text.spans import Span
from transformers_api.serving.text.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class SpanAt:
    """The tokens of messages of one role."""

    role: str


@dataclass(frozen=True, slots=True)
class TextAt:
    """The tokens of a piece of the prompt: of the ``nth`` time that it stands there, from 0."""

    text: str
    nth: int = 0


@dataclass(frozen=True, slots=True)
class StepsAt:
    """The tokens that are read for the output tokens [start, stop), from 0."""

    start: int
    stop: int


At = Literal["all", "prompt", "generated", "last"] | tuple[int, ...] | SpanAt | TextAt | StepsAt


@dataclass(frozen=True, kw_only=True)
class PromptPlaces:
    """A prompt, and where things are in it.

    ``most``: tokens that can be read of prompt and answer. ``window``: of the model, where the text
    may become longer than that; None: it may not.
    """

    ids: Sequence[int]
    most: int
    vocabulary: Vocabulary
    spans: Callable[[], Sequence[Span]]
    window: int | None = None
    prompt_tokens: int | None = None  # of ``ids``, where an answer follows

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return len(self.ids) if self.prompt_tokens is None else self.prompt_tokens


def resolve(at: At, prompt: PromptPlaces, param: str) -> tuple[Range, ...]:
    """The ranges of positions, in order. Raises InvalidRequest with ``param``."""
    length = prompt.length
    if at == ():
        return ()
    if at == "all":
        return ((0, None),)
    if at == "generated":
        return ((length, None),)
    if prompt.window is not None:
        raise InvalidRequest(
            "the text may become longer than the model's window; edits at fixed positions would "
            f"move: use max_tokens <= {max(prompt.window - length, 0)}",
            param=param,
        )
    if isinstance(at, tuple):
        return _of_numbers(at, prompt, param)
    if isinstance(at, StepsAt):
        return ((length - 1 + at.start, length - 1 + at.stop),)
    if isinstance(at, SpanAt):
        return _of_role(at.role, prompt, param)
    if isinstance(at, TextAt):
        return _of_text(at, prompt, param)
    return ((0, length),) if at == "prompt" else ((length - 1, length),)


def single_positions(at: At | list[int], prompt: PromptPlaces, param: str) -> tuple[int, ...]:
    """Positions one by one, in the order in which they are named; "all" are the prompt's.

    Of a list one may be named twice. Raises InvalidRequest.
    """
    if isinstance(at, list | tuple):
        resolve(tuple(at), prompt, param)
        return tuple(place % prompt.length if place < 0 else place for place in at)
    return tuple(
        place
        for start, stop in resolve(at, prompt, param)
        for place in range(start, prompt.length if stop is None else stop)
    )


def _of_numbers(at: tuple[int, ...], prompt: PromptPlaces, param: str) -> tuple[Range, ...]:
    length = prompt.length
    for place in at:
        if not -length <= place < prompt.most:
            raise InvalidRequest(f"{param} must be in [{-length}, {prompt.most - 1}]", param=param)
    return joined(sorted({place % length if place < 0 else place for place in at}))


def joined(places: Sequence[int]) -> tuple[Range, ...]:
    """Ranges of neighbours."""
    ranges: list[tuple[int, int]] = []
    for place in places:
        if ranges and ranges[-1][1] == place:
            ranges[-1] = (ranges[-1][0], place + 1)
        else:
            ranges.append((place, place + 1))
    return tuple(ranges)


def _of_role(role: str, prompt: PromptPlaces, param: str) -> tuple[Range, ...]:
    spans = prompt.spans()
    ranges = [(span.start, span.end) for span in spans if span.role == role]
    if not ranges:
        roles = ", ".join(dict.fromkeys(span.role for span in spans)) or "none"
        raise InvalidRequest(
            f"{param}: the prompt has no message of role '{role}' whose place is known; "
            f"there are: {roles}",
            param=param,
        )
    return tuple(ranges)


def _of_text(at: TextAt, prompt: PromptPlaces, param: str) -> tuple[Range, ...]:
    """The tokens that are partly of the text."""
    pieces = [prompt.vocabulary.token_bytes(token_id) for token_id in prompt.ids]
    whole, part = b"".join(pieces), at.text.encode()
    start = -1
    for _ in range(at.nth + 1):
        start = whole.find(part, start + 1)
        if start < 0:
            times = whole.count(part)
            raise InvalidRequest(
                f"{param}: the prompt has the text '{at.text[:64]}' {times} times, "
                f"and not at {at.nth}",
                param=param,
            )
    ends = list(accumulate(map(len, pieces)))
    places = [
        place
        for place, end in enumerate(ends)
        if end > start and end - len(pieces[place]) < start + len(part)
    ]
    return joined(places)
