from __future__ import annotations

import pytest

from tests import tokenizers
from transformers_api.serving.text.vocabulary import Vocabulary

KINDS = tokenizers.all_kinds()


@pytest.mark.parametrize(
    ("kind", "scheme"),
    [
        ("byte level", "byte_level"),
        ("added tokens", "byte_level"),
        ("sentencepiece", "byte_fallback"),
        ("sentencepiece without prefix", "byte_fallback"),
        ("metaspace", None),
        ("wordpiece", None),
    ],
)
def test_the_spelling_of_tokens_is_recognised(kind, scheme):
    assert Vocabulary(KINDS[kind]).scheme == scheme


def test_an_unusual_decoder_is_left_to_the_tokenizer():
    words = Vocabulary(tokenizers.unusual())
    assert words.scheme is None
    assert words.token_bytes(3 + 0xE4) == b"\xe4"


def test_byte_level_tokens_are_their_bytes():
    words = Vocabulary(KINDS["byte level"])
    assert [words.token_bytes(byte) for byte in range(256)] == [bytes([b]) for b in range(256)]


def test_merged_tokens_are_their_text():
    tokenizer = KINDS["byte level with merges"]
    [token] = tokenizer.encode(" world")
    words = Vocabulary(tokenizer)
    assert words.token_text(token) == " world"
    assert words.token_bytes(token) == b" world"


def test_part_of_a_character_is_written_as_escaped_bytes():
    words = Vocabulary(KINDS["byte level"])
    assert words.token_text(0xE2) == "bytes:\\xe2"
    assert words.token_bytes(0xE2) == b"\xe2"


def test_several_bytes_of_a_character_are_written_as_escaped_bytes():
    tokenizer = tokenizers.byte_level(("☺",))
    start_of_smile = tokenizer.convert_tokens_to_ids("âĺ")
    assert Vocabulary(tokenizer).token_text(start_of_smile) == "bytes:\\xe2\\x98"


def test_special_and_added_tokens_are_their_content():
    tokenizer = KINDS["added tokens"]
    words = Vocabulary(tokenizer)
    assert words.token_text(tokenizers.IM_END) == "<|im_end|>"
    assert words.token_text(tokenizer.convert_tokens_to_ids("<think>")) == "<think>"
    assert words.token_bytes(tokenizer.convert_tokens_to_ids("wide é")) == "wide é".encode()


def test_tokens_outside_the_alphabet_are_their_text():
    words = Vocabulary(KINDS["unspelt tokens"])
    assert [words.token_text(259), words.token_text(260)] == ["世", "é "]


def test_sentencepiece_tokens_have_spaces_and_bytes():
    tokenizer = KINDS["sentencepiece"]
    words = Vocabulary(tokenizer)
    assert words.token_text(tokenizer.convert_tokens_to_ids("▁Hello")) == " Hello"
    assert words.token_text(tokenizer.convert_tokens_to_ids("▁▁▁▁")) == "    "
    assert words.token_bytes(tokenizer.convert_tokens_to_ids("<0xE4>")) == b"\xe4"
    assert words.token_text(tokenizer.convert_tokens_to_ids("<0x0A>")) == "\n"
    assert words.token_text(tokenizer.convert_tokens_to_ids("</s>")) == "</s>"


def test_metaspace_and_wordpiece_tokens_are_what_they_add_to_a_text():
    metaspace, wordpiece = KINDS["metaspace"], KINDS["wordpiece"]
    words = Vocabulary(metaspace)
    assert words.token_text(metaspace.convert_tokens_to_ids("▁world")) == " world"
    assert words.token_text(metaspace.convert_tokens_to_ids("s")) == "s"
    words = Vocabulary(wordpiece)
    assert words.token_text(wordpiece.convert_tokens_to_ids("world")) == " world"
    assert words.token_text(wordpiece.convert_tokens_to_ids("##ing")) == "ing"


@pytest.mark.parametrize("kind", KINDS)
def test_ids_beyond_the_vocabulary_are_empty(kind):
    words = Vocabulary(KINDS[kind])
    assert words.token_bytes(100_000) == b""
    assert words.token_text(100_000) == ""


@pytest.mark.parametrize(
    "kind", ["byte level", "byte level with merges", "sentencepiece without prefix"]
)
def test_the_bytes_of_all_tokens_joined_are_the_text(kind):
    tokenizer = KINDS[kind]
    text = "Hello world 世界 é\n👩‍🚀 <|im_end|>"
    words = Vocabulary(tokenizer)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(map(words.token_bytes, ids)).decode() == text


def test_a_tokenizer_that_decodes_differently_than_its_decoder_says_is_believed():
    class Shouting(type(KINDS["byte level"])):
        def _decode(self, *args, **kwargs):
            return super()._decode(*args, **kwargs).upper()

    plain = KINDS["byte level"]
    shouting = Shouting(tokenizer_object=plain.backend_tokenizer, eos_token="<|endoftext|>")
    assert Vocabulary(shouting).scheme is None
    assert Vocabulary(shouting).token_text(ord("a")) == "A"


@pytest.mark.parametrize(
    ("token_id", "text", "display"),
    [
        (72, "H", "H"),
        (32, " ", " "),
        (10, "\n", "\\x0a"),
        (168, "\ufffd", "\\xa8"),
        (256, "<|im_start|>", "<|im_start|>"),
    ],
)
def test_where_ids_are_bytes_they_are_shown_as_niels_gpt_does(token_id, text, display):
    words = Vocabulary(KINDS["byte level"])
    assert (words.decoded(token_id), words.display(token_id)) == (text, display)


@pytest.mark.parametrize(
    ("text", "display"),
    [
        (" world", "␠world"),
        ("a\n\tb", "a⏎⇥b"),
        ("é\u200b", "é\\u200b"),
        ("世\u3000", "世\\u3000"),
    ],
)
def test_what_cannot_be_seen_is_shown_by_signs(text, display):
    tokenizer = tokenizers.byte_level((text,))
    [token] = tokenizer.encode(text, add_special_tokens=False)
    words = Vocabulary(tokenizer)
    assert (words.decoded(token), words.display(token)) == (text, display)


def test_part_of_a_character_is_shown_as_its_bytes():
    tokenizer = tokenizers.byte_level(("☺",))
    words = Vocabulary(tokenizer)
    start_of_smile = tokenizer.convert_tokens_to_ids("âĺ")
    assert words.decoded(start_of_smile) == "\ufffd"
    assert words.display(start_of_smile) == "\\xe2\\x98"
