"""The parts of ``prepare`` that routes share: from fields of a body to sampling parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from transformers_api.api.http.sampling_schema import DRY_BREAKERS
from transformers_api.config.settings import Settings
from transformers_api.engine.base import DryParams, SamplingParams
from transformers_api.errors import (
    ApiError,
    ContextLengthExceeded,
    InvalidRequest,
    ModelNotCapable,
)
from transformers_api.serving.generation import GenerationRequest
from transformers_api.serving.inspect import trace_plan
from transformers_api.serving.inspect.trace_plan import TraceRequest
from transformers_api.serving.swap.loaded_model import LoadedModel
from transformers_api.serving.text import chat_template, infilling
from transformers_api.serving.text.dry_breakers import sequence_breakers
from transformers_api.serving.text.infilling import InfillTokens
from transformers_api.serving.text.model_text import ModelText

_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "repeat_last_n",
    "presence_penalty",
    "frequency_penalty",
    "min_tokens",
    "logit_bias",
    "top_n_sigma",
    "xtc_probability",
    "xtc_threshold",
    "ignore_eos",
    "seed",
)


def prompt_ids(
    model: LoadedModel, prompts: Iterable[str | list[int]], add_special_tokens: bool = True
) -> list[list[int]]:
    """The token ids of prompts that are text or ids already."""
    encoded = []
    for prompt in prompts:
        if isinstance(prompt, str):
            prompt = chat_template.encode_text(model, prompt, add_special_tokens)
            if not prompt:
                raise InvalidRequest("'prompt' has no tokens", param="prompt")
        else:
            check_ids(model, prompt, "prompt")
        encoded.append(prompt)
    return encoded


def infill_ids(
    model: LoadedModel,
    prompts: Iterable[str | list[int]],
    suffix: str,
    add_special_tokens: bool = True,
) -> tuple[list[list[int]], frozenset[int]]:
    """The ids of prompts with ``suffix`` behind the answer, and what ends such answers.

    Raises InvalidRequest, ModelNotCapable.
    """
    tokens = infill_tokens(model, "suffix")
    encoded = []
    for prompt in prompts:
        if not isinstance(prompt, str):
            check_ids(model, prompt, "prompt")
        ids = infilling.encode(tokens, prompt, suffix, add_special_tokens=add_special_tokens)
        encoded.append(ids)
    return encoded, tokens.ends


def infill_tokens(model: LoadedModel, param: str) -> InfillTokens:
    """The tokens of ``model`` for a text in the middle. Raises ModelNotCapable with ``param``."""
    if model.infill is None:
        raise ModelNotCapable(
            f"'{param}' needs a model with fill-in-the-middle tokens; '{model.spec.name}' has none",
            param=param,
        )
    return model.infill


def check_ids(model: ModelText, ids: Iterable[int], param: str) -> None:
    """Raise InvalidRequest for an id that the model does not have."""
    most = model.vocab_size
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


def truncated(
    body: Mapping[str, Any], ids: list[int], model: LoadedModel, max_tokens: int, *, explicit: bool
) -> list[int]:
    """The part of a prompt that ``truncate_prompt_tokens`` leaves.

    -1 leaves what fits the context beside ``max_tokens``; beside a default that was not asked for
    at least half of it.
    """
    limit: int | None = body.get("truncate_prompt_tokens")
    if limit == -1:
        context = model.engine.max_model_len
        limit = max(context - max(max_tokens, 1), 1 if explicit else context // 2)
    return cut(ids, limit, body.get("truncation_side", "left"))


def cut(ids: list[int], limit: int | None, side: str) -> list[int]:
    """At most ``limit`` of ``ids``; ``side`` is the one where they are left out."""
    if limit is None or len(ids) <= limit:
        return ids
    return ids[-limit:] if side == "left" else ids[:limit]


def fit(
    max_tokens: int,
    prompt_tokens: int,
    max_model_len: int,
    *,
    explicit: bool,
    param: str = "messages",
    max_tokens_param: str = "max_tokens",
) -> int:
    """The tokens to generate after ``prompt_tokens``; for -1 all that fit.

    ``explicit``: the client asked for ``max_tokens``; what does not fit is ContextLengthExceeded
    then. A default is cut to what remains. ``param``: the field that holds the prompt.
    """
    if max_tokens == -1:
        max_tokens, explicit = max(max_model_len - prompt_tokens, 1), False
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
    for name in ("stop_token_ids", "logit_bias", "allowed_token_ids"):
        if name in options:
            check_ids(model, options[name], name)
    if options.get("min_tokens", 0) > max_tokens:
        raise InvalidRequest(
            f"'min_tokens' must not be larger than the {max_tokens} tokens that may be generated",
            param="min_tokens",
        )
    chosen = {name: options[name] for name in _SAMPLING if options.get(name) is not None}
    chosen["top_k"] = max(chosen.get("top_k", 0), 0)
    params = SamplingParams(
        max_tokens=max_tokens,
        stop_token_ids=stop_token_ids | {*requested},
        allowed_token_ids=allowed_token_ids(options),
        dry=dry(model, options),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        **chosen,
    )
    _check_allowed(model, params)
    return params


def allowed_token_ids(options: Mapping[str, Any]) -> frozenset[int] | None:
    """The tokens that may come; None: all."""
    return frozenset(options["allowed_token_ids"]) if "allowed_token_ids" in options else None


def _check_allowed(model: LoadedModel, params: SamplingParams) -> None:
    """Raise InvalidRequest where ``min_tokens`` leaves no token that may come."""
    if params.allowed_token_ids is None or not params.min_tokens:
        return
    ends = params.stop_token_ids | (
        frozenset() if params.ignore_eos else model.engine.eos_token_ids
    )
    if params.allowed_token_ids <= ends:
        raise InvalidRequest(
            "'allowed_token_ids' must have a token that does not end the answer, for 'min_tokens'",
            param="allowed_token_ids",
        )


def dry(model: LoadedModel, options: Mapping[str, Any]) -> DryParams | None:
    """llama.cpp's fields of the DRY penalty; None where it would do nothing."""
    names = {
        "base": "dry_base",
        "allowed_length": "dry_allowed_length",
        "last_n": "dry_penalty_last_n",
    }
    sent = {name: options[field] for name, field in names.items() if field in options}
    if not options.get("dry_multiplier") or not sent.get("last_n", -1):
        return None
    breakers = sequence_breakers(model, options.get("dry_sequence_breakers", DRY_BREAKERS))
    return DryParams(multiplier=options["dry_multiplier"], breakers=breakers, **sent)


def with_trace(
    request: GenerationRequest, model: LoadedModel, body: Mapping[str, Any], settings: Settings
) -> GenerationRequest:
    """``request`` with the plan that ``trace`` asks for.

    Raises what ``trace_plan.plan`` does, unless the answer may go on without a trace.
    """
    trace: TraceRequest = body["trace"]
    choices = len(request.prompts) * request.per_prompt
    try:
        plan = trace_plan.plan(
            model,
            trace,
            settings,
            prompt_tokens=max(map(len, request.prompts)),
            max_tokens=request.params.max_tokens,
            choices=choices,
            whole=not body["stream"],
        )
    except ApiError as error:
        if trace.required:
            raise
        return request.untraced(error)
    return replace(
        request,
        trace=plan,
        trace_options=trace,
        trace_stops=trace.specials,
        trace_cost=trace_plan.cost(trace, plan, choices),
        trace_required=trace.required,
    )
