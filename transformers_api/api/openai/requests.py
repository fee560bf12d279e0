"""The parts of ``prepare`` that routes share: from fields of a body to sampling parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from transformers_api.config.settings import Settings
from transformers_api.engine.base import SamplingParams
from transformers_api.errors import ContextLengthExceeded, InvalidRequest
from transformers_api.serving.generation import GenerationRequest
from transformers_api.serving.inspect import trace_plan
from transformers_api.serving.inspect.trace_plan import TraceRequest
from transformers_api.serving.swap.loaded_model import LoadedModel
from transformers_api.serving.text import chat_template

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
    wrong = max(ids, default=0)
    if wrong >= most:
        raise InvalidRequest(
            f"'{param}' has token id {wrong}; the ids of this model are below {most}", param=param
        )


def registered_options(model: LoadedModel) -> Mapping[str, Any]:
    """The defaults that the registry entry of ``model`` states, by OpenAI's field names."""
    return {key: value for key, value in model.spec.generation.items() if value is not None}


def stop_strings(options: Mapping[str, Any]) -> tuple[str, ...]:
    """``stop``, which may be one string or several."""
    stop = options.get("stop") or ()
    return (stop,) if isinstance(stop, str) else tuple(stop)


def fit(
    max_tokens: int,
    prompt_tokens: int,
    max_model_len: int,
    *,
    explicit: bool,
    param: str = "messages",
    max_tokens_param: str = "max_tokens",
) -> int:
    """The tokens to generate after ``prompt_tokens``.

    ``explicit``: the client asked for ``max_tokens``; what does not fit is ContextLengthExceeded
    then. A default is cut to what remains. ``param``: the field that holds the prompt.
    """
    limit = f"This model's maximum context length is {max_model_len} tokens"
    if prompt_tokens + min(max_tokens, 1) > max_model_len:
        raise ContextLengthExceeded(
            f"{limit}. However, your {param} resulted in {prompt_tokens} tokens. "
            f"Please reduce the length of the {param}.",
            param=param,
        )
    total = prompt_tokens + max_tokens
    if explicit and total > max_model_len:
        raise ContextLengthExceeded(
            f"{limit}. However, you requested {total} tokens ({prompt_tokens} in the {param}, "
            f"{max_tokens} in the completion). Please reduce one of them.",
            param=max_tokens_param,
        )
    return min(max_tokens, max_model_len - prompt_tokens)


def sampling_params(
    model: LoadedModel,
    options: Mapping[str, Any],
    max_tokens: int,
    *,
    stop_token_ids: frozenset[int] = frozenset(),
    logprobs: int | None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    """OpenAI's fields, checked against ``model``. Raises InvalidRequest."""
    requested = options.get("stop_token_ids", ())
    for name in ("stop_token_ids", "logit_bias"):
        if name in options:
            check_ids(model, options[name], name)
    if options.get("min_tokens", 0) > max_tokens:
        raise InvalidRequest(
            f"'min_tokens' must not be larger than the {max_tokens} tokens that may be generated",
            param="min_tokens",
        )
    chosen = {name: options[name] for name in _SAMPLING if options.get(name) is not None}
    chosen["top_k"] = max(chosen.get("top_k", 0), 0)
    return SamplingParams(
        max_tokens=max_tokens,
        stop_token_ids=stop_token_ids | {*requested},
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        **chosen,
    )


def with_trace(
    request: GenerationRequest, model: LoadedModel, body: Mapping[str, Any], settings: Settings
) -> GenerationRequest:
    """``request`` with the plan that ``trace`` asks for; raises what ``trace_plan.plan`` does."""
    trace: TraceRequest = body["trace"]
    plan = trace_plan.plan(
        model,
        trace,
        settings,
        prompt_tokens=max(map(len, request.prompts)),
        max_tokens=request.params.max_tokens,
        choices=len(request.prompts) * request.per_prompt,
        whole=not body["stream"],
    )
    return replace(request, trace=plan, trace_stops=trace.specials)
