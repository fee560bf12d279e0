"""KV_CACHE_DTYPE=int8: half the bytes, nearly the numbers, and the same bits for everybody."""

from __future__ import annotations

import copy
import random

import pytest
import torch
import transformers as tf

from tests import lora
from tests.engine.models import IDS, SIZES, prompts_of, tiny_model
from tests.engine.native.test_engine import bits, inner, prompt_scores, scored
from tests.engine.reading import GREEDY, ask, complete, read
from transformers_api.engine.load_options import LoadOptions
from transformers_api.engine.loader import load_engine
from transformers_api.engine.native.backend import NativeBackend
from transformers_api.engine.native.runner import NativeRunner
from transformers_api.engine.native.state_runner import NativeStateRunner
from transformers_api.engine.standby import StandbyModels
from transformers_api.inspection.attention import Attended
from transformers_api.kernels.modules.attention import code_bytes, numbers_of, write_cache


@pytest.fixture
def make(make_engine, native_cache):
    """make(model, **options): an engine whose keys and values are int8."""

    def make(model, **options):
        return make_engine(model, native=native_cache, kv_cache_dtype="int8", **options)

    return make


def wide_model(name):
    """A tiny model that is sure of itself, so that what changes its keys is seen."""
    model = copy.deepcopy(tiny_model(name))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= 3
    return model


# Heads of 8 and 16 numbers, windows, sinks, softcaps, a bias by distance of the model's own.
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt-oss-sinks", "bloom-alibi"])
def test_what_is_thought_of_a_text_is_nearly_that_of_the_models_own_numbers(
    make, make_engine, name
):
    model, prompt = wide_model(name), prompts_of(9)[-1]
    engine = make(model)
    assert isinstance(inner(engine), NativeRunner)
    assert inner(engine).cache.has_codes
    coded = prompt_scores(engine, prompt)
    plain = prompt_scores(make_engine(model, native=None), prompt)
    apart = (coded - plain).norm() / (plain - plain.mean()).norm()
    assert 0 < apart <= 0.04


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_scores_are_the_same_bits_whoever_comes_and_goes(make, name):
    prompts = prompts_of(7)
    alone = make(name, num_slots=1, prefill_chunk=1000)
    wanted = [bits(alone.submit([scored(p, 14)])) for p in prompts]
    for chunk in (1, 3):
        engine = make(name, prefill_chunk=chunk)
        order = random.Random(chunk).sample(prompts, len(prompts)) * 2  # prefixes are there then
        streams = [(prompt, engine.submit([scored(prompt, 14)])) for prompt in order]
        for prompt, stream in streams:
            assert bits(stream) == wanted[prompts.index(prompt)], chunk


def test_a_token_takes_the_bytes_of_its_codes_and_scales(make, make_engine, native_cache):
    config = tf.LlamaConfig(**{**SIZES, "head_dim": 64}, **IDS)
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    own = make_engine(model, native=native_cache, dtype="bfloat16")
    engine = make(model, dtype="bfloat16", kv_cache_bytes=1 << 20)
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * 64
    assert own.stats().kv_token_bytes == 2 * numbers
    assert engine.stats().kv_token_bytes == numbers * 34 // 32
    complete(engine, ask(prompts_of(3)[-1], max_tokens=3, **GREEDY))
    stats = engine.stats()
    assert 0 < stats.kv_bytes <= stats.kv_budget_bytes <= 1 << 20
    assert stats.kv_bytes % stats.kv_token_bytes == 0


def test_a_recurrent_model_has_codes_beside_states_of_its_own(make):
    torch.manual_seed(0)
    config = tf.Lfm2Config(
        **{**SIZES, "num_hidden_layers": 2}, **IDS, layer_types=["conv", "full_attention"]
    )
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    engine = make(model, num_slots=1)
    assert isinstance(inner(engine), NativeStateRunner)
    assert inner(engine).cache.has_codes
    prompts = prompts_of(6)
    wanted = [bits(engine.submit([scored(p, 9)])) for p in prompts]
    together = make(model)
    streams = [together.submit([scored(p, 9)]) for p in prompts]
    assert [bits(stream) for stream in streams] == wanted
    assert {rows.dtype for rows in inner(together).cache.state_rows} == {torch.float32}


def test_attention_that_torch_recomputes_is_that_of_the_codes(native_cache, make):
    """As a trace of a prompt does it that modules have read."""
    cache = inner(make("llama")).cache
    backend = NativeBackend(cache.library, LoadOptions(native=native_cache))
    states = torch.randn(2, 1, 2, 6, 20)
    rows = [torch.zeros(1, 2, 8, code_bytes(20), dtype=torch.int8) for _ in states]
    for target, each in zip(rows, states, strict=True):
        write_cache(cache.library, each, target, None)
    coded = [each[:, :, :6, :20] for each in rows]
    query = torch.randn(1, 4, 6, 20)

    def attended(keys, values, backend):
        weights = query @ keys_of_heads(keys) * 20**-0.5
        mask = torch.ones(6, 6, dtype=torch.bool).tril()
        probs = weights.masked_fill(~mask, -torch.inf).softmax(-1)
        output = (probs @ numbers_of(values).float().repeat_interleave(2, 1)).transpose(1, 2)
        call = (torch.nn.Module(), query, keys, values, mask[None, None], output, {})
        return Attended(*call, aligns_ends=False, backend=backend)

    def keys_of_heads(keys):
        return numbers_of(keys).float().repeat_interleave(2, 1).transpose(-1, -2)

    seen = attended(*coded, backend)
    plain = attended(*(numbers_of(each) for each in coded), None)
    assert torch.equal(seen.rows(0, slice(None))[0], plain.rows(0, slice(None))[0])
    assert seen.error() < 1e-5


@pytest.fixture
def latent():
    torch.manual_seed(0)
    config = tf.MiniCPM3Config(
        **{**SIZES, "num_key_value_heads": 4}, **IDS, q_lora_rank=16, kv_lora_rank=8,
        qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
    )  # fmt: skip
    return tf.AutoModelForCausalLM.from_config(config).eval()


def test_latent_attention_and_models_without_kernels_keep_their_own_numbers(make, latent, caplog):
    engine = make(latent)
    assert {rows.dtype for rows in inner(engine).cache.tensors} == {torch.float32}
    engine = make("rwkv")
    assert not isinstance(inner(engine), NativeRunner)
    warnings = [r.getMessage() for r in caplog.records if "KV_CACHE_DTYPE=int8" in r.getMessage()]
    assert len(warnings) == 2
    assert "MiniCPM3ForCausalLM" in warnings[0]
    assert "Rwkv" in warnings[1]
    caplog.clear()
    make("llama")
    assert "KV_CACHE_DTYPE" not in caplog.text


def test_a_model_that_slept_and_one_with_plans_of_the_disk_give_the_same_bits(
    tmp_path, engine_thread, native_cache
):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    requests = [scored(prompt, 8) for prompt in prompts_of(3)]
    standby = StandbyModels(1)

    def run(kv_cache_dtype, keeps):
        options = LoadOptions(
            num_slots=2, native=native_cache, kv_cache_dtype=kv_cache_dtype, stamp="same",
            plans=tmp_path / "plans", standby=keeps,
        )  # fmt: skip
        load = engine_thread.call(lambda: load_engine(tmp_path / "model", options, engine_thread))
        engine = load.result()
        has_codes = inner(engine).cache.has_codes
        outputs = read(engine.submit(requests))
        engine.close()
        return has_codes, [[(o.token_id, o.score) for o in outputs[i]] for i in sorted(outputs)]

    first = run("int8", standby)
    own = run("auto", StandbyModels(1))
    assert (first[0], own[0]) == (True, False)
    assert first[1] != own[1]
    assert run("int8", standby) == first  # woken up
    assert run("int8", StandbyModels(1)) == first  # by the plans


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_adapters_keep_codes_of_their_own_in_any_company(make, tmp_path, name):
    """Prefixes are shared by those who read them alike, windows slide, rows move."""
    model = wide_model(name)
    folders = [
        lora.adapter(tmp_path / f"own-{n}", model, ["k_proj", "v_proj", "up_proj"], seed=n)
        for n in range(2)
    ]
    prompts = prompts_of(5)
    alone = make(model, num_slots=1, prefill_chunk=1000)
    wanted = {
        (who, n): bits(each.submit([scored(prompt, 12)]))
        for who, each in enumerate([alone, *(alone.adapted(lora.source(f)) for f in folders)])
        for n, prompt in enumerate(prompts)
    }
    assert len({str(wanted[who, 0]) for who in range(3)}) == 3
    engine = make(model, prefill_chunk=3)
    each = [engine, *(engine.adapted(lora.source(folder)) for folder in folders)]
    order = random.Random(1).sample(list(wanted), len(wanted)) * 2
    streams = [(key, each[key[0]].submit([scored(prompts[key[1]], 12)])) for key in order]
    for key, stream in streams:
        assert bits(stream) == wanted[key], key
