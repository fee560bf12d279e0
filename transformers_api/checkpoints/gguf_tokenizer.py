"""A GGUF file's tokenizer as ``tokenizer.json``: its ids are those of llama.cpp for every text.

Byte-level vocabularies (``gpt2``), SentencePiece's (``llama``), Gemma's, BERT's and XLM-RoBERTa's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import orjson
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)
from transformers import PreTrainedTokenizerFast

from transformers_api.checkpoints import gguf_vocabulary, pretokenizers
from transformers_api.checkpoints.gguf_vocabulary import (
    CONTROL,
    GEMMA,
    SPACE,
    Vocabulary,
    added,
)
from transformers_api.errors import ModelLoadFailed

FILE = "tokenizer.json"
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unknown": 0}  # where a file names none
Metadata = Mapping[str, Any]


def check(metadata: Metadata) -> str | None:
    """Refuse a vocabulary that cannot be split rightly; a warning where that is a guess.

    Raises ModelLoadFailed.
    """
    if metadata.get("tokenizer.ggml.model") != "gpt2":
        return None
    name = metadata.get("tokenizer.ggml.pre")
    if name is None:
        return (
            "the file does not name its pre-tokenizer (tokenizer.ggml.pre): llama.cpp's default is "
            "used, and answers may be worse than the model's own; convert the model anew"
        )
    if name not in pretokenizers.PATTERNS:
        raise ModelLoadFailed(
            f"the pre-tokenizer {name!r} (tokenizer.ggml.pre) is not known: texts would be cut "
            "at the wrong places"
        )
    return None


def build(metadata: Metadata) -> Any:
    """The tokenizer. Raises ModelLoadFailed."""
    _check_tokens(metadata)
    vocabulary = gguf_vocabulary.read(metadata)
    if vocabulary is not None:
        vocabulary.check()
    return _assembled(metadata, vocabulary)


def write(metadata: Metadata, folder: Path) -> None:
    """Write the files of ``build``, faster. Raises ModelLoadFailed.

    A large vocabulary goes from the metadata into ``tokenizer.json`` without becoming a tokenizer,
    which is made of the few tokens that stand outside of texts.
    """
    _check_tokens(metadata)
    vocabulary = gguf_vocabulary.read(metadata)
    if vocabulary is None:
        _assembled(metadata, None).save_pretrained(folder)
        return
    vocabulary.check()
    tokens, vocab = metadata["tokenizer.ggml.tokens"], vocabulary.vocab
    indices = {index for index, _ in added(metadata)}
    indices |= {index for name in _SPECIAL.values() if (index := _id(metadata, name)) is not None}
    few = {tokens[index]: vocab[tokens[index]] for index in indices if tokens[index] in vocab}
    _assembled(metadata, Vocabulary(few, [])).save_pretrained(folder)
    file = folder / FILE
    written = orjson.loads(file.read_bytes())
    written["model"] |= {"vocab": vocab, "merges": vocabulary.merges}
    file.write_bytes(orjson.dumps(written))


def _check_tokens(metadata: Metadata) -> None:
    kind, tokens = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.tokens")
    if kind not in _KINDS:
        kinds = ", ".join(_KINDS)
        raise ModelLoadFailed(
            f"the tokenizer {kind!r} (tokenizer.ggml.model) cannot be read, only {kinds}"
        )
    if not isinstance(tokens, list) or not set(map(type, tokens)) <= {str}:
        raise ModelLoadFailed("tokenizer.ggml.tokens is missing")


def _assembled(metadata: Metadata, vocabulary: Vocabulary | None) -> Any:
    tokens = metadata["tokenizer.ggml.tokens"]
    try:
        tokenizer = _KINDS[metadata["tokenizer.ggml.model"]](metadata, vocabulary)
    except ModelLoadFailed:
        raise
    except Exception as error:  # the Rust library raises Exception itself
        raise ModelLoadFailed(f"the vocabulary cannot be read: {error}") from None
    whole = added(metadata)
    for is_special in (True, False):  # both kinds keep the ids of the vocabulary
        own = [
            AddedToken(tokens[index], special=is_special, normalized=False)
            for index, number in whole
            if (number == CONTROL) == is_special
            and (vocabulary is None or tokens[index] in vocabulary.vocab)
        ]
        tokenizer.add_special_tokens(own) if is_special else tokenizer.add_tokens(own)
    return _wrapped(tokenizer, metadata)


def _byte_level(metadata: Metadata, vocabulary: Vocabulary | None) -> Tokenizer:
    assert vocabulary is not None
    name = metadata.get("tokenizer.ggml.pre", "default")
    whole = name in pretokenizers.WHOLE_PIECES
    tokenizer = Tokenizer(models.BPE(vocabulary.vocab, vocabulary.merges, ignore_merges=whole))
    tokenizer.pre_tokenizer = pretokenizers.byte_level(name)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(metadata: Metadata, vocabulary: Vocabulary | None) -> Tokenizer:
    """SentencePiece's byte pairs. A space comes first unless the file says otherwise.

    Also before a text that begins with one, and after every control token. Gemma's has none.
    """
    assert vocabulary is not None
    unknown = _id(metadata, "unknown")
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary.vocab,
            vocabulary.merges,
            fuse_unk=True,
            byte_fallback=True,
            unk_token=None if unknown is None else metadata["tokenizer.ggml.tokens"][unknown],
        )
    )
    if _is_gemma(metadata):
        tokenizer.normalizer = normalizers.Replace(" ", SPACE)
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        return tokenizer
    has_prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    first = [normalizers.Prepend(SPACE)] if has_prefix else []
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if has_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _is_gemma(metadata: Metadata) -> bool:
    kind = metadata["tokenizer.ggml.model"]
    return kind == "gemma4" or (kind == "llama" and metadata.get("general.architecture") in GEMMA)


def _wordpiece(metadata: Metadata, _vocabulary: Vocabulary | None) -> Tokenizer:
    """BERT's pieces: a word's first begins with ``▁`` there, a later one with ``##`` here.

    Letters become small ones without accents, as in llama.cpp whatever the model.
    """
    whole = {index for index, _ in added(metadata)}
    vocab: dict[str, int] = {}
    for index, token in enumerate(metadata["tokenizer.ggml.tokens"]):
        if index not in whole and not _is_special(token):
            token = token[1:] if token.startswith(SPACE) else f"##{token}"
        vocab.setdefault(token, index)
    unknown = _id(metadata, "unknown")
    names = metadata["tokenizer.ggml.tokens"]
    tokenizer = Tokenizer(
        models.WordPiece(vocab, unk_token="[UNK]" if unknown is None else names[unknown])
    )
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _is_special(token: str) -> bool:
    return token.startswith("[") and token.endswith("]") and len(token) > 2


def _unigram(metadata: Metadata, _vocabulary: Vocabulary | None) -> Tokenizer:
    """SentencePiece's unigrams, as XLM-RoBERTa has them."""
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) < len(tokens):
        raise ModelLoadFailed("tokenizer.ggml.scores is missing or too short")
    pairs = list(zip(tokens, scores, strict=False))
    tokenizer = Tokenizer(models.Unigram(pairs, unk_id=_id(metadata, "unknown")))
    steps: list[normalizers.Normalizer] = []
    if charsmap := metadata.get("tokenizer.ggml.precompiled_charsmap"):
        steps.append(normalizers.Precompiled(bytes(byte & 0xFF for byte in charsmap)))
    steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(SPACE, prepend_scheme="always")
    return tokenizer


def _id(metadata: Metadata, name: str) -> int | None:
    count = len(metadata["tokenizer.ggml.tokens"])
    default = _SENTENCEPIECE_IDS.get(name) if metadata["tokenizer.ggml.model"] == "llama" else None
    index = metadata.get(f"tokenizer.ggml.{name}_token_id", default)
    return index if isinstance(index, int) and 0 <= index < count else None


_KINDS: dict[Any, Callable[[Metadata, Vocabulary | None], Tokenizer]] = {
    "gpt2": _byte_level,
    "llama": _sentencepiece,
    "gemma4": _sentencepiece,
    "bert": _wordpiece,
    "t5": _unigram,
}


def _wrapped(tokenizer: Tokenizer, metadata: Metadata) -> Any:
    new: Any = PreTrainedTokenizerFast
    tokens = metadata["tokenizer.ggml.tokens"]
    ids = {name: _id(metadata, short) for name, short in _SPECIAL.items()}
    kind = metadata["tokenizer.ggml.model"]
    frames = kind in ("bert", "t5")  # a text between two tokens
    if frames:
        for name, short in (("bos_token", "cls"), ("eos_token", "seperator")):  # as it is spelt
            own = _id(metadata, short)
            ids[name] = ids[name] if own is None else own
    begins = kind == "llama" or metadata.get("tokenizer.ggml.pre") in pretokenizers.BEGINS_TEXT
    return new(
        tokenizer_object=tokenizer,
        add_bos_token=metadata.get("tokenizer.ggml.add_bos_token", begins or frames)
        and kind != "gemma4",  # whose template writes it
        add_eos_token=metadata.get("tokenizer.ggml.add_eos_token", frames),
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **{name: None if index is None else tokens[index] for name, index in ids.items()},
    )
