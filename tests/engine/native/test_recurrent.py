"""Models with recurrent layers on the kernels: recorded steps, states of their own, whole prompts."""

from __future__ import annotations

import random

import pytest
import torch
import transformers as tf

from benchmarks.architectures import PATHS, examine
from tests.engine.models import generate, prompts_of
from tests.engine.native.test_company import alone, bits
from tests.engine.reading import ask, read
from tests.repeats import slow
from transformers_api.engine.native.state_runner import NativeStateRunner
from transformers_api.engine.native.streaming import weights_read_by

IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
FAMILIES = [
    "falcon_h1",
    "qwen3_next",
    *slow(
        "mamba2",
        "bamba",
        "granitemoehybrid",
        "jamba",
        "kimi_linear",
        "lfm2_moe",
        "nemotron_h",
        "zamba2",
    ),
]


@pytest.fixture(scope="module")
def hybrid():
    """A convolution and attention, as LFM2 has them."""
    torch.manual_seed(0)
    config = tf.Lfm2Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention", "conv"],
        max_position_embeddings=128,
        **IDS,
    )
    return tf.AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def mamba():
    torch.manual_seed(0)
    config = tf.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=8, **IDS)
    return tf.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_runs_on_the_kernels_and_answers_as_generate_does(name, native_cache, tmp_path):
    outcome = examine(name, tmp_path, native_cache)
    assert (outcome.path, outcome.faults) == (PATHS[0], ()), outcome.reason


@pytest.mark.parametrize("model", ["hybrid", "mamba"])
def test_every_bit_is_that_of_a_sequence_alone(make_engine, native_cache, model, request):
    model = request.getfixturevalue(model)
    rng = random.Random(3)
    prompts = [[rng.randint(3, 96) for _ in range(rng.randint(1, 40))] for _ in range(8)]
    requests = [
        ask(p, max_tokens=rng.randint(2, 25), temperature=0.0, ignore_eos=True, logprobs=1)
        for p in prompts
    ]
    engine = make_engine(model, native=native_cache, num_slots=1, prompt_lookup_tokens=8)
    runner = engine.runner
    while hasattr(runner, "inner"):
        runner = runner.inner
    assert isinstance(runner, NativeStateRunner)
    assert runner.layers.is_ready
    wanted = alone(engine, requests)
    for asked, outputs in zip(requests, wanted, strict=True):
        tokens = [token for token, *_ in outputs if token is not None]
        assert tokens == generate(model, list(asked.prompt_ids), len(tokens))
    together = make_engine(model, native=native_cache, num_slots=5, prefill_chunk=4)
    streams = [together.submit([each]) for each in requests]
    assert [bits(read(stream)[0]) for stream in streams] == wanted


def test_a_finished_sequence_leaves_nothing_to_the_next_one_in_its_row(
    make_engine, native_cache, mamba
):
    engine = make_engine(mamba, native=native_cache, num_slots=2)
    for prompt in [*prompts_of(3), [5], [5]]:
        asked = ask(prompt, max_tokens=6, temperature=0.0, ignore_eos=True)
        tokens = [o.token_id for o in read(engine.submit([asked]))[0] if o.token_id is not None]
        assert tokens == generate(mamba, prompt, 6)


def test_states_take_no_more_than_half_of_the_budget(make_engine, native_cache, hybrid):
    engine = make_engine(hybrid, native=native_cache, num_slots=4, kv_cache_bytes=1 << 14)
    cache = engine.scheduler.cache
    asked = [ask(p, max_tokens=4, temperature=0.0, ignore_eos=True) for p in prompts_of(4)]
    answers = [read(engine.submit([each]))[0] for each in asked]
    assert all(len(outputs) >= 4 for outputs in answers)
    assert 1 <= cache.max_rows <= 4
    assert cache.max_rows * cache.state_bytes <= max(1 << 13, cache.state_bytes)


def test_layers_whose_weights_a_module_reads_itself_are_told_from_others():
    from transformers.models.jamba.modeling_jamba import JambaMambaMixer
    from transformers.models.llama.modeling_llama import LlamaAttention

    class Asks(torch.nn.Module):
        def forward(self, x):
            return self.layer(x.to(self.layer.weight.dtype)) + self.other.weight

    assert "dt_proj" in weights_read_by(JambaMambaMixer)
    assert "in_proj" not in weights_read_by(JambaMambaMixer)
    assert weights_read_by(LlamaAttention) == frozenset()
    assert weights_read_by(Asks) == {"other"}
