"""The token with which a chat template closes an assistant's turn."""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError

# Errors of a template for messages that it cannot show: its own raise_exception, and whatever
# comes of a field that is missing or of another type.
TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError)
_PROBE = "qzprobeqz"


def end_of_turn_ids(tokenizer: Any) -> frozenset[int]:
    """The token with which the chat template closes an assistant's turn; empty when unknown.

    It is often not the tokenizer's end-of-sequence token: ``<|im_end|>``, ``<|eot_id|>``, ….
    """
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": _PROBE}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except TEMPLATE_ERRORS:
        return frozenset()
    _, probe, after = text.rpartition(_PROBE)
    if not probe:
        return frozenset()
    # Added tokens that are only spaces (Gemma has some) close nothing.
    closing = {
        i for i, token in tokenizer.added_tokens_decoder.items() if token.content.strip(" \t\r\n▁")
    }
    ids = tokenizer.encode(after, add_special_tokens=False)
    return frozenset(next(([i] for i in ids if i in closing), []))
