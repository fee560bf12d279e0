"""Patterns over sets of positions: what re says, without its time."""

from __future__ import annotations

import random
import re
import time
from contextlib import suppress

import pytest

from transformers_api.checkpoints.headers.path_pattern import PathPattern

ATOMS = [
    "a",
    "b",
    r"\.",
    ".",
    "[ab]",
    "[^a.]",
    r"\d",
    r"\W",
    "(a|b.)",
    "(?:ab|a)",
    "(a*b)",
    "$",
    "(|a)",
]
REPEATS = ["", "", "", "*", "+", "?", "*?", "{2}", "{1,3}", "{0,2}", "+?"]


def random_pattern(source: random.Random) -> str:
    parts = (source.choice(ATOMS) + source.choice(REPEATS) for _ in range(source.randint(1, 5)))
    text = "".join(parts)
    return f"({text}){source.choice(REPEATS)}|b" if source.random() < 0.2 else text


def test_matches_are_those_of_re():
    source = random.Random(0)
    compared = 0
    while compared < 1500:
        text = random_pattern(source)
        path = "".join(source.choice("ab.1") for _ in range(source.randint(0, 8)))
        with suppress(re.error, ValueError):
            expected, pattern = re.compile(text), PathPattern(text)
            assert pattern.is_whole(path) is bool(expected.fullmatch(path)), (text, path)
            assert pattern.is_start(path) is bool(expected.match(path)), (text, path)
            end = re.match(rf"(.*\.)?({text})$", path)
            assert pattern.is_end(path) is bool(end), (text, path)
            compared += 1


@pytest.mark.parametrize(
    "text", [".?" * 250, "(.|.)" * 99 + "X", ".*" * 249 + "X", "((a*b)*a)*X", "(a?){4294967294}X"]
)
@pytest.mark.parametrize("path", ["a" * 500, "ab" * 250])
def test_no_pattern_takes_long(text, path):
    began = time.thread_time()
    assert not PathPattern(text).is_whole(path) or text == ".?" * 250
    assert time.thread_time() - began < 5


def test_a_path_longer_than_any_layer_has_no_match():
    assert not PathPattern(".*").is_whole("a" * 501)
