"""Quantised models in the engine: the same promises as ever, and what is refused."""

from __future__ import annotations

import random

import pytest
import torch

from tests.engine.models import prompts_of, tiny_model
from tests.engine.native.test_engine import bits, inner, scored
from tests.engine.reading import GREEDY, ask, complete
from tests.four_bits import of_four_bits
from transformers_api.engine.load_options import LoadOptions
from transformers_api.engine.loader import load_engine
from transformers_api.engine.native import convert_model
from transformers_api.engine.native.convert_model import kind_of
from transformers_api.engine.native.runner import Kind
from transformers_api.errors import ModelLoadFailed
from transformers_api.kernels import build
from transformers_api.kernels.modules.linear import NativeLinear

KINDS = ["int8", "int4"]


def widths(model):
    """The names of layers by the bits that their weights take."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, NativeLinear):
            weight = module.joined.weight
            padded = -(-weight.out_features // 32) * -(-weight.in_features // 32) * 1024
            found.setdefault(8 * weight.nbytes / padded, []).append(name)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_scores_are_the_same_bits_whoever_comes_and_goes(
    make_engine, native_cache, isas, name, kind
):
    model, prompts = of_four_bits(tiny_model(name)), prompts_of(6)
    isa = isas[-1 if name == "llama" else 0]
    options = {"native": native_cache, "native_isa": isa, "quantization": kind}
    alone = make_engine(model, num_slots=1, prefill_chunk=1000, **options)
    wanted = [bits(alone.submit([scored(p, 12)])) for p in prompts]
    for chunk in (1, 3, 8):
        engine = make_engine(model, prefill_chunk=chunk, **options)
        rng = random.Random(chunk)
        streams = []
        for prompt in rng.sample(prompts, len(prompts)) * 2:  # the second half finds its prefix
            streams.append((prompt, engine.submit([scored(prompt, 12)])))
            if rng.random() < 0.4:
                leaving = engine.submit([scored(rng.choice(prompts), 12)])
                next(leaving.read(quiet_s=30))
                leaving.abort()
        for prompt, stream in streams:
            assert bits(stream) == wanted[prompts.index(prompt)], chunk


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_said_stays_near_the_model_itself(make_engine, native_cache, kind):
    model, prompt = of_four_bits(tiny_model("llama")), prompts_of(5)[4]
    engine = make_engine(model, native=native_cache, quantization=kind)
    [(_, given)] = bits(engine.submit([scored(prompt, 1)]))
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    assert abs(given.logprob - wanted.max().item()) < 0.05


def test_int4_leaves_the_output_layer_and_a_tied_embedding_in_eight_bits(make_engine, native_cache):
    for name in ("llama", "gpt2"):
        model = of_four_bits(tiny_model(name))
        engine = make_engine(model, native=native_cache, quantization="int4")
        found = widths(inner(engine).model)
        assert set(found) == {5.0, 8.5}
        assert found[8.5] == ["lm_head"]
    model = inner(engine).model  # of gpt2, whose embedding is tied
    assert model.transformer.wte.packed is model.lm_head.joined.weight


@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_keeps_its_dtype(make_engine, native_cache, kind):
    model = of_four_bits(tiny_model("llama"))
    for dtype, kept in (("auto", torch.bfloat16), ("float32", torch.float32)):
        engine = make_engine(model, native=native_cache, quantization=kind, dtype=dtype)
        complete(engine, ask(prompts_of(1)[0], max_tokens=2, **GREEDY))
        assert inner(engine).cache.tensors[0].dtype == kept


def test_an_exact_small_checkpoint_is_kept_so_only_if_it_is_not_quantised():
    model = tiny_model("llama")
    assert kind_of(model, "auto") == Kind("float32", "none")
    assert kind_of(model, "auto", "int8") == Kind("bfloat16", "int8")
    assert kind_of(model, "auto", "int8").weights == "int8"


@pytest.fixture
def load(tmp_path, engine_thread):
    engines = []

    def make(model="llama", **options):
        tiny = tiny_model(model) if isinstance(model, str) else model
        tiny.save_pretrained(tmp_path / "model")
        wanted = LoadOptions(num_slots=2, **options)
        engines.append(
            engine_thread.call(lambda: load_engine(tmp_path / "model", wanted, engine_thread))
        )
        return engines[-1].result()

    yield make
    for engine in engines:
        if engine.exception() is None:
            engine.result().close()


def refusal(load, *given, **options):
    with pytest.raises(ModelLoadFailed, match=r"cannot be loaded with quantization") as caught:
        load(*given, **options)
    assert caught.value.param == "quantization"
    return str(caught.value)


def test_a_small_model_that_four_bits_would_change_is_refused(load, native_cache):
    told = refusal(load, native=native_cache, quantization="int4")
    assert "it would change the weights by" in told
    assert "below 3 billion of them 2 % is the most" in told
    assert load(native=native_cache, quantization="int8").describe().mode == "batching"


def test_a_large_model_may_be_changed(load, native_cache, monkeypatch):
    monkeypatch.setattr(convert_model, "INT4_ENOUGH", 1000)
    assert load(native=native_cache, quantization="int4").describe().mode == "batching"


def test_a_small_model_that_comes_from_four_bits_is_served_with_them(load, native_cache):
    model = of_four_bits(tiny_model("llama"))
    engine = load(model, native=native_cache, quantization="int4")
    assert set(widths(engine.model)) == {5.0, 8.5}


@pytest.mark.parametrize(
    ("model", "options", "reason"),
    [
        ("rwkv", {}, "it cannot share a batch"),
        ("llama", {"dtype": "float16"}, "no kernels for float16"),
        ("llama", {"native": None}, "it needs NATIVE_KERNELS=true"),
    ],
)
def test_a_model_that_cannot_have_it_is_refused_and_not_served_in_another_way(
    load, native_cache, model, options, reason
):
    given = {"native": native_cache, "quantization": "int8"} | options
    assert reason in refusal(load, model, **given)


def test_without_kernels_the_reason_is_told(load, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "COMPILERS", ("no-such-compiler",))
    monkeypatch.setattr(build, "find_spec", lambda name: None)
    told = refusal(load, native=tmp_path / "empty", quantization="int8")
    assert "no native kernels: there is no compiler (no-such-compiler, ziglang)" in told
