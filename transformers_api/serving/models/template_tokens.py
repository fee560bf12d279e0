"""Tokens that a chat template writes and the model lacks: no chat could ever be answered."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers_api.errors import ModelLoadFailed
from transformers_api.serving.models.headers import read_object

_TEMPLATES = ("chat_template.jinja", "chat_template.json")


def check_template(folder: Path) -> None:
    """Raise ModelLoadFailed where the template writes a token beyond config.json's vocabulary."""
    template = _template(folder)
    size = _vocabulary(read_object(folder / "config.json"))
    if size is None or not template:
        return
    beyond = [(index, token) for index, token in _added(folder) if index >= size]
    for index, token in sorted(beyond):
        if token and token in template:
            raise ModelLoadFailed(
                f"{folder}: the chat template writes {token!r}, which is token {index}, but the "
                f"model has {size}: resize its embeddings, or set chat: transcript in the registry "
                "entry"
            )


def _template(folder: Path) -> str:
    texts = [
        (folder / name).read_text(errors="replace")
        for name in _TEMPLATES
        if (folder / name).is_file()
    ]
    config = _optional(folder / "tokenizer_config.json").get("chat_template")
    return "\n".join([*texts, *_strings(config)])


def _strings(value: Any) -> Iterator[str]:
    """The templates of a field: a text, or a list of named ones."""
    if isinstance(value, str):
        yield value
    for entry in value if isinstance(value, list) else ():
        if isinstance(entry, dict) and isinstance(entry.get("template"), str):
            yield entry["template"]


def _vocabulary(config: dict[str, Any]) -> int | None:
    text = config.get("text_config")
    sizes = (config.get("vocab_size"), text.get("vocab_size") if isinstance(text, dict) else None)
    return next((size for size in sizes if type(size) is int), None)


def _added(folder: Path) -> Iterator[tuple[int, str]]:
    """(id, text) of the tokens that were added to a vocabulary, from all files that tell."""
    decoder = _optional(folder / "tokenizer_config.json").get("added_tokens_decoder")
    for index, token in decoder.items() if isinstance(decoder, dict) else ():
        if index.isdecimal() and isinstance(token, dict):
            yield int(index), str(token.get("content", ""))
    listed = _optional(folder / "tokenizer.json").get("added_tokens")
    for token in listed if isinstance(listed, list) else ():
        if isinstance(token, dict) and type(token.get("id")) is int:
            yield token["id"], str(token.get("content", ""))
    for text, index in _optional(folder / "added_tokens.json").items():
        if type(index) is int:
            yield index, text


def _optional(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}
