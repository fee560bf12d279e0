"""The tokens of a prompt that are somebody's message, or a system turn of the template."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from transformers_api.errors import InvalidRequest
from transformers_api.serving.swap.loaded_model import LoadedModel
from transformers_api.serving.text import chat_template
from transformers_api.serving.text.vocabulary import Vocabulary
from transformers_api.serving.tools.spec import Tool


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens [start, end) of a prompt. A token that is partly of it counts."""

    role: str
    start: int
    end: int
    # "template": words of a turn that the template adds. What is in no span marks the turns.
    section: str = "content"


def spans(
    model: LoadedModel,
    messages: Sequence[Mapping[str, Any]],
    ids: Sequence[int],
    *,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    tools: Sequence[Tool] = (),
    hint: str = "",
) -> list[Span]:
    """The place of each message in ``ids``, which ``encode`` made of ``messages``.

    Before them stands the system turn that a template adds where the messages have none.

    Empty where that cannot be known: a template that rewrites what was said, a tokenizer whose
    tokens are not the text.
    """
    options: dict[str, Any] = {
        "add_generation_prompt": (
            not continue_final_message if add_generation_prompt is None else add_generation_prompt
        ),
        "continue_final_message": continue_final_message,
        "chat_template_kwargs": chat_template_kwargs,
        "tools": tools,
        "hint": hint,
    }
    try:
        text = chat_template.render(model, messages, **options).encode()
        frame = chat_template.render(model, _probes(messages), **options).encode()
    except InvalidRequest:
        return []
    places = _places(text, frame, [chat_template.content_text(message) for message in messages])
    tokens = _token_ends(model, ids, text)
    if places is None or tokens is None:
        return []
    offset, ends = tokens
    added = _added_system(model, messages, text[: places[0][0]], options)
    turns = [] if added is None else [("system", added, "template")]
    turns += [(m["role"], at, "content") for m, at in zip(messages, places, strict=True)]
    result = []
    for role, (start, stop), section in turns:
        first = bisect_right(ends, offset + start)
        last = bisect_left(ends, offset + stop) + 1
        result.append(Span(role, first, last if stop > start else first, section))
    return result


def _added_system(
    model: LoadedModel,
    messages: Sequence[Mapping[str, Any]],
    before: bytes,
    options: Mapping[str, Any],
) -> tuple[int, int] | None:
    """[start, stop) of what the template says as the system, in the text ``before`` all messages.

    A system turn of ours shows what stands around one: a turn of the template has the same marks,
    and words before ours, such as a date, are its own, too.
    """
    has_own = messages[0]["role"] in ("system", "developer")
    others = messages[1:] if has_own else messages
    if not others:
        return None
    ours = _probe(len(messages))
    turns = [{"role": "system", "content": ours}, *_probes(others)]
    try:
        frame = chat_template.render(model, turns, **options).encode()
    except InvalidRequest:  # it takes none
        return None
    head, _, rest = frame.partition(ours.encode())
    between, probe, _ = rest.partition(_probe(0).encode())
    if not (probe and before.startswith(head) and (has_own or before.endswith(between))):
        return None
    start = _marks_end(head, between, str(others[0]["role"]).encode())
    stop = len(head) if has_own else len(before) - len(between)
    return (start, stop) if before[start:stop].strip() else None


def _marks_end(head: bytes, between: bytes, role: bytes) -> int:
    """The end of the marks with which a system turn begins in ``head``.

    They are those of the next turn, whose are the last in ``between``, with another role.
    """
    for start in range(between.rfind(role) + 1):
        marks = between[start:].replace(role, b"system")
        if (at := head.rfind(marks)) >= 0:
            return at + len(marks)
    return len(head)


def _probe(place: int) -> str:
    return f"qzprobe{place}qz"


def _probes(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The conversation with a word of ours in place of each content: shows what stands around."""
    return [{**message, "content": _probe(place)} for place, message in enumerate(messages)]


def _places(text: bytes, frame: bytes, contents: Sequence[str]) -> list[tuple[int, int]] | None:
    """[start, stop) of each content in ``text``, of which ``frame`` shows the rest."""
    parts: list[bytes] = []
    for place in range(len(contents)):
        before, probe, frame = frame.partition(_probe(place).encode())
        if not probe:
            return None
        parts.append(before)
    parts.append(frame)
    if not text.startswith(parts[0]):
        return None
    at, places = len(parts[0]), []
    for content, after in zip(contents, parts[1:], strict=True):
        # Templates often cut white space off.
        variants = (content, content.strip(), content.lstrip(), content.rstrip())
        here = next((s for s in map(str.encode, variants) if text.startswith(s + after, at)), None)
        if here is None:
            return None
        places.append((at, at + len(here)))
        at += len(here) + len(after)
    return places if at == len(text) else None


def _token_ends(
    model: LoadedModel, ids: Sequence[int], text: bytes
) -> tuple[int, list[int]] | None:
    """(where the text begins, where each token ends), in bytes; None if the tokens are not it."""
    vocabulary = Vocabulary(model.tokenizer)
    pieces = [vocabulary.token_bytes(i) for i in ids]
    offset = b"".join(pieces).find(text)
    return None if offset < 0 else (offset, list(accumulate(map(len, pieces))))
