"""Our models against what the original systems computed: recorded logits, ids, attention."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from tests.engine.reading import GREEDY, ask, complete
from tests.families.originals import NIELS, ORIGINALS, PUBLIC, SLIDING, TINYGPT
from transformers_api.engine.base import SamplingParams, SequenceRequest, TokenStream
from transformers_api.engine.sampling.logits_processors import processors_for
from transformers_api.engine.sampling.sampler import candidates
from transformers_api.engine.sequence import Sequence

CLOSE = {"rtol": 0, "atol": 1e-5}
COUNT = 20  # tokens in each recording


def row(name: str, what: str) -> list[int]:
    return ORIGINALS[name].recorded[what][0].tolist()


def decoded_by_argmax(model, prompt: list[int], count: int, window: int) -> list[int]:
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids[-window:]])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ORIGINALS)
def test_logits_are_the_originals(load, name, attention):
    model = load(name, attention)
    recorded = ORIGINALS[name].recorded
    assert type(model).__name__ == ORIGINALS[name].model_class
    with torch.inference_mode():
        logits = model(recorded["input_ids"]).logits
    torch.testing.assert_close(logits, recorded["logits"], **CLOSE)


@pytest.mark.parametrize("name", NIELS)
def test_attention_is_the_originals(load, name):
    recorded = ORIGINALS[name].recorded
    with torch.inference_mode():
        output = load(name, "eager")(recorded["input_ids"], output_attentions=True)
    torch.testing.assert_close(
        torch.stack(output.attentions)[:, 0], recorded["attentions"], **CLOSE
    )


@pytest.mark.parametrize("name", ORIGINALS)
def test_reading_with_the_cache_gives_what_one_pass_gives(load, name):
    model, ids = load(name), ORIGINALS[name].recorded["input_ids"][:1]
    with torch.inference_mode():
        whole = model(ids).logits
        first = model(ids[:, :7], use_cache=True)
        second = model(ids[:, 7:11], past_key_values=first.past_key_values)
        third = model(ids[:, 11:12], past_key_values=second.past_key_values)
    parts = torch.cat([first.logits, second.logits, third.logits], dim=1)
    torch.testing.assert_close(parts, whole[:, :12], **CLOSE)


@pytest.mark.parametrize("name", PUBLIC)
def test_padding_on_the_left_changes_nothing(load, name):
    model, ids = load(name), ORIGINALS[name].recorded["input_ids"][:1, :9]
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], dim=1)
    mask = torch.tensor([[0] * 4 + [1] * 9])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.inference_mode():
        output = model(padded, attention_mask=mask, position_ids=positions, logits_to_keep=9)
        torch.testing.assert_close(output.logits, model(ids).logits, **CLOSE)


@pytest.mark.parametrize("name", PUBLIC)
def test_greedy_ids_are_the_originals_by_generate_and_by_argmax(load, name):
    model, prompt = load(name), row(name, "prompt_ids")
    with torch.inference_mode():
        generated = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=COUNT,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
    assert generated == row(name, "greedy_ids")
    assert decoded_by_argmax(model, prompt, COUNT, window=1 << 30) == generated


@pytest.mark.parametrize("name", PUBLIC)
def test_engine_gives_the_original_greedy_ids_alone_and_in_company(load, make_engine, name):
    engine = make_engine(load(name))
    assert engine.describe().mode == "batching"
    prompt, expected = row(name, "prompt_ids"), row(name, "greedy_ids")
    request = ask(prompt, max_tokens=COUNT, **GREEDY)
    assert complete(engine, request) == [expected]
    others = [ask(prompt[:size], max_tokens=9 + size, **GREEDY) for size in (3, 7, 5)]
    alone = [complete(engine, each)[0] for each in others]
    assert complete(engine, *others[:2], request, others[2]) == [*alone[:2], expected, alone[2]]


@pytest.mark.parametrize("name", SLIDING)
def test_beyond_the_window_a_model_sees_its_last_tokens(load, name):
    prompt, expected = row(name, "long_prompt_ids"), row(name, "long_greedy_ids")
    window = load(name).config.max_position_embeddings
    assert len(prompt) > window
    assert decoded_by_argmax(load(name), prompt, COUNT, window) == expected


@pytest.mark.parametrize("name", [*SLIDING, "tinygpt2"])
def test_engine_gives_the_original_ids_beyond_the_window(load, make_engine, name):
    engine = make_engine(load(name))
    prompt, expected = row(name, "long_prompt_ids"), row(name, "long_greedy_ids")
    request = ask(prompt, max_tokens=COUNT, **GREEDY)
    assert complete(engine, request) == [expected]
    short = ask(row(name, "prompt_ids"), max_tokens=COUNT, **GREEDY)
    assert complete(engine, short, request) == [row(name, "greedy_ids"), expected]


@pytest.mark.parametrize("name", TINYGPT)
def test_engine_penalises_repetition_as_the_original(load, make_engine, name):
    engine = make_engine(load(name))
    request = ask(row(name, "prompt_ids"), max_tokens=COUNT, word_repetition_penalty=1.5, **GREEDY)
    assert complete(engine, request) == [row(name, "penalty_greedy_ids")]
    plain = ask(row(name, "prompt_ids"), max_tokens=COUNT, **GREEDY)
    assert complete(engine, plain, request)[1] == row(name, "penalty_greedy_ids")


@pytest.mark.parametrize("setting", range(4))
@pytest.mark.parametrize("name", TINYGPT)
def test_probabilities_to_sample_from_are_the_originals(load, name, setting):
    recorded = ORIGINALS[name].recorded
    reference = json.loads((ORIGINALS[name].folder / "reference.json").read_text())
    params = SamplingParams(**reference["sampler_settings"][setting])
    history = row(name, "sampler_history_ids")
    with torch.inference_mode():
        logits = load(name)(torch.tensor([history])).logits[0, -1:]
    logits = logits.clone()  # processors work in place
    seq = Sequence(
        SequenceRequest(history, params),
        TokenStream(1, lambda _: None),
        0,
        eos_token_ids=frozenset(),
        max_model_len=1 << 30,
    )
    for processor in processors_for(params):
        processor(seq, logits[0])
    kept, ids = candidates((logits / params.temperature).softmax(-1), [params], logits.shape[-1])
    probs = torch.zeros(logits.shape[-1], dtype=kept.dtype).scatter(0, ids[0], kept[0])
    expected = recorded["sampler_probs"][setting].double()
    torch.testing.assert_close(probs / probs.sum(), expected, **CLOSE)


def test_seeded_samples_of_niels_are_the_originals(load, make_engine):
    engine = make_engine(load("niels-v1"))
    expected = row("niels-v1", "sampled_ids_t0.9_k50_seed42")
    sampled = {"temperature": 0.9, "top_k": 50, "seed": 42, "ignore_eos": True}
    request = ask(row("niels-v1", "prompt_ids"), max_tokens=COUNT, **sampled)
    assert complete(engine, request) == [expected]
    greedy = ask(row("niels-v1", "prompt_ids"), max_tokens=COUNT, **GREEDY)
    assert complete(engine, greedy, request)[1] == expected


def test_niels_v2_does_not_repeat_the_last_prompt_token_as_the_original_cache_did(
    load, make_engine
):
    engine = make_engine(load("niels-v2"))
    request = ask(row("niels-v2", "prompt_ids"), max_tokens=COUNT, **GREEDY)
    assert complete(engine, request) != [row("niels-v2", "upstream_cached_ids_with_its_bug")]


def test_half_of_the_layers_of_a_banded_gpt3dev_see_a_band(make_engine):
    from transformers_api.families import GPT3DevConfig, GPT3DevForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64}
    counts = {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
    config = GPT3DevConfig(**sizes, **counts, sliding_window=6)
    config._attn_implementation = "eager"
    model = GPT3DevForCausalLM(config).eval()
    ids = torch.randint(0, 97, (1, 20))
    with torch.inference_mode():
        attentions = model(ids, output_attentions=True).attentions
    distance = torch.arange(20)[:, None] - torch.arange(20)
    assert (attentions[0][0][:, distance >= 0] > 0).all()
    banded = (distance >= 0) & (distance <= 5)
    assert (attentions[1][0][:, banded] > 0).all()
    assert (attentions[1][0][:, ~banded] == 0).all()

    engine = make_engine(copy.deepcopy(model))
    assert engine.describe().mode == "batching"
    prompt = ids[0].tolist()
    expected = decoded_by_argmax(model, prompt, 9, window=64)
    request = ask(prompt, max_tokens=9, **GREEDY)
    assert complete(engine, request, request) == [expected] * 2
