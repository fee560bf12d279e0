"""Edited and unedited requests that come and go at random: nobody's bits depend on the others."""

from __future__ import annotations

import copy
import random

import pytest

from tests.engine.models import prompts_of
from tests.engine.reading import read
from tests.inspection.models import tiny
from tests.inspection.test_edits import FORMULAS, edit, plan
from transformers_api.engine.base import SamplingParams, SequenceRequest

COUNT = 16
BEGIN = prompts_of(4)[3]
EDITS = {
    name: FORMULAS[name][0]
    for name in ("add", "scale attn", "zero mlp", "zero heads", "set neurons", "keep norm")
}


def request_of(chance):
    """A prompt that shares its beginning with others, and what is changed of it."""
    prompt = [*BEGIN[: chance.randint(1, len(BEGIN))], *chance.choices(range(3, 90), k=2)]
    params = {"max_tokens": chance.randint(1, 9), "temperature": 0.8, "seed": 1, "logprobs": 2}
    name = chance.choice([None, None, *EDITS])
    if name is None:
        return prompt, params, None
    start = chance.choice([0, len(prompt), 3])
    return prompt, params, (name, start)


def ask(asked):
    prompt, params, changed = asked
    edits = None
    if changed is not None:
        name, start = changed
        own = EDITS[name]
        positions = ((start, None),)
        fields = {key: getattr(own, key) for key in ("do", "part", "units", "vector", "by")}
        fields |= {"keeps_norm": own.keeps_norm, "positions": positions}
        edits = plan(edit(**fields), identity=repr(changed))
    return SequenceRequest(prompt, SamplingParams(ignore_eos=True, **params), edits=edits)


def scores(outputs):
    return [(output.token_id, output.score) for output in outputs if output.score]


@pytest.mark.parametrize(
    ("dtype", "chunk", "seed"),
    [
        ("float32", 3, 1),
        ("bfloat16", 8, 2),
        *(
            pytest.param(dtype, chunk, seed, marks=pytest.mark.slow)
            for dtype in ("float32", "bfloat16")
            for chunk in (1, 3, 8)
            for seed in (3, 4, 5)
        ),
    ],
)
def test_nobodys_bits_depend_on_who_comes_and_goes(watch, dtype, chunk, seed):
    chance = random.Random(seed)
    options = {"dtype": dtype, "prefill_chunk": chunk, "num_slots": 3}
    busy = watch(copy.deepcopy(tiny("gemma2")), **options).engine
    alone = watch("gemma2", **options).engine
    requests = [request_of(chance) for _ in range(COUNT)]
    leaving = {n for n in range(COUNT) if chance.random() < 0.25}
    streams = []
    for number, asked in enumerate(requests):
        streams.append(busy.submit([ask(asked)]))
        if number in leaving and chance.random() < 0.5:
            streams[-1].get(5)
        if number in leaving:
            streams[-1].abort()
    for number, stream in enumerate(streams):
        outputs = read(stream)[0]
        if number in leaving:
            continue
        alone.call(lambda _: alone.scheduler.forget()).result()
        own = read(alone.submit([ask(requests[number])]))[0]
        assert scores(outputs) == scores(own), (number, requests[number])
