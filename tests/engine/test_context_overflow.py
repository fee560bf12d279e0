"""Models that go on beyond their window, as some were published to do."""

from __future__ import annotations

import pytest
import torch

from tests.engine.models import prompts_of, tiny_model
from tests.engine.reading import GREEDY, ask, complete
from transformers_api.errors import ContextLengthExceeded

WINDOW = 24


def slid(prompt: list[int], count: int) -> list[int]:
    """Greedy, each token from a whole forward over the last WINDOW ids at positions from 0."""
    model, ids = tiny_model("gpt2"), list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids[-WINDOW:]])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.fixture
def model():
    import copy

    model = copy.deepcopy(tiny_model("gpt2"))
    model.config.context_overflow = "slide"
    return model


@pytest.mark.parametrize("chunk", [5, 100])
def test_the_window_slides_alone_and_in_company(make_engine, model, chunk):
    engine = make_engine(model, max_context_tokens=WINDOW, prefill_chunk=chunk, num_slots=3)
    prompts = prompts_of(9)  # up to 42 tokens
    lengths = [30, 3, 40, 11, 25, 8, 2, 17, 9]
    requests = [ask(p, max_tokens=n, **GREEDY) for p, n in zip(prompts, lengths, strict=True)]
    expected = [slid(p, n) for p, n in zip(prompts, lengths, strict=True)]
    assert complete(engine, *requests) == expected
    assert complete(engine, requests[2]) == [expected[2]]


def test_a_penalty_looks_at_all_tokens_also_those_that_have_slid_out(make_engine, model):
    engine = make_engine(model, max_context_tokens=WINDOW)
    prompt = prompts_of(9)[-1]
    seen_once = ask(prompt, max_tokens=60, temperature=0.0, presence_penalty=0.0, ignore_eos=True)
    banned = ask(prompt, max_tokens=60, temperature=0.0, repetition_penalty=1e9, ignore_eos=True)
    plain, penalised = complete(engine, seen_once)[0], complete(engine, banned)[0]
    assert plain == slid(prompt, 60)
    fresh = [token for token in penalised if token not in prompt]
    assert len(fresh[:20]) == len(set(fresh[:20]))


def test_a_prompt_that_slid_cannot_be_scored(make_engine, model):
    engine = make_engine(model, max_context_tokens=WINDOW)
    with pytest.raises(ContextLengthExceeded):
        engine.submit([ask([3] * 40, max_tokens=1, prompt_logprobs=0)])


def test_a_long_prompt_is_cropped_once_and_the_answer_ends_with_the_context(make_engine, model):
    model.config.context_overflow = "crop"
    model.config.prompt_window = 12
    engine = make_engine(model, max_context_tokens=WINDOW)
    prompt = prompts_of(9)[-1]
    plain = tiny_model("gpt2")
    with torch.inference_mode():
        ids = prompt[-12:]
        while len(ids) < WINDOW:
            ids.append(int(plain(torch.tensor([ids])).logits[0, -1].argmax()))
    assert complete(engine, ask(prompt, max_tokens=100, **GREEDY)) == [ids[12:]]
