"""Stop strings that are special tokens, and where each token of an answer begins."""

import pytest

from tests import tokenizers
from tests.fakes import FakeEngine
from tests.serving.test_generation import begin, complete

IM_START, IM_END = tokenizers.IM_START, tokenizers.IM_END


def script(*pieces):
    ids = []
    for piece in pieces:
        ids += [piece] if isinstance(piece, int) else list(piece.encode())
    return FakeEngine(lambda *_: ids)


@pytest.mark.parametrize(
    ("stop", "pieces", "text", "read"),
    [
        (["<|im_start|>"], [IM_START] * 5, "", 1),
        (["<|im_start|>"], ["one", IM_START, "user two"], "one", 4),
        (["<|im_start|>"], ["one<|im_start|>two"], "one", 15),  # spelt by ordinary tokens
        (["<|im_end|>\n<|im_start|>"], ["a", IM_END, "\n", IM_START, "b"], "a", 4),
        (["<|im_end|>\n<|im_start|>"], ["a", IM_END, "-", IM_START, "b"], "a-b", 5),
        (["b<|im_end|>"], ["ab", IM_END, "c"], "a", 3),
        (["<|im_end|>", "b"], ["ab", IM_END, "c"], "a", 2),
        (["<|im_end|>c"], ["né ", IM_END, "d", IM_END, "cd"], "né d", 8),
        (["x"], ["one", IM_START, "two"], "onetwo", 7),
    ],
)
@pytest.mark.parametrize("logprobs", [None, 1])
def test_a_stop_string_may_be_or_hold_a_special_token(stop, pieces, text, read, logprobs):
    (choice,) = complete(script(*pieces), stop=stop, logprobs=logprobs)
    assert choice.text == text
    is_stopped = text not in ("a-b", "onetwo")
    assert (choice.stop_reason in stop) is is_stopped
    if is_stopped:
        assert len(choice.token_ids) == read


def test_nothing_of_a_mark_is_ever_sent():
    deltas = [d for d in begin(script("a", IM_END, "b", IM_END), stop=["<|im_end|>\n"]) if d]
    assert "".join(delta.text for delta in deltas) == "ab"


def test_no_stop_string_ends_an_answer_before_its_least_length():
    (choice,) = complete(script("a", IM_END, "b", IM_END), stop=["<|im_end|>"], min_tokens=3)
    assert (choice.text, choice.stop_reason) == ("ab", "<|im_end|>")


@pytest.mark.parametrize(
    ("raw", "offsets"),
    [
        (" 👍b".encode(), [0, 1, 2, 2, 2, 2]),
        (b"\xf0b", [0, 1]),
        ("é".encode() * 2, [0, 1, 1, 2]),
    ],
    ids=["an emoji", "a broken character", "two bytes each"],
)
def test_each_token_has_the_place_where_its_text_begins(raw, offsets):
    (choice,) = complete(FakeEngine(lambda *_: list(raw)), logprobs=0)
    assert [detail.offset for detail in choice.logprobs] == offsets


def half_emoji():
    tokenizer = tokenizers.byte_level(merges=(" 👍",))
    return tokenizer, tokenizer.convert_tokens_to_ids("Ġð" + "Ł" + "ĳ")


def test_a_token_comes_with_all_of_its_text():
    """A space and half a character in one token: the space goes out, the token waits."""
    tokenizer, half = half_emoji()
    assert half is not None
    engine = FakeEngine(lambda *_: [half, 0x8D, ord("b")], vocab_size=300)
    deltas = begin(engine, logprobs=0, tokenizer=tokenizer)
    pieces = [(delta.text, [d.offset for d in delta.logprobs]) for delta in deltas if delta]
    assert pieces == [(" ", []), ("👍", [0, 2]), ("b", [2]), ("", [])]
