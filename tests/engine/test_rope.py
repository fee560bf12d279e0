"""Rope factors that depend on the length of a sequence: they are its own, whoever is beside it."""

from __future__ import annotations

import functools

import pytest
import torch
import transformers as tf

from tests.engine.models import IDS, SIZES, generate
from tests.engine.reading import GREEDY, ask, complete, read
from transformers_api.engine.embedding import PooledEmbedder
from transformers_api.engine.pooling import Reduction
from transformers_api.engine.rope import reads_again, switching_lengths

ORIGINAL = 24
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [1.5, 3.0, 5.0, 8.0],
    "original_max_position_embeddings": ORIGINAL,
    "factor": 5.0,
}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
OWN = {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": ORIGINAL}
MODELS = {
    "phi3": lambda: tf.Phi3Config(**SIZES, **IDS, **OWN, sliding_window=None),
    "phi3-window": lambda: tf.Phi3Config(**SIZES, **IDS, **OWN, sliding_window=8),
    "phimoe": lambda: tf.PhimoeConfig(
        **SIZES,
        **IDS,
        num_local_experts=4,
        original_max_position_embeddings=ORIGINAL,
        rope_parameters={**LONG_ROPE, "short_mscale": 1.1, "long_mscale": 1.4},
    ),
    # generate() goes on with the keys of the short factors
    "llama": lambda: tf.LlamaConfig(**SIZES, **IDS, rope_parameters=LONG_ROPE),
    "gemma3-per-layer": lambda: tf.Gemma3TextConfig(
        **SIZES,
        **IDS,
        head_dim=8,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
        rope_parameters={"full_attention": LONG_ROPE, "sliding_attention": PLAIN_ROPE},
    ),
    "llama-dynamic": lambda: tf.LlamaConfig(
        **SIZES, **IDS, rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    ),
}
BATCHED = {"phi3", "phi3-window", "phimoe", "llama-dynamic"}


@functools.cache
def model_of(name):
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(MODELS[name]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.copy_(torch.randn(parameter.shape) * 1.3 / parameter.shape[-1] ** 0.5)
    return model


def prompt_of(length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 90, (length,), generator=generator).tolist()


@pytest.mark.parametrize("name", MODELS)
def test_factors_are_a_sequences_own_as_generate_has_them(make_engine, name):
    engine, model = make_engine(model_of(name)), model_of(name)
    assert engine.describe().mode == ("batching" if name in BATCHED else "sequential")
    # short, long, one that crosses, one that begins at the edge, one right behind it
    lengths = [5, 60, ORIGINAL - 4, ORIGINAL, ORIGINAL + 1]
    prompts = [prompt_of(length, seed) for seed, length in enumerate(lengths)]
    expected = [generate(model, prompt, 12) for prompt in prompts]
    requests = [ask(prompt, max_tokens=12, **GREEDY) for prompt in prompts]
    assert complete(engine, *requests) == expected
    assert [complete(engine, request)[0] for request in requests] == expected


@pytest.mark.parametrize("name", ["phi3", "phimoe"])
def test_a_cached_prefix_is_one_of_the_same_factors(make_engine, name):
    engine, model = make_engine(model_of(name)), model_of(name)
    short = prompt_of(ORIGINAL - 8)
    first = complete(engine, ask(short, max_tokens=3, **GREEDY))[0]
    longer, same = [*short, *first, *prompt_of(20, 1)], [*short, *first, 7]

    def second(prompt):
        outputs = read(engine.submit([ask(prompt, max_tokens=2, **GREEDY)]))[0]
        assert [o.token_id for o in outputs] == generate(model, prompt, 2)
        return outputs[0].cached_tokens

    assert second(same) == len(short) + 2
    assert second(longer) == 0
    assert second([*longer, 8]) == len(longer)
    assert second(short) == 0


def test_a_scored_prompt_is_scored_once_where_its_answer_crosses(make_engine):
    engine = make_engine(model_of("phi3"))
    prompt = prompt_of(ORIGINAL - 2)
    outputs = read(
        engine.submit([ask(prompt, max_tokens=8, prompt_logprobs=0, logprobs=0, **GREEDY)])
    )[0]
    assert [o.token_id for o in outputs] == generate(model_of("phi3"), prompt, 8)
    assert len(outputs[0].prompt_scores) == len(prompt)
    assert all(output.prompt_scores is None for output in outputs[1:])


def test_vectors_do_not_depend_on_longer_texts_nor_on_the_pieces(make_engine):
    engine = make_engine(model_of("phi3"))
    embedder = PooledEmbedder(engine, Reduction("last", False), 16, reads_in_chunks=True)
    rows = [prompt_of(5), prompt_of(60, 1), prompt_of(ORIGINAL, 2)]
    together, alone = embedder.embed(rows), [embedder.embed([row])[0] for row in rows]
    with torch.inference_mode():
        plain = [
            model_of("phi3").model(input_ids=torch.tensor([row])).last_hidden_state[0, -1]
            for row in rows
        ]
    for vectors in (together, alone):
        made = [torch.frombuffer(bytearray(vector), dtype=torch.float32) for vector in vectors]
        for vector, expected in zip(made, plain, strict=True):
            torch.testing.assert_close(vector, expected, atol=1e-4, rtol=1e-4)


def test_a_window_within_the_original_length_needs_none_of_this():
    model = model_of("phi3")
    assert switching_lengths(model, ORIGINAL) == set()
    assert switching_lengths(model, ORIGINAL + 1) == {ORIGINAL}
    assert reads_again(model, ORIGINAL)
    assert not reads_again(model_of("llama"), ORIGINAL)
