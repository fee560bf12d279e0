"""The engine on the native kernels: beside the engine without them, and beside itself."""

from __future__ import annotations

import copy
import random
import stat
import weakref

import pytest
import torch

from tests.engine.models import BATCHED, prompts_of, tiny_model
from tests.engine.reading import GREEDY, ask, complete, read
from tests.repeats import slow
from transformers_api.engine import loader
from transformers_api.engine.load_options import LoadOptions
from transformers_api.engine.loader import load_engine
from transformers_api.engine.native import convert_model
from transformers_api.engine.native.convert_model import weight_kind
from transformers_api.engine.native.runner import NativeRunner
from transformers_api.errors import InsufficientMemory
from transformers_api.kernels import build

NATIVE = sorted(BATCHED)


def inner(engine):
    runner = engine.runner
    while hasattr(runner, "inner"):
        runner = runner.inner
    return runner


def bits(stream):
    """(token, log probability) of every token of a stream's one sequence."""
    return [(output.token_id, output.score) for output in read(stream)[0]]


def scored(prompt, count):
    return ask(prompt, max_tokens=count, **GREEDY, logprobs=0)


@pytest.mark.parametrize("name", NATIVE)
def test_greedy_tokens_are_those_of_the_engine_without_kernels(make_engine, native_cache, name):
    prompts = prompts_of(6)
    asked = [ask(p, max_tokens=12, **GREEDY) for p in prompts]
    native = make_engine(name, native=native_cache)
    assert isinstance(inner(native), NativeRunner)
    assert complete(native, *asked) == complete(make_engine(name, native=None), *asked)


def prompt_scores(engine, prompt):
    stream = engine.submit([ask(prompt, max_tokens=1, **GREEDY, prompt_logprobs=1)])
    return torch.tensor([score.logprob for score in read(stream)[0][0].prompt_scores[1:]])


@pytest.mark.parametrize(("dtype", "apart"), [*slow(("float32", 1e-4)), ("bfloat16", 0.02)])
@pytest.mark.parametrize("name", NATIVE)
def test_what_is_thought_of_a_text_is_that_of_the_engine_without_kernels(
    make_engine, native_cache, name, dtype, apart
):
    torch.manual_seed(0)
    model = copy.deepcopy(tiny_model(name))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= 3  # else nearly all tokens are as likely as the others
    prompt = prompts_of(9)[-1]
    native = prompt_scores(make_engine(model, native=native_cache, dtype=dtype), prompt)
    plain = prompt_scores(make_engine(model, native=None), prompt)
    assert (native - plain).norm() <= apart * (plain - plain.mean()).norm()


@pytest.mark.parametrize("dtype", [*slow("float32"), "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_scores_are_the_same_bits_whoever_comes_and_goes(make_engine, native_cache, name, dtype):
    prompts = prompts_of(7)
    options = {"native": native_cache, "dtype": dtype}
    alone = make_engine(name, num_slots=1, prefill_chunk=1000, **options)
    wanted = [bits(alone.submit([scored(p, 14)])) for p in prompts]
    for chunk in (1, 3, 8):
        engine = make_engine(name, prefill_chunk=chunk, **options)
        rng = random.Random(chunk)
        streams = []
        for prompt in rng.sample(prompts, len(prompts)) * 2:  # the second half finds its prefix
            streams.append((prompt, engine.submit([scored(prompt, 14)])))
            if rng.random() < 0.4:
                leaving = engine.submit([scored(rng.choice(prompts), 14)])
                next(leaving.read(quiet_s=30))
                leaving.abort()
        for prompt, stream in streams:
            assert bits(stream) == wanted[prompts.index(prompt)], chunk


def test_a_scored_prompt_leaves_no_other_bits_to_those_who_share_it(make_engine, native_cache):
    prompt = prompts_of(7)[-1]
    plain = make_engine("llama", native=native_cache)
    wanted = bits(plain.submit([scored(prompt, 10)]))
    engine = make_engine("llama", native=native_cache)
    complete(engine, ask(prompt, max_tokens=1, **GREEDY, prompt_logprobs=1))
    assert bits(engine.submit([scored(prompt, 10)])) == wanted


def test_a_model_with_a_state_of_its_own_kind_is_served_without_kernels(make_engine, native_cache):
    engine = make_engine("rwkv", native=native_cache)
    assert not isinstance(inner(engine), NativeRunner)


def test_a_refused_model_is_let_go_and_weighed_before_it_is_loaded_again(
    engine_thread, native_cache, tmp_path, monkeypatch
):
    model = tiny_model("rwkv")
    model.save_pretrained(tmp_path)
    honest, loaded, asked = loader.make_model, [], []

    def make_model(*args):
        made = honest(*args)
        loaded.append(weakref.ref(made))
        return made

    def check_room(size):
        asked.append((size, [each() for each in loaded]))
        raise InsufficientMemory("too large")

    monkeypatch.setattr(loader, "make_model", make_model)
    options = LoadOptions(num_slots=2, native=native_cache, check_room=check_room)
    load = engine_thread.call(lambda: load_engine(tmp_path, options, engine_thread))
    with pytest.raises(InsufficientMemory):
        load.result()
    assert asked == [(4 * sum(p.numel() for p in model.parameters()), [None])]


def test_the_cache_stays_within_its_budget_and_nobody_notices(make_engine, native_cache):
    prompts = prompts_of(9)
    asked = [ask(p, max_tokens=60, **GREEDY) for p in prompts]
    wanted = complete(make_engine("llama", native=native_cache), *asked)
    budget = 3 * 256 * inner(make_engine("llama", native=native_cache)).cache.token_bytes
    engine = make_engine("llama", native=native_cache, num_slots=9, kv_cache_bytes=budget)
    stream = engine.submit(asked)
    seen, outputs = [], []
    for output in stream.read(quiet_s=30):
        outputs.append(output)
        seen.append(engine.stats().kv_bytes)
    assert engine.stats().kv_budget_bytes == budget
    assert 0 < max(seen) <= budget
    found = [[o.token_id for o in outputs if o.index == i] for i in range(len(prompts))]
    assert found == wanted


@pytest.fixture
def folder(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def start(folder, engine_thread):
    engines = []

    def make(cache):
        options = LoadOptions(num_slots=2, native=cache)
        load = engine_thread.call(lambda: load_engine(folder, options, engine_thread))
        engines.append(load.result())
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def greedy(engine):
    return complete(engine, *(ask(p, max_tokens=8, **GREEDY) for p in prompts_of(3)))


def test_without_a_compiler_everything_is_served(start, tmp_path, monkeypatch, native_cache):
    wanted = greedy(start(native_cache))
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho 'error: no' >&2\nexit 1\n")
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(build, "find_compiler", lambda: [str(broken)])
    engine = start(tmp_path / "cache")
    assert not isinstance(inner(engine), NativeRunner)
    assert greedy(engine) == wanted


def test_kernels_that_say_something_else_are_not_used(start, monkeypatch, native_cache):
    wanted = greedy(start(None))
    honest = convert_model.pack_model

    def wrong(model, *args):
        model.model.layers[1].post_attention_layernorm.weight.data *= 1.1
        honest(model, *args)

    monkeypatch.setattr(convert_model, "pack_model", wrong)
    engine = start(native_cache)
    assert not isinstance(inner(engine), NativeRunner)
    assert greedy(engine) == wanted


def test_a_recording_that_computes_something_else_is_not_used(start, monkeypatch, native_cache):
    honest = NativeRunner.forward
    monkeypatch.setattr(
        NativeRunner, "forward", lambda self, batch, keep=1: honest(self, batch, keep) * 1.01
    )
    assert not isinstance(inner(start(native_cache)), NativeRunner)


@pytest.mark.parametrize(
    ("dtype", "stored", "size", "kind"),
    [
        ("auto", "float32", 1 << 20, "float32"),
        ("auto", "float32", 1 << 30, "bfloat16"),
        ("auto", "bfloat16", 1 << 20, "bfloat16"),
        ("auto", "float16", 1 << 30, "bfloat16"),
        ("float32", "bfloat16", 1 << 30, "float32"),
        ("bfloat16", "float32", 1 << 20, "bfloat16"),
        ("float16", "float16", 1 << 20, None),
    ],
)
def test_small_float32_checkpoints_stay_exact(dtype, stored, size, kind):
    assert weight_kind(dtype, stored, size) == kind
