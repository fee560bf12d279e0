"""Fifty edited requests at once beside others that ask for nothing of the kind; a real server.

The others' tokens and scores equal those of a quiet server to the bit, and they wait no longer than
beside fifty requests that are not edited.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.conftest import Measured
from tests.faults.tiny import Tiny, environment, started

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]

CROWD, ROUNDS, TOKENS = 50, 3, 48
MOST_SLOWER = 1.5  # beside edited company: a machine that does other work too
PROMPTS = ["Hello there friend", "a", "The quick brown fox", "x y z " * 30]
OTHER = {"prompt": "Good bye, my dear old friend"}
EDITS: list[Any] = [
    {"do": "add", "layer": 0, "vector": [0.5] * 32},
    {"do": "scale", "part": "head", "layer": 1, "heads": [1], "by": 3, "at": "generated"},
    {"do": "block", "layer": 0, "keys": [0]},
    {"do": "temper", "layer": 1, "temperature": 3},
    {"do": "scale", "part": "v", "layer": 0, "by": 2},
    {"do": "patch", "layer": 0, "at": [-1], "from": {**OTHER, "at": [-1]}},
]
MORE: list[dict[str, Any]] = [
    {},
    {"n": 2, "temperature": 1, "seed": 3},
    {"trace": {"layers": [0], "activations": [{"part": "q", "layer": 1}]}},
    {"compare": "free"},
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiny]:
    settings = environment(tmp_path_factory.mktemp("edited"))
    more = {"MAX_INFLIGHT": "64", "MAX_QUEUE": "512", "RATE_LIMIT_PER_MIN": "0"}
    with started(settings | more) as server:
        yield server


def scores(tiny: Tiny, **fields: Any) -> tuple[Any, float]:
    """The scores of an answer, and the seconds that it took."""
    body = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, "logprobs": 3, **fields}
    began = time.monotonic()
    status, answer = tiny.ask("POST", "/v1/completions", body)
    assert status == 200, answer
    return [choice["logprobs"] for choice in answer["choices"]], time.monotonic() - began


def company(number: int, *, is_edited: bool) -> dict[str, Any]:
    """The fields of one of the crowd."""
    fields = {"prompt": PROMPTS[number % len(PROMPTS)]}
    if is_edited:
        others = dict(MORE[number % len(MORE)])
        free = {"compare": others.pop("compare")} if "compare" in others else {}
        fields |= others | {"intervene": {"edits": [EDITS[number % len(EDITS)]], **free}}
    return fields


def beside(tiny: Tiny, *, is_edited: bool) -> list[tuple[str, Any, float]]:
    """(prompt, scores, seconds) of the others, while a crowd is answered."""
    asked = []
    with ThreadPoolExecutor(CROWD + len(PROMPTS)) as pool:
        for _ in range(ROUNDS):
            crowd = [
                pool.submit(scores, tiny, **company(number, is_edited=is_edited))
                for number in range(CROWD)
            ]
            others = [(prompt, pool.submit(scores, tiny, prompt=prompt)) for prompt in PROMPTS]
            asked += [(prompt, *future.result()) for prompt, future in others]
            for future in crowd:
                future.result()
    return asked


def test_fifty_edited_requests_change_no_token_of_others_and_slow_them_as_company_does(
    tiny: Tiny, measured: Measured
) -> None:
    quiet = {prompt: scores(tiny, prompt=prompt)[0] for prompt in PROMPTS}
    plain, edited = (beside(tiny, is_edited=is_edited) for is_edited in (False, True))
    for prompt, own, _ in (*plain, *edited):
        assert own == quiet[prompt]
    waits = [statistics.median(seconds for *_, seconds in each) for each in (plain, edited)]
    measured(
        f"{len(edited)} answers beside {CROWD} edited requests equal a quiet server's to the bit; "
        f"median {waits[1]:.2f} s, beside {CROWD} that are not edited {waits[0]:.2f} s"
    )
    assert waits[1] < MOST_SLOWER * waits[0], waits
    assert {prompt: scores(tiny, prompt=prompt)[0] for prompt in PROMPTS} == quiet
