"""A conversation to be answered once, for the routes that have words of their own for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers_api.api.http.request_context import Formatter, Task
from transformers_api.api.openai import requests, upstream
from transformers_api.api.openai.conversation import Conversation, planned
from transformers_api.config.settings import Settings
from transformers_api.errors import ContextLengthExceeded
from transformers_api.serving.generation import GenerationRequest
from transformers_api.serving.inspect.edit_request import InterveneRequest
from transformers_api.serving.swap.loaded_model import LoadedModel
from transformers_api.serving.text import chat_template
from transformers_api.serving.text.chat_template import ChatPrompt
from transformers_api.serving.text.spans import Span, spans
from transformers_api.serving.tools.answer_plan import AnswerPlan

DEFAULTS: Mapping[str, Any] = {"max_tokens": 512, "temperature": 0.7, "top_p": 0.9}  # chat's
Make = Callable[[LoadedModel, GenerationRequest, AnswerPlan], Formatter]


class ConversationTask(Task):
    """See the module. ``sampling`` are fields by the names of chat completions.

    ``most_tokens`` is a ceiling: it is cut to what the context leaves; None: the default.
    """

    is_chat = is_relayed = True

    def __init__(
        self,
        conversation: Conversation,
        make: Make,
        *,
        model_id: str | None,
        is_streamed: bool,
        texts: Sequence[str],
        sampling: Mapping[str, Any],
        most_tokens: int | None = None,
        logprobs: int | None = None,
        field: str = "messages",
        intervene: InterveneRequest | None = None,
        too_long: str | None = None,  # with {tokens} and {most}; None: OpenAI's words
    ) -> None:
        self.conversation = conversation
        self.model_id = model_id
        self.is_streamed = is_streamed
        self.texts = texts
        self.field = field
        self._make = make
        self._sampling = sampling
        self._most_tokens = most_tokens
        self._logprobs = logprobs
        self._intervene = intervene
        self._too_long = too_long
        self._plan = AnswerPlan(style=None)

    def prepare(self, model: LoadedModel, settings: Settings) -> GenerationRequest:
        """See Task."""
        if model.relay is not None:
            self._plan = upstream.PLAN
            return upstream.conversation_request(
                model,
                self.conversation,
                settings,
                sampling=self._sampling,
                most_tokens=self._most_tokens,
                logprobs=self._logprobs,
                is_streamed=self.is_streamed,
            )
        prompt = self._encoded(model)
        fields = {**DEFAULTS, **requests.registered_options(model), **self._sampling}
        tokens, most = len(prompt.ids), model.engine.max_model_len
        if self._too_long is not None and tokens >= most:
            words = self._too_long.format(tokens=tokens, most=most)
            raise ContextLengthExceeded(words, param=self.field)
        max_tokens = requests.fit(
            self._most_tokens or fields["max_tokens"],
            tokens,
            most,
            explicit=False,
            param=self.field,
        )
        params = requests.sampling_params(
            model,
            fields,
            max_tokens,
            stop_token_ids=prompt.stop_token_ids,
            logprobs=self._logprobs,
        )
        request = GenerationRequest(
            [prompt.ids],
            params,
            stop=requests.stop_strings(fields) + prompt.stop,
            quiet_s=settings.keepalive_s if self.is_streamed else None,
            intervene=self._intervene,
            spans=lambda: self._spans(model, prompt.ids),
        )
        plan = self.conversation.plan(model, prompt)
        self._plan = plan or self._plan
        return planned(request, plan, strips_blank=prompt.strips_blank)

    def _encoded(self, model: LoadedModel) -> ChatPrompt:
        return self.conversation.encode(model)

    def _spans(self, model: LoadedModel, ids: Sequence[int]) -> Sequence[Span]:
        options = self.conversation.template_options(model)
        return spans(model, self.conversation.messages, ids, **options)

    def formatter(self, model: LoadedModel, request: GenerationRequest) -> Formatter:
        """See Task."""
        return self._make(model, request, self._plan)


class InfillTask(ConversationTask):
    """The text between a prompt, that of the only message, and a ``suffix``."""

    is_chat = is_relayed = False

    def __init__(self, *args: Any, suffix: str, **options: Any) -> None:
        super().__init__(*args, **options)
        self._suffix = suffix
        self.texts = [*self.texts, suffix]

    def _encoded(self, model: LoadedModel) -> ChatPrompt:
        prompts = [self.conversation.messages[-1]["content"]]
        (ids,), ends = requests.infill_ids(model, prompts, self._suffix)
        return ChatPrompt(ids, stop_token_ids=ends)


class RawTask(ConversationTask):
    """The same for a prompt that is to be read as it is: the text of the only message."""

    is_chat = is_relayed = False

    def _encoded(self, model: LoadedModel) -> ChatPrompt:
        return ChatPrompt(
            chat_template.encode_text(model, self.conversation.messages[-1]["content"])
        )
