"""From the body of an inspection to tokens of a leased model, and whether that much may be asked.

The order of the checks is documented: the body, may one look inside at all, is the model of the
start there, how often, how much text, what is in range, how many numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from transformers_api.api.http import inspect_auth
from transformers_api.api.http.request_context import RequestContext
from transformers_api.api.http.services import services
from transformers_api.api.intervene import format as intervene_format
from transformers_api.api.openai import requests
from transformers_api.config.settings import Settings
from transformers_api.engine.base import SamplingParams
from transformers_api.errors import (
    InvalidRequest,
    ModelNotCapable,
    PromptTooLarge,
    ResponseTooLarge,
)
from transformers_api.inspection.base import Anatomy
from transformers_api.inspection.edit_plan import EditPlan
from transformers_api.inspection.questions import Edited, Inspected, Question
from transformers_api.serving.generation import GenerationRequest, collect
from transformers_api.serving.inspect.edit_positions import PromptPlaces
from transformers_api.serving.inspect.edit_request import ForceRequest, InterveneRequest
from transformers_api.serving.inspect.interventions import PlannedEdits
from transformers_api.serving.inspect.recent_completions import Completion
from transformers_api.serving.swap.loaded_model import LoadedModel
from transformers_api.serving.text import chat_template
from transformers_api.serving.text.chat_template import ChatPrompt
from transformers_api.serving.text.spans import Span, spans
from transformers_api.serving.text.vocabulary import Vocabulary

T = TypeVar("T")
UNEDITED = (
    "the answer was written with edits, and this is about the model without them; ask with its "
    "intervene"
)
Format = Literal["json", "f16", "u8", "npz", "png", "html"]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The tokens that are looked at, in a model that stays until the request is answered."""

    context: RequestContext
    model: LoadedModel
    inspector: Inspected
    ids: list[int]
    messages: Sequence[Mapping[str, Any]] = ()
    prompt: ChatPrompt | None = None  # which they are
    is_truncated: bool = False  # the model sees only the end of what was given
    intervene: InterveneRequest | None = None
    edits: PlannedEdits | None = None
    completion: Completion | None = None  # a recent answer, which they are

    @property
    def anatomy(self) -> Anatomy:
        """The parts of the model."""
        return self.inspector.anatomy

    @property
    def settings(self) -> Settings:
        """Those of the server."""
        return self.context.services.settings

    @property
    def plan(self) -> EditPlan | None:
        """The edits that are in effect."""
        return None if self.edits is None else self.edits.plan

    @property
    def edit_header(self) -> Mapping[str, Any]:
        """The field ``intervene`` of the answer; {}: nobody asked for edits, then or now."""
        if self.edits is None and self.completion is not None and self.completion.is_edited:
            return {"intervene": {"edits": [], "note": UNEDITED}}
        return intervene_format.header([self.edits], 0) if self.edits else {}

    def edited(self, prompt_tokens: int | None) -> Subject:
        """With the edits that were asked for. Raises what ``Planner.planned`` does."""
        if self.intervene is None:
            return self
        if any(isinstance(each, ForceRequest) for each in self.intervene.edits):
            raise InvalidRequest(
                "force is of tokens that are written, and these are read", param="intervene"
            )
        place = PromptPlaces(
            ids=self.ids,
            most=len(self.ids),
            vocabulary=self.model.vocabulary,
            spans=self.spans,
            window=self.model.engine.max_model_len if self.is_truncated else None,
            prompt_tokens=prompt_tokens,
        )
        (edits,) = self.context.planner.planned(self.model, self.intervene, [place])
        return replace(self, edits=edits)

    def spans(self) -> list[Span]:
        """The place of each message; empty where there are none, or the model does not see all."""
        if not self.messages or self.is_truncated:
            return []
        return spans(self.model, self.messages, self.ids)

    def ask(self, question: Question[T]) -> T:
        """The answer to the question, once it is its turn."""
        inspections = self.context.services.inspections
        return inspections.ask(self.model, self.of_edited(question), self.context.cancellation)

    def of_edited(self, question: Question[T]) -> Question[T]:
        """The question of the model with the edits that were asked for."""
        return question if self.plan is None else Edited(question, self.plan)

    def continued(self, body: Mapping[str, Any]) -> Subject:
        """With what the model writes next: ``max_new_tokens`` of it, drawn with ``seed``."""
        max_new_tokens = body["max_new_tokens"]
        if not max_new_tokens:
            return self
        check_tokens(len(self.ids) + max_new_tokens, self.settings.inspect_max_tokens)
        if self.model.engine.context_overflow is None:
            requests.fit(
                max_new_tokens,
                len(self.ids),
                self.model.engine.max_model_len,
                explicit=True,
                param="prompt",
                max_tokens_param="max_new_tokens",
            )
        prompt = self.prompt or ChatPrompt(self.ids)
        params = SamplingParams(
            max_tokens=max_new_tokens,
            temperature=body["temperature"],
            top_k=max(body["top_k"], 0),
            top_p=body["top_p"],
            seed=body["seed"],
            stop_token_ids=prompt.stop_token_ids,
        )
        own_stops = requests.stop_strings(self.model.spec.generation)
        request = GenerationRequest(
            [self.ids],
            params,
            stop=(*prompt.stop, *own_stops),
            intervene=self.intervene,
            spans=self.spans,
        )
        (choice,) = collect(self.context.start(self.model, request, is_streamed=False))
        ids, is_truncated = _visible(self.model, [*self.ids, *choice.token_ids])
        return replace(self, ids=ids, is_truncated=is_truncated or self.is_truncated)


@contextmanager
def opened(body: Mapping[str, Any]) -> Iterator[Subject]:
    """The subject of ``body``, for the length of the block."""
    inspect_auth.check()
    settings, registry = services().settings, services().registry
    model_id, completion = body.get("model"), None
    if "completion_id" in body:
        completion = services().completions.find(body["completion_id"], body["choice"])
        if model_id is not None and registry.resolve(model_id).name != completion.model:
            raise InvalidRequest(f"completion_id is of model '{completion.model}'", param="model")
        model_id = completion.model
    with RequestContext(services()) as context:
        model = context.lease(model_id, is_chat="messages" in body)
        inspector = inspector_of(model)
        prompt = None
        if completion is not None:
            ids = [*completion.prompt_ids, *completion.token_ids]
        elif "messages" in body:
            prompt = chat_template.encode(
                model, body["messages"], max_bytes=settings.inspected_prompt_bytes
            )
            ids = prompt.ids
        else:
            ids = _requested_ids(model, body, settings)
        check_tokens(len(ids), settings.inspect_max_tokens)
        prompt_tokens = None if completion is None else len(completion.prompt_ids)
        ids, is_truncated = _visible(model, ids)
        subject = Subject(
            context=context,
            model=model,
            inspector=inspector,
            ids=ids,
            messages=body.get("messages", ()),
            prompt=prompt,
            is_truncated=is_truncated,
            intervene=body.get("intervene"),
            completion=completion,
        )
        yield subject.edited(prompt_tokens)


def inspector_of(model: LoadedModel) -> Inspected:
    """Raises ModelNotCapable for a model that nobody can look into."""
    if model.inspector is None:
        raise ModelNotCapable(f"Model '{model.spec.name}' cannot be inspected", param="model")
    return model.inspector


def _requested_ids(model: LoadedModel, body: Mapping[str, Any], settings: Settings) -> list[int]:
    if "prompt" not in body:
        requests.check_ids(model, body["token_ids"], "token_ids")
        return list(body["token_ids"])
    return text_ids(model, body["prompt"], settings, "prompt")


def text_ids(model: LoadedModel, text: str, settings: Settings, param: str) -> list[int]:
    """The tokens of a text, of which there is one at least."""
    chat_template.check_bytes(text, settings.inspected_prompt_bytes)
    ids = chat_template.encode_text(model, text)
    if not ids:
        raise InvalidRequest(f"{param} has no tokens", param=param)
    return ids


def side_ids(model: LoadedModel, side: str | list[dict[str, Any]], param: str) -> list[int]:
    """The tokens of a text or a conversation, which the model sees whole."""
    settings = services().settings
    if isinstance(side, str):
        ids = text_ids(model, side, settings, param)
    else:
        ids = chat_template.encode(model, side, max_bytes=settings.inspected_prompt_bytes).ids
    check_tokens(len(ids), min(settings.inspect_max_tokens, model.engine.max_model_len))
    return ids


def check_tokens(count: int, most: int) -> None:
    """Raise PromptTooLarge for more tokens than are looked at."""
    if count > most:
        raise PromptTooLarge(f"Prompt too large to inspect: {count} tokens (max {most})")


def _visible(model: LoadedModel, ids: list[int]) -> tuple[list[int], bool]:
    """(the ``ids`` that the model sees, True if that is not all). Raises ContextLengthExceeded."""
    window = model.engine.max_model_len
    if len(ids) <= window:
        return ids, False
    if model.engine.context_overflow is None:
        requests.fit(0, len(ids), window, explicit=True, param="prompt")
    return ids[-window:], True


# What is in range, and how many numbers it is.


def check_attribution_tokens(subject: Subject) -> None:
    """Raise PromptTooLarge for more tokens than an attribution reads."""
    check_tokens(len(subject.ids), subject.settings.attribution_max_tokens)


def window(body: Mapping[str, Any], name: str, n: int) -> tuple[int, int]:
    """``[start, stop)`` of rows or cols; all ``n`` where nothing was said."""
    start, stop = body.get(name, (0, n))
    if not 0 <= start < stop <= n:
        raise InvalidRequest(
            f"{name} must be [start, stop] with 0 <= start < stop <= {n}", param=name
        )
    return start, stop


def layers(requested: Sequence[int] | str, anatomy: Anatomy) -> list[int]:
    """Layers whose residual stream is asked for; -1 is the embedding."""
    if isinstance(requested, str):
        return list(range(-1, anatomy.layers))
    for layer in requested:
        if not -1 <= layer < anatomy.layers:
            raise InvalidRequest(f"layers must be in [-1, {anatomy.layers - 1}]", param="layers")
    return list(requested)


def layer_range(body: Mapping[str, Any], anatomy: Anatomy) -> tuple[int, int]:
    """The first and the last layer that are asked for; all where nothing was said."""
    first, last = body.get("layers", (0, anatomy.layers - 1))
    if not 0 <= first <= last < anatomy.layers:
        raise InvalidRequest(
            f"layers must be [first, last] with 0 <= first <= last <= {anatomy.layers - 1}",
            param="layers",
        )
    return first, last


def newline(subject: Subject) -> int:
    """The token of a line break. Raises InvalidRequest where the vocabulary has none."""
    ids = subject.model.tokenizer.encode("\n", add_special_tokens=False)
    if not ids:
        raise InvalidRequest(
            'the model has no token for a line break; use baseline "mean" or "zero"',
            param="baseline",
        )
    return int(ids[-1])


def groups(
    body: Mapping[str, Any], subject: Subject, last: int
) -> tuple[tuple[int, ...], ...] | None:
    """The tokens up to ``last`` that are taken away together; None for each by itself.

    A word begins with a blank, after one, or where letters end or begin.
    """
    if body["positions"] == "all" and body["group"] == "token":
        return None
    chosen = positions(body["positions"], last + 1)
    if body["group"] == "token":
        return tuple((place,) for place in sorted(set(chosen)))
    vocabulary = Vocabulary(subject.model.tokenizer)
    words: list[list[int]] = []
    before = ""
    for place, token_id in enumerate(subject.ids[: last + 1]):
        text = "" if token_id in vocabulary.special_ids else vocabulary.decoded(token_id)
        if _goes_on(before, text):
            words[-1].append(place)
        else:
            words.append([place])
        before = text
    return tuple(tuple(word) for word in words if not set(word).isdisjoint(chosen))


def _goes_on(before: str, text: str) -> bool:
    """True where ``text`` is of the word that ``before`` is of; a blank alone is of the next."""
    edges = before[-1:], text[:1]
    if not all(edges) or text[0].isspace():
        return False
    return before.isspace() or (
        not before[-1].isspace() and before[-1].isalnum() == text[0].isalnum()
    )


def positions(requested: Sequence[int] | str, n: int) -> list[int]:
    """Places of tokens, from 0; negative ones count from the end."""
    if isinstance(requested, str):
        return list(range(n))
    return [position(place, n, "positions") for place in requested]


def position(place: int, n: int, param: str) -> int:
    """One of ``n`` places; a negative one counts from the end."""
    if not -n <= place < n:
        raise InvalidRequest(f"{param} must be in [{-n}, {n - 1}]", param=param)
    return place % n


def token(token_id: int, subject: Subject, param: str) -> int:
    """An id of the model's vocabulary."""
    most = subject.model.engine.vocab_size
    if not 0 <= token_id < most:
        raise InvalidRequest(f"{param} must be in [0, {most - 1}]", param=param)
    return token_id


def check_read_cells(cells: int, settings: Settings) -> None:
    """Raise ResponseTooLarge for more numbers than are worked on at once."""
    if cells > settings.inspect_max_cells:
        raise ResponseTooLarge(
            f"{cells} cells (max {settings.inspect_max_cells}); ask for rows/cols or for less"
        )


def check_sent_cells(cells: int, how: Format, settings: Settings) -> None:
    """Raise ResponseTooLarge for more numbers than an answer in this format has."""
    most = settings.inspect_max_json_cells if how == "json" else settings.inspect_max_cells
    if cells > most:
        advice = ', format "f16" or Accept: application/x-npz' if how == "json" else ""
        raise ResponseTooLarge(f"{cells} cells as {how} (max {most}); ask for rows/cols{advice}")
