"""The engine against ``generate``: the strongest statement about it."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from tests.engine.models import (
    BATCHED,
    ON_KERNELS,
    SEQUENTIAL,
    TOGETHER,
    generate,
    generated,
    prompts_of,
)
from tests.engine.reading import GREEDY, ask, complete
from tests.repeats import slow


@pytest.fixture(scope="module", params=["native", "torch"])
def native_default(request):
    """Every engine here, on the kernels and without them."""
    return request.getfixturevalue("native_cache") if request.param == "native" else None


LENGTHS = [9, 3, 14, 5, 7, 2, 11]  # so that sequences finish in another order than they came


@pytest.mark.parametrize("name", [*BATCHED, *TOGETHER, *SEQUENTIAL])
def test_many_at_once_give_what_generate_gives_for_each(make_engine, native_default, name):
    engine = make_engine(name)
    prompts = prompts_of(len(LENGTHS))
    requests = [ask(p, max_tokens=n, **GREEDY) for p, n in zip(prompts, LENGTHS, strict=True)]
    expected = [generated(name, p, n) for p, n in zip(prompts, LENGTHS, strict=True)]
    assert complete(engine, *requests) == expected
    batches = name not in SEQUENTIAL or (native_default is not None and name in ON_KERNELS)
    assert engine.describe().mode == ("batching" if batches else "sequential")


@pytest.mark.parametrize("name", [*BATCHED, *TOGETHER])
@pytest.mark.parametrize("chunk", [1, *slow(5, 1000)], ids=lambda chunk: f"chunk-{chunk}")
def test_one_alone_gives_what_generate_gives_whatever_the_chunk(make_engine, name, chunk):
    engine = make_engine(name, prefill_chunk=chunk)
    prompt = prompts_of(7)[-1]
    assert complete(engine, ask(prompt, max_tokens=12, **GREEDY)) == [generated(name, prompt, 12)]


@pytest.mark.parametrize("name", ["llama", "mistral-window-8", *slow("gpt2", "gemma3")])
def test_generation_goes_on_to_the_end_of_the_context(make_engine, name):
    engine = make_engine(name)
    prompt = prompts_of(3)[-1]
    count = 128 - len(prompt)
    assert complete(engine, ask(prompt, max_tokens=1000, **GREEDY)) == [
        generated(name, prompt, count)
    ]


@pytest.mark.parametrize("name", ["gemma3", "llama"])
def test_a_model_with_eager_attention_gives_what_generate_gives(make_engine, name):
    torch.manual_seed(0)
    config = BATCHED[name]()
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    engine = make_engine(model)
    prompts = prompts_of(5)
    assert engine.describe().mode == "batching"
    assert complete(engine, *(ask(p, max_tokens=9, **GREEDY) for p in prompts)) == [
        generate(model, p, 9) for p in prompts
    ]
