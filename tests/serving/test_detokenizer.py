from __future__ import annotations

import codecs
from itertools import chain

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import tokenizers
from transformers_api.serving.text.detokenizer import detokenizer as make_detokenizer

KINDS = tokenizers.all_kinds()
# In these, bytes that are not text change what the library decodes for the text around them.
BYTE_FALLBACK = ("sentencepiece", "sentencepiece without prefix")
TEXTS = st.text(alphabet="ab .,�é世界👩‍🚀🇩🇪\n", max_size=12)


def decode(tokenizer, ids, skip_special_tokens=True):
    return tokenizer.decode(
        list(ids),
        skip_special_tokens=skip_special_tokens,
        clean_up_tokenization_spaces=False,
    )


def pieces(tokenizer, ids, prompt_ids=(), **options):
    detokenizer = make_detokenizer(tokenizer, prompt_ids, **options)
    return [*(detokenizer.push(i) for i in ids), detokenizer.flush()]


def joined(parts):
    return list(chain.from_iterable(parts))


def pairs_of_bytes_and_text(tokenizer):
    """Ids where byte tokens spell whole characters, or nothing of a character."""
    word = st.sampled_from(
        [i for i in range(len(tokenizer)) if not 3 <= i < 259]  # 3..258 are <0x00>..<0xFF>
    )
    character = st.characters(exclude_categories=["Cs"]).map(
        lambda c: [3 + byte for byte in c.encode()]
    )
    broken = st.sampled_from(["80", "BF", "C3", "E4", "E4B8", "F09F98", "FF"]).map(
        lambda digits: [3 + byte for byte in bytes.fromhex(digits)]
    )
    end = st.just([262])  # a piece that is no byte ends a run of bytes
    run = st.lists(character, max_size=4).map(joined)
    part = st.one_of(word.map(lambda i: [i]), run, st.tuples(end, broken, end).map(joined))
    return st.lists(part, max_size=8).map(joined)


def random_ids(kind):
    tokenizer = KINDS[kind]
    if kind in BYTE_FALLBACK:
        return pairs_of_bytes_and_text(tokenizer)
    return st.lists(st.integers(0, len(tokenizer) + 2), max_size=40)


@pytest.mark.parametrize("skip", [True, False], ids=["skipping specials", "keeping specials"])
@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_streamed_text_is_the_whole_text(kind, skip, data):
    tokenizer = KINDS[kind]
    ids = data.draw(random_ids(kind))
    sent = pieces(tokenizer, ids, skip_special_tokens=skip)
    assert "".join(sent) == decode(tokenizer, ids, skip)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_streamed_text_is_what_the_whole_text_adds_to_the_prompt(kind, data):
    tokenizer = KINDS[kind]
    prompt = tokenizer.encode("a " + data.draw(TEXTS) + "b", add_special_tokens=False)
    ids = data.draw(random_ids(kind))
    sent = pieces(tokenizer, ids, prompt)
    assert decode(tokenizer, prompt) + "".join(sent) == decode(tokenizer, prompt + ids)


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS)
@settings(deadline=None)
def test_no_piece_ends_inside_a_character(kind, text):
    tokenizer = KINDS[kind]
    ids = tokenizer.encode(text, add_special_tokens=False)
    whole = decode(tokenizer, ids)
    position = 0
    for piece in pieces(tokenizer, ids):
        assert whole[position : position + len(piece)] == piece
        piece.encode()  # no lone surrogate
        position += len(piece)
    assert position == len(whole)


@pytest.mark.parametrize("kind", ["byte level", *BYTE_FALLBACK])
@pytest.mark.parametrize("text", ["👩‍🚀", "世界", "né", "🇩🇪"])
def test_a_character_of_several_tokens_comes_whole_with_its_last_one(kind, text):
    tokenizer = KINDS[kind]
    offset = 0 if kind == "byte level" else 3
    detokenizer = make_detokenizer(tokenizer)
    for character in text:
        *first, last = [offset + byte for byte in character.encode()]
        assert [detokenizer.push(i) for i in first] == [""] * len(first)
        assert detokenizer.push(last) == character
    assert detokenizer.flush() == ""


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("metaspace", "wordpiece")])
def test_replacement_characters_do_not_hold_the_text_back(kind):
    tokenizer = KINDS[kind]
    mark = tokenizer.encode("�", add_special_tokens=False)
    detokenizer = make_detokenizer(tokenizer, tokenizer.encode("a"))
    sent = "".join(detokenizer.push(i) for i in mark * 100)
    assert len(sent) >= 97
    ends = "".join(map(detokenizer.push, tokenizer.encode("b", add_special_tokens=False)))
    assert (sent + ends).replace(" ", "") == "�" * 100 + "b"


def test_bytes_that_are_no_text_become_replacement_characters_at_once():
    assert pieces(KINDS["byte level"], [0xFF, 0xFE, ord("a")]) == ["�", "�", "a", ""]


def test_an_unfinished_character_comes_as_a_replacement_at_the_end():
    assert pieces(KINDS["byte level"], [ord("a"), 0xE4, 0xB8]) == ["a", "", "", "�"]


@pytest.mark.parametrize(
    "tokenizer",
    [*(KINDS[kind] for kind in BYTE_FALLBACK), tokenizers.unusual()],
    ids=[*BYTE_FALLBACK, "unusual decoder"],
)
@pytest.mark.parametrize("text", ["世界", "🚀", "é", "世🚀é"])
def test_long_runs_of_byte_tokens_stream_character_by_character(tokenizer, text):
    ids = [3 + byte for byte in (text * 20).encode()]
    sent = pieces(tokenizer, ids)
    assert [piece for piece in sent if piece] == list(text * 20)


@pytest.mark.parametrize("kind", BYTE_FALLBACK)
def test_characters_that_were_complete_stay_when_later_bytes_are_no_text(kind):
    byte_ids = [3 + byte for byte in "世".encode()]
    assert "".join(pieces(KINDS[kind], [*byte_ids, 3 + 0xFF])) == "世�"


@pytest.mark.parametrize("kind", ["byte level", *BYTE_FALLBACK])
def test_a_character_begun_by_the_prompt_is_finished_by_the_output(kind):
    offset = 0 if kind == "byte level" else 3
    spelt = [offset + byte for byte in "🚀".encode()]
    assert "".join(pieces(KINDS[kind], spelt[2:], spelt[:2])) == "🚀"


@pytest.mark.parametrize("kind", ["byte level", *BYTE_FALLBACK])
def test_a_character_broken_off_by_the_prompt_is_not_repeated(kind):
    tokenizer = KINDS[kind]
    prompt = [(0 if kind == "byte level" else 3) + 0xE4]
    ids = tokenizer.encode("lo", add_special_tokens=False)
    whole = decode(tokenizer, prompt + ids)
    assert "".join(pieces(tokenizer, ids, prompt)) == whole.removeprefix("�")


def test_sentencepiece_keeps_the_space_after_a_prompt_and_drops_it_at_the_start():
    tokenizer = KINDS["sentencepiece"]
    hello = tokenizer.convert_tokens_to_ids("▁Hello")
    assert pieces(tokenizer, [hello])[0] == "Hello"
    assert pieces(tokenizer, [hello], [1])[0] == "Hello", "<s> is no text"
    assert pieces(tokenizer, [hello], tokenizer.encode("the"))[0] == " Hello"


def test_special_tokens_are_skipped_or_shown():
    tokenizer = KINDS["byte level"]
    ids = [ord("a"), tokenizers.IM_END, ord("b")]
    assert pieces(tokenizer, ids) == ["a", "", "b", ""]
    assert pieces(tokenizer, ids, skip_special_tokens=False) == ["a", "<|im_end|>", "b", ""]


def each_byte(error):
    return "�" * (error.end - error.start), error.end


codecs.register_error("tests.each_byte", each_byte)


class SlowTokenizer:
    """One that knows only whole decodes, of bytes; counts how many ids it was given."""

    def __init__(self, errors="replace"):
        self.added_tokens_decoder = {}
        self.errors = errors
        self.decoded = 0

    def decode(self, ids, skip_special_tokens=False, clean_up_tokenization_spaces=None):
        assert clean_up_tokenization_spaces is False
        self.decoded += len(ids)
        return bytes(ids).decode(errors=self.errors)


@pytest.mark.parametrize("errors", ["replace", "tests.each_byte"])
@given(
    prompt=st.text(max_size=20),
    text=st.lists(st.one_of(st.text(max_size=9).map(str.encode), st.binary(max_size=3))),
)
@settings(deadline=None)
def test_tokenizers_without_a_backend_stream_the_same_text(errors, prompt, text):
    prompt_ids, ids = list(prompt.encode()), list(b"".join(text))
    sent = "".join(pieces(SlowTokenizer(errors), ids, prompt_ids))
    assert prompt + sent == bytes([*prompt_ids, *ids]).decode(errors=errors)


@pytest.mark.parametrize("errors", ["replace", "tests.each_byte"])
def test_tokenizers_without_a_backend_send_whole_characters(errors):
    sent = pieces(SlowTokenizer(errors), list(("🚀世" * 20).encode()))
    assert [piece for piece in sent if piece] == list("🚀世" * 20)


def test_a_slow_tokenizer_finishes_what_the_prompt_began():
    spelt = list("a🚀".encode())
    assert "".join(pieces(SlowTokenizer(), spelt[3:], spelt[:3])) == "🚀"


@pytest.mark.parametrize("text", ["ab ", "世界", "👩‍🚀", "�"])
def test_the_work_per_token_does_not_grow(text):
    def work(count):
        tokenizer = SlowTokenizer()
        pieces(tokenizer, list(text.encode()) * count, list(text.encode()) * 50)
        return tokenizer.decoded / (len(text.encode()) * count)

    assert work(1000) < work(100) * 1.2 < 60
