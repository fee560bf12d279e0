from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.checkpoints.test_convert import byte_alphabet
from transformers_api.checkpoints import gguf_tokenizer, pretokenizers
from transformers_api.errors import ModelLoadFailed

# Texts with the tokens that llama.cpp makes of them, and what transformers' reader of GGUF made.
RECORDED = json.loads((Path(__file__).parents[1] / "fixtures/llama_cpp_tokens.json").read_text())
EXAMPLES = [
    pytest.param(case["pre"], example["text"], example["right"], id=f"{case['pre']}-{number}")
    for case in RECORDED
    if not case["pre"].startswith("spm")
    for number, example in enumerate(case["examples"])
]
SEVENS = "Steps:\n\n1. a2 x =  75"


def pieces(name: str, text: str) -> list[str]:
    return [piece for piece, _ in pretokenizers.byte_level(name).pre_tokenize_str(text)]


def ends(parts: list[str]) -> set[int]:
    lengths = [len(part) for part in parts]
    return {sum(lengths[: index + 1]) for index in range(len(lengths))}


def byte_level(**more: Any) -> dict[str, Any]:
    """Metadata of a file with a byte-level vocabulary."""
    tokens = [*byte_alphabet(), "<|begin|>", "<|end|>", "he", "Ġ5", "ĠĠ", "hello"]
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 256 + [3, 3] + [1] * 4,
        "tokenizer.ggml.merges": ["h e", "Ġ 5", "Ġ Ġ"],
        "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.eos_token_id": 257,
        **more,
    }


def sentencepiece(**more: Any) -> dict[str, Any]:
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    words = ["▁", *"abcdefghijklmnopqrstuvwxyz", "▁a", "▁h", "hi", "▁hi"]
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens + words,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(words),
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(index) for index in range(len(words))],
        "tokenizer.ggml.add_bos_token": False,
        **more,
    }


@pytest.mark.parametrize(("name", "text", "right"), EXAMPLES)
def test_no_piece_ends_inside_a_token_of_llama_cpp(name: str, text: str, right: list[str]) -> None:
    split = pieces(name, text)
    assert "".join(split) == "".join(right)
    assert ends(split) <= ends(right)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt-2", ["Steps", ":", "Ċ", "Ċ", "1", ".", "Ġa", "2", "Ġx", "Ġ=", "Ġ", "Ġ75"]),
        ("smollm", ["Steps", ":", "ĊĊ", "1", ".", "Ġa", "2", "Ġx", "Ġ=", "ĠĠ", "7", "5"]),
        ("llama-bpe", ["Steps", ":ĊĊ", "1", ".", "Ġa", "2", "Ġx", "Ġ=", "Ġ", "Ġ", "75"]),
        ("qwen2", ["Steps", ":ĊĊ", "1", ".", "Ġa", "2", "Ġx", "Ġ=", "Ġ", "Ġ", "7", "5"]),
        ("deepseek-llm", ["Steps", ":", "Ċ", "Ċ", "1", ".", "Ġa", "2", "Ġx", "Ġ=", "ĠĠ", "75"]),
        ("deepseek-coder", ["Steps", ":", "Ċ", "Ċ", "1", ".", "Ġa", "2", "Ġx", "Ġ=ĠĠ", "7", "5"]),
        ("deepseek-v3", ["Steps", ":ĊĊ", "1", ".", "Ġa", "2", "Ġx", "Ġ=", "ĠĠ", "75"]),
        ("viking", ["Steps:", "ĊĊ", "1", ".", "Ġa", "2", "Ġx", "Ġ=", "Ġ", "Ġ", "7", "5"]),
    ],
)
def test_a_name_cuts_where_its_models_were_trained_to(name: str, expected: list[str]) -> None:
    assert pieces(name, SEVENS) == expected


@pytest.mark.parametrize(
    ("name", "digits"),
    [
        ("gpt-2", ["1234567"]),
        ("smollm", list("1234567")),
        ("llama-bpe", ["123", "456", "7"]),
        ("falcon", ["123", "456", "7"]),
        ("superbpe", ["1", "234", "567"]),
        ("afmoe", ["1", "234", "567"]),
        ("tiny_aya", ["1", "234", "567"]),
    ],
)
def test_digits_are_grouped_as_each_name_says(name: str, digits: list[str]) -> None:
    assert pieces(name, "1234567") == digits


@pytest.mark.parametrize("name", sorted(pretokenizers.PATTERNS))
def test_every_pre_tokenizer_keeps_every_character(name: str) -> None:
    text = "Ab's  1234\r\n\n日本語 e\u0301Ünder_score!? \t🇩🇪 "
    spelled = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    assert "".join(pieces(name, text)) == spelled.pre_tokenize_str(text)[0][0]


def test_wrong_pieces_make_other_ids() -> None:
    """A sanity check of the recorded texts: GPT-2's pieces do not make llama.cpp's tokens."""
    vocab = {token: index for index, token in enumerate([*byte_alphabet(), "Ġ5", "ĠĠ"])}
    tokens = {}
    for name in ("gpt-2", "smollm"):
        tokenizer = Tokenizer(models.BPE(vocab, [("Ġ", "5"), ("Ġ", "Ġ")]))
        tokenizer.pre_tokenizer = pretokenizers.byte_level(name)
        tokens[name] = tokenizer.encode("  5").tokens
    assert tokens == {"gpt-2": ["Ġ", "Ġ5"], "smollm": ["ĠĠ", "5"]}


def test_default_models_digits_stand_alone() -> None:
    tokenizer = gguf_tokenizer.build(byte_level())
    assert tokenizer.tokenize("he =  5") == ["he", "Ġ", "=", "ĠĠ", "5"]
    assert tokenizer.decode(tokenizer("he =  5")["input_ids"]) == "he =  5"


def test_unknown_pre_tokenizer_is_refused_and_a_missing_one_warned_of() -> None:
    with pytest.raises(ModelLoadFailed, match=r"'novel' \(tokenizer\.ggml\.pre\) is not known"):
        gguf_tokenizer.check(byte_level(**{"tokenizer.ggml.pre": "novel"}))
    metadata = byte_level()
    assert gguf_tokenizer.check(metadata) is None
    del metadata["tokenizer.ggml.pre"]
    assert "tokenizer.ggml.pre" in str(gguf_tokenizer.check(metadata))
    assert gguf_tokenizer.build(metadata).tokenize("a1b!") == ["a", "1", "b", "!"]
    assert gguf_tokenizer.check(sentencepiece()) is None


def test_special_tokens_outside_the_byte_alphabet_keep_their_ids() -> None:
    # DeepSeek's: transformers adds such a token a second time, beyond the model's vocabulary
    metadata = byte_level()
    metadata["tokenizer.ggml.tokens"][256:258] = ["<｜begin▁of▁sentence｜>", "<｜User｜>"]
    metadata["tokenizer.ggml.token_type"][257] = 4
    tokenizer = gguf_tokenizer.build(metadata)
    assert len(tokenizer) == 262
    assert tokenizer("<｜begin▁of▁sentence｜><｜User｜>he")["input_ids"] == [256, 257, 258]
    assert tokenizer.bos_token_id == 256
    assert tokenizer.all_special_ids == [256, 257]  # the second is the end of text
    assert tokenizer("<|endoftext|>")["input_ids"][0] == ord("<")


@pytest.mark.parametrize(
    ("pre", "expected"), [("llama-bpe", ["hello"]), ("qwen2", ["he", "l", "l", "o"])]
)
def test_a_piece_that_is_a_token_stays_whole_where_the_name_says_so(
    pre: str, expected: list[str]
) -> None:
    tokenizer = gguf_tokenizer.build(byte_level(**{"tokenizer.ggml.pre": pre}))
    assert tokenizer.tokenize("hello") == expected


@pytest.mark.parametrize(
    ("more", "first"),
    [
        ({"tokenizer.ggml.pre": "llama-bpe"}, 256),
        ({"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": False}, 258),
        ({"tokenizer.ggml.pre": "qwen2"}, 258),
        ({"tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.add_bos_token": True}, 256),
    ],
)
def test_the_first_token_is_the_files_or_the_names(more: dict[str, Any], first: int) -> None:
    assert gguf_tokenizer.build(byte_level(**more))("he")["input_ids"][0] == first


@pytest.mark.parametrize(
    ("add_space", "text", "expected"),
    [
        (True, "hi", ["▁hi"]),
        (False, "hi", ["hi"]),
        (True, " hi", ["▁", "▁hi"]),
        (False, " hi", ["▁hi"]),
        (True, "  ", ["▁", "▁", "▁"]),
        (True, "a</s>a", ["▁a", "</s>", "▁a"]),
        (False, "a</s>a", ["a", "</s>", "a"]),
    ],
)
def test_sentencepiece_writes_a_space_first_only_where_the_file_says_so(
    add_space: bool, text: str, expected: list[str]
) -> None:
    metadata = sentencepiece(**{"tokenizer.ggml.add_space_prefix": add_space})
    tokenizer = gguf_tokenizer.build(metadata)
    assert tokenizer.tokenize(text) == expected
    if "</s>" not in text:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def gemma(**more: Any) -> dict[str, Any]:
    words = [
        "▁",
        *"abcdefghijklmnopqrstuvwxyz",
        "\n",
        "th",
        "the",
        "▁the",
        "▁t",
        "he",
        "an",
        "▁an",
    ]
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "  ", "   ", "\n\n", "<start>"]
    tokens += [f"<0x{byte:02X}>" for byte in range(256)] + words
    return {
        "general.architecture": "gemma3",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 5 + [4] * 3 + [3] + [6] * 256 + [1] * len(words),
        "tokenizer.ggml.scores": [-1000.0] * len(tokens),
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        **more,
    }


BY_SCORES = sentencepiece()
BY_MERGES = sentencepiece(**{"tokenizer.ggml.merges": ["▁ h", "h i", "▁h i"]})
VOCABULARIES = {
    "byte level": byte_level(),
    "sentencepiece": BY_SCORES,
    "sentencepiece with merges": BY_MERGES,
    "gemma": gemma(),
    "gemma4": gemma(**{"tokenizer.ggml.model": "gemma4", "tokenizer.ggml.merges": ["t h", "th e"]}),
}


@pytest.mark.parametrize("name", VOCABULARIES)
def test_what_is_written_at_once_is_what_the_library_would_save(tmp_path: Path, name: str) -> None:
    metadata = VOCABULARIES[name]
    gguf_tokenizer.build(metadata).save_pretrained(tmp_path / "saved")
    (tmp_path / "written").mkdir()
    gguf_tokenizer.write(metadata, tmp_path / "written")
    saved, written = ({p.name: p for p in (tmp_path / n).iterdir()} for n in ("saved", "written"))
    assert saved.keys() == written.keys()
    for file in saved:
        assert json.loads(saved[file].read_text()) == json.loads(written[file].read_text()), file


def test_gemmas_ids_are_those_of_the_reader_in_transformers() -> None:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import (
        add_gguf_special_tokens,
        gemma_tokenizer,
    )

    metadata = gemma()
    names = {"tokens": "tokens", "scores": "scores", "token_type": "token_type"}
    of_file = {name: metadata[f"tokenizer.ggml.{key}"] for key, name in names.items()}
    reference = add_gguf_special_tokens(gemma_tokenizer(of_file), of_file)
    tokenizer = gguf_tokenizer.build(metadata)
    for text in ("the an", "  the   then", "a\n\nb\n", "<start>the é 世", " ", "than<eos> anthem"):
        expected = reference.encode(text, add_special_tokens=False)
        assert tokenizer.encode(text, add_special_tokens=False) == expected, text
        assert tokenizer.decode(expected) == reference.decode(expected)
    assert tokenizer.encode("a")[0] == 2


@pytest.mark.parametrize("merge", ["q z", "h x", "zz e"])
def test_a_merge_of_no_tokens_is_a_vocabulary_that_cannot_be_read(
    tmp_path: Path, merge: str
) -> None:
    metadata = byte_level(**{"tokenizer.ggml.merges": ["h e", merge]})
    for make in (gguf_tokenizer.build, lambda m: gguf_tokenizer.write(m, tmp_path)):
        with pytest.raises(ModelLoadFailed, match="the vocabulary cannot be read"):
            make(metadata)


def test_a_kind_of_tokenizer_that_is_not_known_is_named() -> None:
    with pytest.raises(ModelLoadFailed, match=r"'rwkv' \(tokenizer\.ggml\.model\)"):
        gguf_tokenizer.build({"tokenizer.ggml.model": "rwkv", "tokenizer.ggml.tokens": ["a"]})
