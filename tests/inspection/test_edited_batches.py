"""Edited and unedited requests that come and go at random: nobody's bits depend on the others."""

from __future__ import annotations

import copy
import random
from dataclasses import replace

import pytest

from tests.engine.models import prompts_of
from tests.engine.reading import read
from tests.inspection.models import tiny
from tests.inspection.random_edits import KINDS, random_plan
from transformers_api.engine.base import SamplingParams, SequenceRequest
from transformers_api.inspection.activations import ActivationSpec
from transformers_api.inspection.base import TracePlan
from transformers_api.inspection.edit_plan import EditTally
from transformers_api.inspection.logit_share import LogitPartsQuestion

COUNT = 16
BEGIN = prompts_of(4)[3]
PARTS = LogitPartsQuestion(position=-1, by="head")
NOTED = (
    TracePlan(layers=(1,), topk=2, parts=PARTS, records=((0, "resid"),)),
    TracePlan(layers=(0, 1), heads=(3, 0)),
    TracePlan(
        layers=(1,), heads="mean", attn_topk=3, activations=(ActivationSpec(part="k", layer=1),)
    ),
)


def request_of(chance, earlier, kinds=tuple(KINDS)):
    """A prompt that begins as others do, perhaps edits, forced tokens, and notes of its steps.

    Some go on from an ``earlier`` one under the same edits: a branch, or what the cache may have.
    """
    prompt = [*BEGIN[: chance.randint(1, len(BEGIN))], *chance.choices(range(3, 90), k=2)]
    own, kinds = random_plan(chance, len(prompt), kinds) if chance.random() < 0.6 else (None, [])
    if earlier and chance.random() < 0.4:
        before, params, own, kinds, _ = chance.choice(earlier)
        prompt = [*before, *chance.choices(range(3, 90), k=chance.randint(0, 3))]
    params = {"max_tokens": chance.randint(1, 9), "temperature": 0.8, "seed": 1, "logprobs": 2}
    if chance.random() < 0.3:
        first = chance.randrange(3)
        params["forced"] = {first + at: chance.randrange(3, 90) for at in range(2)}
    at = int(8 * chance.random())
    noted = NOTED[at] if at < len(NOTED) else None
    return prompt, params, own, kinds, noted


def submitted(engine, asked):
    prompt, params, own, _, noted = asked
    edits = None if own is None else replace(own, tally=EditTally())
    request = SequenceRequest(prompt, SamplingParams(ignore_eos=True, **params), edits=edits)
    return engine.submit([request], observe={"trace": noted} if noted else {})


def scores(outputs):
    return [(output.token_id, output.score) for output in outputs if output.score]


def attention_rows(outputs):
    """The bits of each row that was noted, with the layer and the place of its first column."""
    traces = [output.extras["trace"] for output in outputs if "trace" in output.extras]
    return [
        [(row.layer, row.key_start, row.weights.tobytes()) for row in trace.attention]
        for trace in traces
    ]


@pytest.mark.parametrize(
    ("name", "dtype", "chunk", "seed"),
    [
        ("gemma2", "float32", 3, 1),
        ("gemma2", "bfloat16", 8, 2),
        *(
            pytest.param(name, dtype, chunk, seed, marks=pytest.mark.slow)
            for name in ("gemma2", "gpt2", "gpt-oss-sinks", "mistral-window-8")
            for dtype in ("float32", "bfloat16")
            for chunk in (1, 3, 8)
            for seed in (3, 4, 5)
        ),
    ],
)
def test_nobodys_bits_depend_on_who_comes_and_goes(watch, name, dtype, chunk, seed):
    chance = random.Random(seed)
    options = {"dtype": dtype, "prefill_chunk": chunk, "num_slots": 3}
    busy = watch(copy.deepcopy(tiny(name)), **options).engine
    alone = watch(name, **options).engine
    # Neurons of experts are no edit.
    kinds = [kind for kind in KINDS if name != "gpt-oss-sinks" or kind != "set neurons"]
    requests = []
    for _ in range(COUNT):
        requests.append(request_of(chance, requests, kinds))
    leaving = {n for n in range(COUNT) if chance.random() < 0.25}
    streams = []
    for number, asked in enumerate(requests):
        streams.append(submitted(busy, asked))
        if number in leaving and chance.random() < 0.5:
            streams[-1].get(5)
        if number in leaving:
            streams[-1].abort()
    for number, stream in enumerate(streams):
        outputs = read(stream)[0]
        if number in leaving:
            continue
        alone.call(lambda _: alone.scheduler.forget()).result()
        own = read(submitted(alone, requests[number]))[0]
        assert scores(outputs) == scores(own), (number, requests[number])
        assert attention_rows(outputs) == attention_rows(own), (number, requests[number])
        assert bool(attention_rows(own)) == bool(requests[number][4])


def test_the_fast_rounds_have_every_kind_of_edit():
    kinds = set()
    for seed in (1, 2):
        chance, requests = random.Random(seed), []
        for _ in range(COUNT):
            requests.append(request_of(chance, requests))
        kinds |= {kind for *_, own, _ in requests for kind in own}
    assert kinds == KINDS.keys()
