"""Prompts that stand before texts to be embedded: which one a request means."""

from __future__ import annotations

from collections.abc import Sequence

from transformers_api.errors import InvalidRequest
from transformers_api.serving.models.spec import Prompts
from transformers_api.serving.swap.loaded_model import LoadedModel
from transformers_api.serving.text import chat_template

# The names that models and services have for the two sides of a search, the usual ones first.
QUERY = ("query", "search_query")
DOCUMENT = ("document", "passage", "corpus", "search_document")


def choose_prompt(prompts: Prompts, name: str | None = None, input_type: str | None = None) -> str:
    """The text before each input: by its own name, by the side of a search, or the usual one.

    A model without a prompt for a side has an empty one. Raises InvalidRequest.
    """
    if name is not None and input_type is not None:
        raise InvalidRequest(
            "'prompt_name' and 'input_type' exclude each other", param="input_type"
        )
    if name is not None:
        if name not in prompts.texts:
            raise InvalidRequest(f"'prompt_name' {_expected(prompts, ())}", param="prompt_name")
        return prompts.texts[name]
    if input_type is None:
        return "" if prompts.default is None else prompts.texts[prompts.default]
    if input_type in prompts.texts:
        return prompts.texts[input_type]
    names = next((names for names in (QUERY, DOCUMENT) if input_type in names), None)
    if names is None:
        raise InvalidRequest(
            f"'input_type' {_expected(prompts, (*QUERY, *DOCUMENT))}", param="input_type"
        )
    return next((prompts.texts[each] for each in names if each in prompts.texts), "")


def _expected(prompts: Prompts, others: Sequence[str]) -> str:
    names = list(dict.fromkeys([*prompts.texts, *others]))
    return f"must be one of {', '.join(names)}" if names else "is not for this model: it has none"


def count_prompt_tokens(
    model: LoadedModel, inputs: Sequence[str | list[int]], prompt: str
) -> list[int]:
    """Tokens of ``prompt`` in front of each input, for a model that does not pool them; else none.

    As sentence-transformers counts them: with a special token before it, without one behind it.
    """
    if not prompt or model.pools_prompts:
        return []
    ids = chat_template.encode_text(model, prompt, True, "input")
    ends = bool(ids) and ids[-1] in set(model.tokenizer.all_special_ids)
    count = len(ids) - ends
    return [count if isinstance(item, str) else 0 for item in inputs]
