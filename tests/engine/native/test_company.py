"""Whatever shares the steps of a sequence, comes, leaves, reads ahead: not one bit changes."""

from __future__ import annotations

import random

import pytest

from tests import lora
from tests.engine.models import tiny_model
from tests.engine.reading import ask, read
from tests.engine.test_listener import shown
from tests.repeats import slow
from transformers_api.engine.base import DryParams, FinishReason
from transformers_api.metrics import Metrics

ROUNDS = 2
REQUESTS = 14


def bits(outputs):
    """All that a sequence got: tokens, log probabilities, why it ended."""
    return [(o.token_id, o.score, o.finish_reason, o.prompt_scores) for o in outputs]


def params_of(rng):
    """Any parameters; many answers repeat themselves, and their prompts."""
    return {
        "max_tokens": rng.randint(1, 40),
        "min_tokens": rng.choice([0, 0, 5]),
        "temperature": rng.choice([0.0, 0.0, 0.2, 1.0]),
        "top_p": rng.choice([1.0, 0.9, 0.5]),
        "top_k": rng.choice([0, 0, 3]),
        "repetition_penalty": rng.choice([1.0, 1.0, 1.1]),
        "frequency_penalty": rng.choice([0.0, 0.0, 0.3]),
        "logit_bias": rng.choice([{}, {}, {7: 2.0, 11: -3.0}]),
        "stop_token_ids": rng.choice([frozenset(), frozenset({rng.randint(3, 96)})]),
        "ignore_eos": rng.random() < 0.7,
        "logprobs": rng.choice([None, 0, 3]),
        "prompt_logprobs": rng.choice([None, None, None, 1]),
        "seed": rng.randint(0, 1000),
        "allowed_token_ids": rng.choice([None, None, frozenset(range(3, 97, 2))]),
        "dry": rng.choice([None, None, DryParams(multiplier=1.0)]),
        "top_n_sigma": rng.choice([0.0, 0.0, 1.5]),
        "xtc_probability": rng.choice([0.0, 0.0, 0.5]),
        "xtc_threshold": 0.02,
    }


def requests_of(rng):
    talk = [rng.randint(3, 96) for _ in range(60)]
    prompts = [
        talk[: rng.randint(0, 60)] + [rng.randint(3, 96) for _ in range(rng.randint(1, 5))]
        for _ in range(REQUESTS // 2)
    ]
    phrases = [[rng.randint(3, 96) for _ in range(rng.randint(1, 6))] for _ in prompts]
    prompts += [(phrase * 20)[: rng.randint(5, 60)] for phrase in phrases]
    return [ask(prompt, **params_of(rng)) for prompt in prompts]


def alone(engine, requests):
    return [bits(read(engine.submit([request]))[0]) for request in requests]


@pytest.mark.parametrize("seed", [0, *slow(*range(1, ROUNDS))])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_every_bit_is_that_of_a_sequence_alone(make_engine, native_cache, isas, name, seed):
    rng = random.Random(seed)
    requests = requests_of(rng)
    isa = rng.choice(isas)
    dtype = rng.choice(["float32", "bfloat16"])
    options = {"native": native_cache, "native_isa": isa, "dtype": dtype}
    wanted = alone(make_engine(name, num_slots=1, prefill_chunk=1000, **options), requests)
    engine = make_engine(
        name,
        num_slots=rng.randint(2, 6),
        prefill_chunk=rng.choice([1, 3, 16, 64, 256]),
        kv_cache_bytes=rng.choice([None, 1 << 18]),
        prompt_lookup_tokens=rng.choice([0, 4]),
        **options,
    )
    running = []
    for request in rng.sample(requests, len(requests)):
        running.append((request, engine.submit([request])))
        if rng.random() < 0.3:
            left = engine.submit([rng.choice(requests)])
            next(left.read(quiet_s=30))
            left.abort()
        if rng.random() < 0.3:
            earlier, stream = running.pop(rng.randrange(len(running)))
            assert bits(read(stream)[0]) == wanted[requests.index(earlier)]
    for request, stream in running:
        assert bits(read(stream)[0]) == wanted[requests.index(request)]


@pytest.mark.parametrize("seed", [0, *slow(1, 2)])
@pytest.mark.parametrize(
    ("name", "layers"), [("llama", ["q_proj", "down_proj"]), ("gpt2", ["c_attn"])]
)
def test_every_bit_is_that_of_a_sequence_alone_whatever_adapters_others_have(
    make_engine, native_cache, isas, tmp_path, name, layers, seed
):
    rng = random.Random(seed)
    model = tiny_model(name)
    sources = [
        lora.source(lora.adapter(tmp_path / str(i), model, layers, seed=i, rank=rng.randint(1, 40)))
        for i in range(3)
    ]
    requests = [(rng.randrange(4), request) for request in requests_of(rng)]
    options = {
        "native": native_cache,
        "native_isa": rng.choice(isas),
        "dtype": rng.choice(["float32", "bfloat16"]),
    }

    def engines(**more):
        engine = make_engine(name, **options, **more)
        return [engine, *(engine.adapted(source) for source in sources)]

    single = engines(num_slots=1, prefill_chunk=1000)
    expected = [alone(single[which], [request])[0] for which, request in requests]
    several = engines(
        num_slots=rng.randint(2, 6),
        prefill_chunk=rng.choice([1, 3, 16, 64]),
        kv_cache_bytes=rng.choice([None, 1 << 18]),
        prompt_lookup_tokens=rng.choice([0, 4]),
    )
    running = []
    for place in rng.sample(range(len(requests)), len(requests)):
        which, request = requests[place]
        running.append((place, several[which].submit([request])))
        if rng.random() < 0.3:
            left = several[rng.randrange(4)].submit([request])
            next(left.read(quiet_s=30))
            left.abort()
    for place, stream in running:
        assert bits(read(stream)[0]) == expected[place]


@pytest.mark.parametrize("quantization", ["none", *slow("int8")])
@pytest.mark.parametrize("name", ["gpt2", "mistral-window-8", *slow("llama", "gemma3")])
def test_prompts_and_answers_in_one_pass_have_the_bits_of_a_sequence_alone(
    make_engine, native_cache, name, quantization
):
    options = {"native": native_cache, "quantization": quantization}
    rng = random.Random(5)
    prompts = [[rng.randint(3, 96) for _ in range(rng.randint(1, 60))] for _ in range(10)]
    requests = [
        ask(p, max_tokens=30, temperature=0.0, ignore_eos=True, logprobs=1) for p in prompts
    ]
    wanted = alone(make_engine(name, num_slots=1, **options), requests)
    engine = make_engine(name, num_slots=6, prefill_chunk=32, **options)
    forward, mixed = engine.runner.forward, []

    def watch(batch, keep=1):
        mixed.append(len({seq.is_prefilling for seq in batch.sequences}) > 1)
        return forward(batch, keep)

    engine.runner.forward = watch
    streams = [engine.submit([request]) for request in requests]
    assert [bits(read(stream)[0]) for stream in streams] == wanted
    assert sum(mixed) >= 3


@pytest.mark.parametrize("most", [*slow(1), 10])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral-window-8"])
def test_reading_ahead_gives_the_same_bits(make_engine, native_cache, name, most):
    requests = [request for seed in range(2) for request in requests_of(random.Random(seed))]
    wanted = alone(make_engine(name, native=native_cache), requests)
    metrics = Metrics(["tiny"])
    ahead = make_engine(
        name,
        native=native_cache,
        prompt_lookup_tokens=most,
        listener=metrics.engine("tiny"),
    )
    assert alone(ahead, requests) == wanted
    seen = shown(metrics, ahead)
    assert seen["vllm:spec_decode_num_accepted_tokens_total"] > 0
    tokens = sum(token is not None for outputs in wanted for token, *_ in outputs)
    assert seen["vllm:generation_tokens_total"] == tokens


def test_text_that_repeats_itself_takes_fewer_steps(make_engine, native_cache):
    steps, answers = [], []
    for most in (0, 8):
        engine = make_engine("llama", native=native_cache, prompt_lookup_tokens=most)
        request = ask([5, 9, 33] * 8, max_tokens=80, temperature=0.0, logit_bias={5: 9, 9: 9})
        answers.append(bits(read(engine.submit([request]))[0]))
        steps.append(engine.stats().steps)
    assert answers[0] == answers[1]
    assert steps[1] < steps[0] / 2


def test_the_end_of_an_answer_in_the_middle_of_a_draft_ends_it(make_engine, native_cache):
    """Nothing comes after a stop token, and the context is never left."""
    plain = make_engine("llama", native=native_cache)
    ahead = make_engine("llama", native=native_cache, prompt_lookup_tokens=10)
    prompt = [5, 9, 33] * 8
    (outputs,) = alone(plain, [ask(prompt, max_tokens=60, temperature=0.0, ignore_eos=True)])
    said = [token for token, *_ in outputs]
    for stop in sorted(set(said)):
        request = ask(
            prompt,
            max_tokens=60,
            min_tokens=20,
            temperature=0.0,
            ignore_eos=True,
            stop_token_ids=frozenset({stop}),
        )
        assert alone(ahead, [request]) == alone(plain, [request])
    whole = ask([7, 8] * 40, max_tokens=500, temperature=0.0, ignore_eos=True)
    (outputs,) = alone(ahead, [whole])
    assert [outputs] == alone(plain, [whole])
    assert len(outputs) == plain.max_model_len - 80
    assert outputs[-1][2] is FinishReason.LENGTH


def test_without_the_kernels_nothing_is_read_ahead(make_engine):
    engine = make_engine("llama", native=None, prompt_lookup_tokens=8)
    read(engine.submit([ask([5, 9] * 8, max_tokens=30, temperature=0.0, ignore_eos=True)]))
    assert engine.stats().steps == 2 + 29
