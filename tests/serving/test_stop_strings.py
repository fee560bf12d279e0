from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from transformers_api.serving.text.stop_strings import StopStrings

LETTERS = "ab\n"
STOPS = st.lists(st.text(LETTERS, min_size=1, max_size=5), max_size=4)
CHUNKS = st.lists(st.text(LETTERS, max_size=6), max_size=12)


def run(stops, chunks):
    """(what was sent, piece by piece; the stop string)."""
    search = StopStrings(stops)
    sent = []
    for chunk in chunks:
        text, matched = search.push(chunk)
        sent.append(text)
        if matched is not None:
            assert search.flush() == ""
            return sent, matched
    return [*sent, search.flush()], None


def cut(text, stops):
    """The oracle: look at the end of every beginning of the text, character by character."""
    for end in range(len(text) + 1):
        endings = [stop for stop in stops if text[:end].endswith(stop)]
        if endings:
            longest = max(endings, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(stops=STOPS, chunks=CHUNKS)
@example(stops=["abab"], chunks=["ab", "a", "abab"])
@example(stops=["aab"], chunks=["a", "a", "a", "b"])
@example(stops=["abb", "ba"], chunks=["ab", "a"])
def test_any_chunks_give_what_the_whole_text_gives(stops, chunks):
    sent, matched = run(stops, chunks)
    assert ("".join(sent), matched) == cut("".join(chunks), stops)


@given(stops=STOPS, chunks=CHUNKS)
def test_only_what_may_become_a_stop_string_is_held_back(stops, chunks):
    search = StopStrings(stops)
    text = sent = ""
    for chunk in chunks:
        text += chunk
        safe, matched = search.push(chunk)
        sent += safe
        if matched is not None:
            return
        assert text.startswith(sent)
        held = text[len(sent) :]
        longest = max(
            (n for n in range(1, len(text) + 1) for stop in stops if stop.startswith(text[-n:])),
            default=0,
        )
        assert len(held) == longest


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_a_stop_string_is_found_across_pieces(size):
    text = "one\ntwo END three"
    chunks = [text[i : i + size] for i in range(0, len(text), size)]
    sent, matched = run(["END", "never"], chunks)
    assert ("".join(sent), matched) == ("one\ntwo ", "END")


def test_what_only_looked_like_a_stop_string_is_sent_as_soon_as_that_is_known():
    search = StopStrings(["</answer>"])
    assert search.push("a </ans") == ("a ", None)
    assert search.push("we") == ("", None)
    assert search.push("!") == ("</answe!", None)


def test_what_only_looked_like_a_stop_string_is_kept_at_the_end():
    search = StopStrings(["END"])
    assert search.push("the EN") == ("the ", None)
    assert search.flush() == "EN"
    assert search.flush() == ""


def test_the_stop_string_that_is_complete_first_wins():
    assert run(["abcd", "bc"], ["abcd"]) == (["a"], "bc")
    assert run(["ab", "abc"], ["abc"]) == ([""], "ab")


def test_of_stop_strings_that_end_together_the_longest_wins():
    assert run(["c", "bc", "abc"], ["xabc"]) == (["x"], "abc")


def test_without_stop_strings_nothing_is_held_back():
    assert run([], ["a", "b"]) == (["a", "b", ""], None)
    assert run([""], ["a", "b"]) == (["a", "b", ""], None)
