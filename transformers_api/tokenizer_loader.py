"""From a model's folder to its tokenizer, with its weights or without. Meets ModelText."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from transformers_api.engine.platform.imports import without_collection
from transformers_api.errors import ModelLoadFailed
from transformers_api.serving.models.capabilities import context_length
from transformers_api.serving.models.description import describe
from transformers_api.serving.models.processors import processor_template
from transformers_api.serving.models.spec import ModelFiles, ModelSpec
from transformers_api.serving.text.model_text import TokenizerOnly

# Which say of added tokens what tokenizer.json does not.
OWN_TOKENS = ("added_tokens.json", "special_tokens_map.json")
OWN_FIELDS = ("added_tokens_decoder", "fast_tokenizer_files", "auto_map")
BETWEEN = re.compile(r"[\s,:]*")  # two values of a JSON object
MOST_GAPS = 256  # of ids without a token, below the largest


class LoadedTokenizer(NamedTuple):
    """A tokenizer of transformers; ``size``: its largest id + 1."""

    tokenizer: Any
    size: int


def read_text(spec: ModelSpec, files: ModelFiles, default_context: int) -> TokenizerOnly:
    """The words of a model that is not loaded; ``default_context``: where its files say nothing."""
    tokenizer, config = read_tokenizer(spec, files), describe(files.folder).config
    inner = config.get("text_config")
    declared = {**config, **(inner if isinstance(inner, dict) else {})}.get("vocab_size")
    size = declared if type(declared) is int else tokenizer.size
    return TokenizerOnly(
        spec=spec,
        tokenizer=tokenizer.tokenizer,
        vocab_size=min(size, tokenizer.size),
        max_model_len=context_length(spec, config) or default_context,
    )


def read_tokenizer(spec: ModelSpec, files: ModelFiles) -> LoadedTokenizer:
    """The tokenizer of a model's files. Raises ModelLoadFailed."""
    with without_collection():  # nearly all that is made now stays
        loaded = _load_tokenizer(files.folder, spec.trust_remote_code)
    return LoadedTokenizer(loaded, _size(loaded))


def _size(tokenizer: Any) -> int:
    """The largest id + 1. To list all tokens takes longer than to see that ids have no gaps."""
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        count: int = backend.get_vocab_size(with_added_tokens=True)
        ids = range(count - 1, count + MOST_GAPS)
        used = [id for id in ids if backend.id_to_token(id) is not None]
        if used == [count - 1] and max(backend.get_added_tokens_decoder(), default=0) < count:
            return count
    return max(tokenizer.get_vocab().values(), default=0) + 1


def _load_tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            **_added_tokens(folder),
        )
    except Exception as error:
        raise ModelLoadFailed(f"The tokenizer cannot be loaded: {error}") from error
    if not getattr(tokenizer, "chat_template", None) and (template := processor_template(folder)):
        tokenizer.chat_template = template
    _forget_words(tokenizer)
    return tokenizer


def _added_tokens(folder: Path) -> dict[str, Any]:
    """The added tokens of a tokenizer.json, as ``from_pretrained`` takes them.

    It would read the whole file for them, with all merges, once more than the tokenizer does. Empty
    where another file has a say in it, or this one is not as expected.
    """
    try:
        config = json.loads((folder / "tokenizer_config.json").read_bytes())
        if any((folder / name).exists() for name in OWN_TOKENS) or config.keys() & {*OWN_FIELDS}:
            return {}
        tokens = _value((folder / "tokenizer.json").read_bytes().decode(), "added_tokens")
        decoder = {token["id"]: {k: v for k, v in token.items() if k != "id"} for token in tokens}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return {"added_tokens_decoder": decoder}


def _value(text: str, name: str) -> Any:
    """The value of one key of a JSON object; what comes after it is not read."""
    decoder, at, key = json.JSONDecoder(), text.index("{") + 1, None
    while key != name:
        key, at = decoder.raw_decode(text, _start(text, at))
        value, at = decoder.raw_decode(text, _start(text, at))
    return value


def _start(text: str, at: int) -> int:
    """The place of the next value from ``at`` on."""
    space = BETWEEN.match(text, at)
    return space.end() if space else at


def lowercase(tokenizer: Any) -> None:
    """Make small letters of a text before anything else; once more does no harm."""
    from tokenizers.normalizers import Lowercase, Sequence

    backend = tokenizer.backend_tokenizer
    own = backend.normalizer
    backend.normalizer = Sequence([Lowercase(), *([] if own is None else [own])])


def _forget_words(tokenizer: Any) -> None:
    """Keep no words that were tokenized once.

    The BPE of tokenizers 0.23 remembers 10,000 words for each thread, of models that are gone too:
    with a thread per request gigabytes in the end. Without, a prompt takes twice as long, which is
    a millisecond for 2,000 characters.
    """
    from tokenizers.models import BPE

    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if isinstance(model, BPE) and hasattr(model, "_resize_cache"):  # no public name says it
        model._resize_cache(0)
