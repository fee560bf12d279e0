"""A GGUF file's tokenizer as ``tokenizer.json``: its ids are those of llama.cpp for every text.

Byte-level vocabularies (``gpt2``) and SentencePiece's (``llama``) are built here; Gemma's and T5's
are left to transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

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
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.tokenization_utils_base import generate_merges

from transformers_api.checkpoints import pretokenizers
from transformers_api.errors import ModelLoadFailed

CONTROL, USER_DEFINED = 3, 4  # kinds of tokens that are matched whole in a text
SPACE = "▁"
OTHERS_SENTENCEPIECE = frozenset({"gemma", "gemma2", "gemma3"})  # architectures
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unknown": 0}  # where a file names none


def check(metadata: Mapping[str, Any]) -> str | None:
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


def build(metadata: Mapping[str, Any]) -> Any:
    """The tokenizer; None for the kinds that transformers builds. Raises ModelLoadFailed."""
    kind = metadata.get("tokenizer.ggml.model")
    architecture = metadata.get("general.architecture")
    if kind not in _KINDS or (kind == "llama" and architecture in OTHERS_SENTENCEPIECE):
        return None
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise ModelLoadFailed("tokenizer.ggml.tokens is missing")
    try:
        tokenizer = _KINDS[kind](metadata)
    except ModelLoadFailed:
        raise
    except Exception as error:  # the Rust library raises Exception itself
        raise ModelLoadFailed(f"the vocabulary cannot be read: {error}") from None
    for is_special in (True, False):  # both kinds keep the ids of the vocabulary
        added = [
            AddedToken(tokens[index], special=is_special, normalized=False)
            for index, number in _added(metadata)
            if (number == CONTROL) == is_special
        ]
        tokenizer.add_special_tokens(added) if is_special else tokenizer.add_tokens(added)
    return _wrapped(tokenizer, metadata)


def _byte_level(metadata: Mapping[str, Any]) -> Tokenizer:
    spelling = bytes_to_unicode()  # type: ignore[no-untyped-call]
    alphabet, whole = set(spelling.values()), {index for index, _ in _added(metadata)}
    vocab: dict[str, int] = {}
    for index, token in enumerate(metadata["tokenizer.ggml.tokens"]):
        if index not in whole and not alphabet.issuperset(token):
            token = "".join(spelling[byte] for byte in token.encode())
        vocab.setdefault(token, index)
    name = metadata.get("tokenizer.ggml.pre", "default")
    tokenizer = Tokenizer(
        models.BPE(
            vocab,
            list(_merges(metadata)),
            ignore_merges=name in pretokenizers.WHOLE_PIECES,
        )
    )
    tokenizer.pre_tokenizer = pretokenizers.byte_level(name)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(metadata: Mapping[str, Any]) -> Tokenizer:
    """SentencePiece's byte pairs. A space comes first unless the file says otherwise.

    Also before a text that begins with one, and after every control token.
    """
    tokens = metadata["tokenizer.ggml.tokens"]
    vocab: dict[str, int] = {}
    for index, token in enumerate(tokens):
        vocab.setdefault(token, index)
    if "tokenizer.ggml.merges" in metadata:
        merges = list(_merges(metadata))
    else:
        scores = metadata.get("tokenizer.ggml.scores")
        if not isinstance(scores, list) or len(scores) < len(tokens):
            raise ModelLoadFailed("tokenizer.ggml.scores is missing or too short")
        merges = generate_merges(vocab, dict(zip(tokens, scores, strict=False)))
    unknown = _id(metadata, "unknown")
    tokenizer = Tokenizer(
        models.BPE(
            vocab,
            merges,
            fuse_unk=True,
            byte_fallback=True,
            unk_token=None if unknown is None else tokens[unknown],
        )
    )
    has_prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    first = [normalizers.Prepend(SPACE)] if has_prefix else []
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if has_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _wordpiece(metadata: Mapping[str, Any]) -> Tokenizer:
    """BERT's pieces: a word's first begins with ``▁`` there, a later one with ``##`` here.

    Letters become small ones without accents, as in llama.cpp whatever the model.
    """
    whole = {index for index, _ in _added(metadata)}
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


def _unigram(metadata: Mapping[str, Any]) -> Tokenizer:
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


def _merges(metadata: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The pairs, best first. A part may itself begin with a space."""
    merges = metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise ModelLoadFailed("tokenizer.ggml.merges is missing")
    for merge in merges:
        left, _, right = merge[1:].partition(" ")
        yield merge[:1] + left, right


def _added(metadata: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """(id, kind) of the tokens that are matched whole."""
    kinds = metadata.get("tokenizer.ggml.token_type") or []
    for index, kind in enumerate(kinds[: len(metadata["tokenizer.ggml.tokens"])]):
        if kind in (CONTROL, USER_DEFINED):
            yield index, kind


def _id(metadata: Mapping[str, Any], name: str) -> int | None:
    count = len(metadata["tokenizer.ggml.tokens"])
    default = _SENTENCEPIECE_IDS.get(name) if metadata["tokenizer.ggml.model"] == "llama" else None
    index = metadata.get(f"tokenizer.ggml.{name}_token_id", default)
    return index if isinstance(index, int) and 0 <= index < count else None


_KINDS: dict[Any, Callable[[Mapping[str, Any]], Tokenizer]] = {
    "gpt2": _byte_level,
    "llama": _sentencepiece,
    "bert": _wordpiece,
    "t5": _unigram,
}


def _wrapped(tokenizer: Tokenizer, metadata: Mapping[str, Any]) -> Any:
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
        add_bos_token=metadata.get("tokenizer.ggml.add_bos_token", begins or frames),
        add_eos_token=metadata.get("tokenizer.ggml.add_eos_token", frames),
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **{name: None if index is None else tokens[index] for name, index in ids.items()},
    )
