"""Kinds of models that run on the kernels: each answers as ``generate()`` does, in any company."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from benchmarks.architectures import PATHS, examine
from tests.engine.models import generate
from tests.engine.reading import GREEDY, ask, complete

MODELS = {
    "experts that softmax chooses": "qwen3_moe",
    "experts beside shared ones, latent attention": "deepseek_v3",
    "latent attention without experts": "minicpm3",
    "rope of two lengths": "phi3, longrope",
    "rope that grows": "llama, dynamic",
    "interleaved rope": "cohere",
    "attention of its own, rotated halves": "gptj",
    "attention of its own, a bias linear in the distance": "bloom",
    "heads that share keys in groups": "falcon, groups of heads",
}


@pytest.mark.parametrize("name", MODELS.values(), ids=MODELS.keys())
def test_a_model_runs_on_the_kernels_and_answers_as_generate_does(name, native_cache, tmp_path):
    outcome = examine(name, tmp_path, native_cache)
    assert (outcome.path, outcome.faults) == (PATHS[0], ()), outcome.reason


def test_a_local_window_that_a_model_keeps_to_itself_holds_beyond_the_first_rows(
    make_engine, native_cache
):
    torch.manual_seed(0)
    config = tf.GPTNeoConfig(
        vocab_size=97,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=260,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    engine = make_engine(model, native=native_cache, prefill_chunk=64)
    assert engine.describe().kernels == "native"
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(3, 90, (300,), generator=generator).tolist()
    assert complete(engine, ask(prompt, max_tokens=8, **GREEDY)) == [generate(model, prompt, 8)]
