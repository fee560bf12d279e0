"""Small tokenizers of every kind that matters, built here: no network, no files."""

from __future__ import annotations

from functools import cache

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
IM_START, IM_END, END_OF_TEXT = 256, 257, 258


def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-in for each byte, by byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    stand_in = {byte: chr(byte) for byte in printable}
    others = (byte for byte in range(256) if byte not in stand_in)
    stand_in.update({byte: chr(256 + i) for i, byte in enumerate(others)})
    return [stand_in[byte] for byte in range(256)]


def byte_level(
    merges: tuple[str, ...] = (),
    chat_template: str | None = CHATML,
    unspelt: tuple[str, ...] = (),
) -> PreTrainedTokenizerFast:
    """GPT-2's kind: ids 0..255 are the bytes, then three specials, ``unspelt``, ``merges``.

    ``merges`` are given as text; ``unspelt`` are tokens outside the alphabet, which some have.
    """
    alphabet = byte_alphabet()
    vocab = {piece: byte for byte, piece in enumerate(alphabet)}
    vocab |= {"<|im_start|>": IM_START, "<|im_end|>": IM_END, "<|endoftext|>": END_OF_TEXT}
    vocab |= {token: 259 + place for place, token in enumerate(unspelt)}
    pairs = []
    for text in merges:
        piece = "".join(alphabet[byte] for byte in text.encode())
        for end in range(2, len(piece) + 1):
            if piece[:end] not in vocab:
                pairs.append((piece[: end - 1], piece[end - 1]))
                vocab[piece[:end]] = len(vocab)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def sentencepiece(prepend: bool = True) -> PreTrainedTokenizerFast:
    """Llama's kind: ``▁`` for spaces, characters as pieces, ``<0xNN>`` for all other bytes."""
    words = ["▁Hello", "▁world", "▁the", "▁", "lo", "▁▁▁▁", "世", "界", "é"]
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for piece in [f"<0x{byte:02X}>" for byte in range(256)] + words:
        vocab[piece] = len(vocab)
    for code in range(33, 127):
        vocab.setdefault(chr(code), len(vocab))
    backend = Tokenizer(
        models.BPE(vocab=vocab, merges=[("l", "o")], byte_fallback=True, unk_token="<unk>")
    )
    steps = [normalizers.Prepend("▁")] if prepend else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prepend else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def unusual() -> PreTrainedTokenizerFast:
    """As ``sentencepiece``, with one more step of decoding that changes nothing."""
    tokenizer = sentencepiece(prepend=False)
    steps = [tokenizer.backend_tokenizer.decoder, decoders.Strip("~", 0, 0)]
    tokenizer.backend_tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def metaspace() -> PreTrainedTokenizerFast:
    """T5's and XLNet's kind: unigram pieces with a Metaspace decoder."""
    pieces = [
        "<unk>",
        "</s>",
        "▁Hello",
        "▁world",
        "▁",
        "s",
        "a",
        "b",
        "c",
        ".",
        ",",
        "世",
        "é",
        "▁a",
    ]
    backend = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], 0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def wordpiece() -> PreTrainedTokenizerFast:
    """BERT's kind: ``##`` continues a word, and ``decode`` cleans up spaces by default."""
    pieces = [
        "[UNK]",
        "[SEP]",
        "hello",
        "world",
        "##s",
        "##ing",
        "do",
        "n",
        "'",
        "t",
        ".",
        ",",
        "!",
    ]
    vocab = {piece: i for i, piece in enumerate([*pieces, "世", "é", "##é"])}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="[SEP]",
        unk_token="[UNK]",
        clean_up_tokenization_spaces=True,
    )


def plain_added() -> PreTrainedTokenizerFast:
    """Byte level with added tokens that are not special: ``<think>`` and one with a space."""
    tokenizer = byte_level()
    tokenizer.add_tokens(
        [
            AddedToken("<think>", normalized=False, special=False),
            AddedToken("wide é", special=False),
        ]
    )
    return tokenizer


def begin_with(tokenizer: PreTrainedTokenizerFast, token: str) -> processors.TemplateProcessing:
    """A post-processor that puts ``token`` before every text."""
    token_id = tokenizer.convert_tokens_to_ids(token)
    return processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A $B", special_tokens=[(token, token_id)]
    )


@cache
def all_kinds() -> dict[str, PreTrainedTokenizerFast]:
    """One of each, by name; shared, so read only."""
    return {
        "byte level": byte_level(),
        "byte level with merges": byte_level(("Hello", " world", "世界", "é", "👩‍🚀", "� x")),
        "added tokens": plain_added(),
        "sentencepiece": sentencepiece(),
        "sentencepiece without prefix": sentencepiece(prepend=False),
        "unspelt tokens": byte_level(unspelt=("世", "é ")),
        "metaspace": metaspace(),
        "wordpiece": wordpiece(),
    }
