"""From a model's folder to its tokenizer, with its weights or without. Meets ModelText."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from transformers_api.errors import ModelLoadFailed
from transformers_api.serving.models.capabilities import context_length
from transformers_api.serving.models.description import describe
from transformers_api.serving.models.processors import processor_template
from transformers_api.serving.models.spec import ModelFiles, ModelSpec
from transformers_api.serving.text.model_text import TokenizerOnly


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
    loaded = _load_tokenizer(files.folder, spec.trust_remote_code)
    return LoadedTokenizer(loaded, max(loaded.get_vocab().values(), default=0) + 1)


def _load_tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:
        raise ModelLoadFailed(f"The tokenizer cannot be loaded: {error}") from error
    if not getattr(tokenizer, "chat_template", None) and (template := processor_template(folder)):
        tokenizer.chat_template = template
    _forget_words(tokenizer)
    return tokenizer


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
