"""From validated bodies and a model to what is to be generated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers_api.config.settings import Settings
from transformers_api.engine.base import SamplingParams
from transformers_api.errors import InvalidRequest, PayloadTooLarge
from transformers_api.serving.generation import GenerationRequest, fit
from transformers_api.serving.inspect import trace_plan
from transformers_api.serving.inspect.trace_plan import TraceRequest
from transformers_api.serving.models.spec import LoadedModel
from transformers_api.serving.text import chat_template
from transformers_api.serving.text.chat_template import ChatPrompt
from transformers_api.serving.text.spans import Span, spans

CHAT_DEFAULTS: Mapping[str, Any] = {"max_tokens": 512, "temperature": 0.7, "top_p": 0.9}
COMPLETION_DEFAULTS: Mapping[str, Any] = {"max_tokens": 16, "temperature": 1.0, "top_p": 1.0}

_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "min_tokens",
    "logit_bias",
    "ignore_eos",
    "seed",
)


def check_prompt_bytes(texts: Iterable[str], settings: Settings, param: str) -> None:
    """Raise PayloadTooLarge for more text than the settings allow."""
    size = sum(len(text.encode()) for text in texts)
    if size > settings.prompt_bytes:
        raise PayloadTooLarge(
            f"'{param}' has {size} bytes of text; at most {settings.prompt_bytes} are allowed",
            param=param,
        )


def check_sequences(prompts: int, per_prompt: int, settings: Settings) -> None:
    """Raise InvalidRequest for more sequences than could ever wait and run."""
    most = settings.max_inflight + settings.max_queue
    if prompts * per_prompt > most:
        raise InvalidRequest(
            f"{prompts} prompts with {per_prompt} answers each are more than the {most} that this "
            "server takes at once",
            param="prompt" if prompts > 1 else "n",
        )


def message_texts(messages: Iterable[Mapping[str, Any]]) -> list[str]:
    """All text of a conversation."""
    texts: list[str] = []
    for message in messages:
        content = message.get("content", "")
        texts += [content] if isinstance(content, str) else [part["text"] for part in content]
    return texts


def chat_prompt(model: LoadedModel, body: Mapping[str, Any]) -> ChatPrompt:
    """The conversation of ``body`` as ``model`` reads it."""
    return chat_template.encode(
        model,
        body["messages"],
        add_generation_prompt=body.get("add_generation_prompt"),
        continue_final_message=body["continue_final_message"],
        chat_template_kwargs=body.get("chat_template_kwargs"),
    )


def prompt_ids(model: LoadedModel, prompts: Iterable[str | list[int]]) -> list[list[int]]:
    """The token ids of prompts that are text or ids already."""
    encoded = []
    for prompt in prompts:
        if isinstance(prompt, str):
            prompt = chat_template.encode_text(model, prompt)
            if not prompt:
                raise InvalidRequest("'prompt' has no tokens", param="prompt")
        else:
            check_ids(model, prompt, "prompt")
        encoded.append(prompt)
    return encoded


def check_ids(model: LoadedModel, ids: Iterable[int], param: str) -> None:
    """Raise InvalidRequest for an id that the model does not have."""
    most = model.engine.vocab_size
    wrong = next((i for i in ids if i >= most), None)
    if wrong is not None:
        raise InvalidRequest(
            f"'{param}' has token id {wrong}; the ids of this model are below {most}", param=param
        )


def chat_request(
    model: LoadedModel, body: Mapping[str, Any], prompt: ChatPrompt, quiet_s: float | None
) -> GenerationRequest:
    """How to answer a conversation."""
    options = _options(CHAT_DEFAULTS, model, body)
    asked = next((n for n in ("max_completion_tokens", "max_tokens") if n in body), None)
    max_tokens = fit(
        options[asked or "max_tokens"],
        len(prompt.ids),
        model.engine.max_model_len,
        explicit=asked is not None,
        param="messages",
        max_tokens_param=asked or "max_tokens",
    )
    goes_on = options.get("ignore_eos", False)  # then the end of a turn ends nothing either
    params = _params(
        model,
        options,
        max_tokens,
        stop_token_ids=frozenset() if goes_on else prompt.stop_token_ids,
        logprobs=body.get("top_logprobs", 0) if body["logprobs"] else None,
    )
    stop = _stop(options) + (() if goes_on else prompt.stop)
    return GenerationRequest([prompt.ids], params, n=body["n"], stop=stop, quiet_s=quiet_s)


def completion_request(
    model: LoadedModel,
    body: Mapping[str, Any],
    prompts: Sequence[Sequence[int]],
    quiet_s: float | None,
) -> GenerationRequest:
    """How to continue texts."""
    options = _options(COMPLETION_DEFAULTS, model, body)
    # All prompts share one limit; a default is cut to what the longest of them leaves.
    max_tokens = min(
        fit(
            options["max_tokens"],
            len(ids),
            model.engine.max_model_len,
            explicit="max_tokens" in body,
            param="prompt",
        )
        for ids in prompts
    )
    logprobs = body.get("logprobs")
    scores_prompt = body["echo"] and (logprobs is not None or max_tokens == 0)
    params = _params(
        model,
        options,
        max_tokens,
        logprobs=logprobs,
        prompt_logprobs=(logprobs or 0) if scores_prompt else None,
    )
    return GenerationRequest(
        prompts,
        params,
        n=body["n"],
        best_of=body.get("best_of"),
        stop=_stop(options),
        quiet_s=quiet_s,
    )


def with_trace(
    model: LoadedModel, body: Mapping[str, Any], wanted: GenerationRequest, settings: Settings
) -> GenerationRequest:
    """The same, with what ``trace`` asks to note; raises what ``trace_plan.plan`` does."""
    asked: TraceRequest | None = body.get("trace")
    if asked is None:
        return wanted
    plan = trace_plan.plan(
        model,
        asked,
        settings,
        prompt_tokens=max(map(len, wanted.prompts)),
        max_tokens=wanted.params.max_tokens,
        choices=len(wanted.prompts) * wanted.per_prompt,
        whole=not body["stream"],
    )
    return replace(wanted, trace=plan, trace_stops=asked.specials)


def message_spans(model: LoadedModel, body: Mapping[str, Any], ids: Sequence[int]) -> list[Span]:
    """Where in the prompt ``ids`` the messages of ``body`` stand."""
    return spans(
        model,
        body["messages"],
        ids,
        add_generation_prompt=body.get("add_generation_prompt"),
        continue_final_message=body["continue_final_message"],
        chat_template_kwargs=body.get("chat_template_kwargs"),
    )


def _options(
    defaults: Mapping[str, Any], model: LoadedModel, body: Mapping[str, Any]
) -> Mapping[str, Any]:
    """The request's word, else the registry's, else the route's."""
    registered = {key: value for key, value in model.spec.generation.items() if value is not None}
    return {**defaults, **registered, **body}


def _stop(options: Mapping[str, Any]) -> tuple[str, ...]:
    stop = options.get("stop", ())
    return (stop,) if isinstance(stop, str) else tuple(stop or ())


def _params(
    model: LoadedModel,
    options: Mapping[str, Any],
    max_tokens: int,
    *,
    stop_token_ids: frozenset[int] = frozenset(),
    logprobs: int | None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    asked = options.get("stop_token_ids", ())
    check_ids(model, asked, "stop_token_ids")
    check_ids(model, options.get("logit_bias", ()), "logit_bias")
    if options.get("min_tokens", 0) > max_tokens:
        raise InvalidRequest(
            f"'min_tokens' must not be larger than the {max_tokens} tokens that may be generated",
            param="min_tokens",
        )
    chosen = {name: options[name] for name in _SAMPLING if options.get(name) is not None}
    chosen["top_k"] = max(chosen.get("top_k", 0), 0)
    return SamplingParams(
        max_tokens=max_tokens,
        stop_token_ids=stop_token_ids | {*asked},
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        **chosen,
    )
