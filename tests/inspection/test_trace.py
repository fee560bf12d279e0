"""Traces of the real engine: what they say, and that they change nothing."""

from __future__ import annotations

import copy

import numpy
import pytest
import torch

from tests.engine.models import prompts_of
from tests.engine.reading import read
from tests.inspection.models import tiny
from tests.repeats import slow
from transformers_api.engine.base import SamplingParams, SequenceRequest
from transformers_api.inspection.base import AttentionMode, TracePlan

BATCHING = [
    "llama",
    "qwen3",
    "gpt2",
    "mistral-window-8",
    "gemma2",
    "gemma3",
    "mixtral",
    "gpt-neox",
    "opt",
    "gpt-oss-sinks",
    "deepseek-mla",
    "cohere2",
    "granite",
    "phi",
    "doge",
    "qwen3-moe",
]
ONE_AT_A_TIME = [
    "recurrent-gemma",
    "conv-hybrid",
    "gpt-neo-local",
    "bloom-alibi",
    "gpt-1-without-cache",
    "llama4-chunked",
    "qwen3-next",
    "gptj",
    "mpt-alibi",
]
SHOWN = [*BATCHING, *ONE_AT_A_TIME]
# A random model's softmax is peaky: granite's is off by 1.1e-5 in float32.
CLOSE = 2e-5


def everything(anatomy):
    """A plan that notes all that the model shows."""
    return TracePlan(
        layers=tuple(anatomy.layers_with_attention) if anatomy.traces_attention else (),
        topk=3,
        sampled_topk=3,
        lens_layers=(-1, 0, anatomy.layers - 1) if anatomy.lens else (),
        lens_topk=2,
        resid_norms=True,
        router=True,
    )


def generate(engine, prompts, plan=None, **params):
    """The outputs of all prompts, submitted together, by sequence."""
    given = {"max_tokens": 10, "temperature": 0.8, "seed": 3, "logprobs": 2, "ignore_eos": True}
    requests = [SequenceRequest(prompt, SamplingParams(**given | params)) for prompt in prompts]
    outputs = read(engine.submit(requests, observe={} if plan is None else {"trace": plan}))
    assert all(output.error is None for each in outputs.values() for output in each)
    return [outputs[index] for index in sorted(outputs)]


def scored(outputs):
    return [[(output.token_id, output.score) for output in each] for each in outputs]


def written_out(name, ids):
    """The attention of every layer that has one, by the model's own eager way: (H, n, n)."""
    model = copy.deepcopy(tiny(name))
    model.config.get_text_config(decoder=True)._attn_implementation = "eager"
    with torch.inference_mode():
        output = model(input_ids=torch.tensor([ids]), use_cache=False, output_attentions=True)
    return [each[0].float().numpy() for each in output.attentions if each is not None]


@pytest.mark.parametrize("name", [*SHOWN[::2], *slow(*SHOWN[1::2])])
def test_rows_are_those_of_eager_attention(watch, name):
    watched = watch(name)
    anatomy = watched.examined.anatomy
    assert anatomy.verified
    assert anatomy.traces_attention
    prompts = prompts_of(4)
    for prompt, outputs in zip(
        prompts, generate(watched.engine, prompts, everything(anatomy)), strict=True
    ):
        ids = [*prompt, *(output.token_id for output in outputs)]
        expected = dict(zip(anatomy.layers_with_attention, written_out(name, ids), strict=True))
        for output in outputs:
            check_rows(output.extras["trace"], expected, anatomy)


def check_rows(trace, expected, anatomy):
    assert [row.layer for row in trace.attention] == anatomy.layers_with_attention
    for row in trace.attention:
        matrix = expected[row.layer]
        wanted = matrix[:, trace.position - 1, : trace.position]
        assert row.key_start + row.width == trace.position == trace.context
        assert row.weights.dtype == numpy.float32
        numpy.testing.assert_allclose(row.weights, wanted[:, row.key_start :], atol=CLOSE)
        assert wanted[:, : row.key_start].max(initial=0) < 1e-12
        sums = row.weights.sum(-1) + (0 if row.sink is None else row.sink)
        numpy.testing.assert_allclose(sums, 1, atol=CLOSE)
        window = anatomy.attention[row.layer].window
        assert row.width == min(trace.position, window or trace.position)


@pytest.mark.parametrize("name", [*slow(*SHOWN[::2]), *SHOWN[1::2]])
def test_tokens_and_scores_are_the_same_bits_with_and_without_a_trace(watch, name):
    prompts, plain, watched = prompts_of(6)[1:], watch(tiny(name)), watch(tiny(name))
    plan = everything(watched.examined.anatomy)
    for asked in (prompts[:1], prompts[1:]):  # alone, and in company
        traced = generate(watched.engine, asked, plan)
        assert scored(generate(plain.engine, asked)) == scored(traced)
        assert all("trace" in output.extras for each in traced for output in each)


@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral"])
def test_a_neighbour_of_a_traced_sequence_gets_its_own_tokens(watch, name):
    prompts = prompts_of(3)
    alone = generate(watch(tiny(name)).engine, prompts[:1], temperature=0)
    watched = watch(tiny(name))
    plan = everything(watched.examined.anatomy)
    neighbour = watched.engine.submit(
        [SequenceRequest(prompts[0], SamplingParams(max_tokens=10, temperature=0, ignore_eos=True))]
    )
    generate(watched.engine, prompts[1:], plan, temperature=0)
    outputs = read(neighbour)[0]
    assert [o.token_id for o in outputs] == [o.token_id for o in alone[0]]
    assert not any(output.extras for output in outputs)


def test_the_distributions_are_the_model_s_and_the_one_that_was_drawn_from(watch):
    watched = watch("llama")
    prompt = prompts_of(2)[1]
    plan = TracePlan(topk=5, sampled_topk=5)
    (outputs,) = generate(
        watched.engine, [prompt], plan, temperature=0.5, top_k=4, logprobs=5, max_tokens=6
    )
    model = tiny("llama")
    ids = list(prompt)
    for step, output in enumerate(outputs):
        trace = output.extras["trace"]
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1].double()
        probs = logits.softmax(-1)
        kept = (logits / 0.5).softmax(-1)
        kept[kept < kept.topk(4).values[-1]] = 0
        kept /= kept.sum()
        assert (trace.step, trace.position, trace.token_id) == (step, len(ids), output.token_id)
        assert trace.logprob == pytest.approx(output.score.logprob, abs=1e-6)
        assert trace.entropy == pytest.approx(-(probs * probs.log()).sum().item(), abs=1e-4)
        assert trace.rank == (probs > probs[output.token_id]).sum().item()
        assert trace.top.token_ids == tuple(i for i, _ in output.score.top)
        assert trace.sampled_prob == pytest.approx(kept[output.token_id].item(), abs=1e-5)
        entropy = torch.special.entr(kept).sum().item()
        assert trace.sampled_entropy == pytest.approx(entropy, abs=1e-4)
        assert trace.sampled_top.probs[4] == 0
        ids.append(output.token_id)


def test_greedy_draws_from_one_token(watch):
    watched = watch("llama")
    plan = TracePlan(sampled_topk=10)
    (outputs,) = generate(watched.engine, prompts_of(1), plan, temperature=0)
    for output in outputs:
        trace = output.extras["trace"]
        assert trace.sampled_entropy == 0
        assert trace.sampled_prob == 1
        assert trace.rank == 0
        assert trace.sampled_top.token_ids[0] == output.token_id
        assert trace.sampled_top.probs == (1.0, *[0.0] * 9)
        assert trace.top.token_ids == ()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "granite", "cohere2", "mamba"])
def test_the_lens_on_the_last_layer_says_what_the_model_says(watch, name):
    watched = watch(name)
    anatomy = watched.examined.anatomy
    assert anatomy.lens
    assert anatomy.lens_is_exact
    plan = TracePlan(topk=3, lens_layers=(anatomy.layers - 1, 0), lens_topk=3)
    (outputs,) = generate(watched.engine, prompts_of(2)[1:], plan)
    for output in outputs:
        trace = output.extras["trace"]
        last, first = trace.lens
        assert (last.layer, first.layer) == (anatomy.layers - 1, 0)
        assert last.top.token_ids == trace.top.token_ids
        assert last.prob_of_sampled == pytest.approx(numpy.exp(trace.logprob), abs=1e-5)
        assert last.rank_of_sampled == trace.rank
        assert first.entropy != pytest.approx(last.entropy, abs=1e-6)


def test_norms_are_those_of_the_hidden_states(watch):
    watched = watch("llama")
    prompt = prompts_of(2)[1]
    (outputs,) = generate(watched.engine, [prompt], TracePlan(resid_norms=True), max_tokens=3)
    with torch.inference_mode():
        states = tiny("llama")(
            input_ids=torch.tensor([prompt]), output_hidden_states=True
        ).hidden_states
    norms = outputs[0].extras["trace"].resid_norms
    assert len(norms) == 3
    expected = [state[0, -1].norm().item() for state in states[1:-1]]  # the last one is normed
    assert norms[:-1] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "layers"),
    [("mixtral", [0, 1, 2]), ("gpt-oss-sinks", [0, 1, 2]), ("deepseek-mla", [1, 2])],
)
def test_routers_name_the_experts_of_each_layer(watch, name, layers):
    watched = watch(name)
    routing = watched.examined.anatomy.routing
    assert list(routing.layers) == layers
    assert routing.experts == 4
    for outputs in generate(watched.engine, prompts_of(2), TracePlan(router=True)):
        for output in outputs:
            routed = output.extras["trace"].router
            assert [each.layer for each in routed] == layers
            for each in routed:
                assert len(set(each.experts)) == routing.experts_per_token == len(each.weights)
                assert all(0 <= expert < 4 for expert in each.experts)
                assert 0 <= each.entropy <= numpy.log(4) + 1e-6


def test_a_row_can_be_cut_to_its_heaviest_keys_and_to_some_heads(watch):
    watched = watch("llama")
    whole = TracePlan(layers=(1,))
    cut = TracePlan(layers=(1,), heads=(3, 0), attn_topk=4)
    (all_of_it,) = generate(watched.engine, prompts_of(3)[2:], whole)
    (some_of_it,) = generate(watched.engine, prompts_of(3)[2:], cut)
    for one, two in zip(all_of_it, some_of_it, strict=True):
        (row,), (best,) = one.extras["trace"].attention, two.extras["trace"].attention
        assert best.width == row.width
        assert best.weights.shape == (2, 4) == best.keys.shape
        for place, head in enumerate((3, 0)):
            order = numpy.argsort(-row.weights[head], kind="stable")[:4]
            numpy.testing.assert_allclose(best.weights[place], row.weights[head][order], atol=1e-6)
            kept = row.weights[head][best.keys[place]]
            numpy.testing.assert_allclose(best.weights[place], kept, atol=1e-6)
            rest = 1 - best.weights[place].sum()
            assert best.rest[place] == pytest.approx(rest, abs=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "max"])
def test_heads_can_be_reduced_to_one_row(watch, reduction):
    watched = watch("llama")
    (whole,) = generate(watched.engine, prompts_of(2)[1:], TracePlan(layers=(0,)))
    (reduced,) = generate(
        watched.engine, prompts_of(2)[1:], TracePlan(layers=(0,), heads=reduction)
    )
    for one, two in zip(whole, reduced, strict=True):
        (row,), (other,) = one.extras["trace"].attention, two.extras["trace"].attention
        wanted = getattr(row.weights, reduction)(0, keepdims=True)
        numpy.testing.assert_allclose(other.weights, wanted, atol=1e-6)


@pytest.mark.parametrize("name", ["niels-v1", "niels-v2", "tinygpt", "tinygpt-moe"])
def test_a_sliding_window_moves_the_positions_of_a_row(watch, load, name):
    model = load(name)
    watched = watch(model)
    window = watched.engine.max_model_len
    prompt = [1 + i % 90 for i in range(window - 3)]
    plan = everything(watched.examined.anatomy)
    (outputs,) = generate(watched.engine, [prompt], plan, max_tokens=8, temperature=0)
    ids = list(prompt)
    for output in outputs:
        trace = output.extras["trace"]
        start = max(len(ids) - window, 0)
        assert (trace.start, trace.context) == (start, len(ids) - start)
        for row in trace.attention:
            assert (row.key_start, row.key_start + row.width) == (start, len(ids))
        eager = load(name, "eager")
        with torch.inference_mode():
            seen = eager(input_ids=torch.tensor([ids[start:]]), output_attentions=True).attentions
        for row in trace.attention:
            wanted = seen[row.layer][0, :, -1].numpy()
            numpy.testing.assert_allclose(row.weights, wanted, atol=1e-5)
        ids.append(output.token_id)


def test_a_model_without_attention_is_traced_without_rows(watch):
    watched = watch("mamba")
    anatomy = watched.examined.anatomy
    assert anatomy.mode is AttentionMode.NONE
    assert anatomy.layers_with_attention == []
    assert [layer.reason for layer in anatomy.attention] == ["linear_attention"] * 2
    (outputs,) = generate(watched.engine, prompts_of(1), everything(anatomy))
    for output in outputs:
        trace = output.extras["trace"]
        assert trace.attention == ()
        assert len(trace.resid_norms) == 2
        assert len(trace.lens) == 3


def test_weights_that_cannot_be_had_while_writing_are_refused_then(watch):
    anatomy = watch("falcon").examined.anatomy
    assert anatomy.mode is AttentionMode.LEGACY
    assert anatomy.layers_with_attention == [0, 1]
    assert not anatomy.traces_attention
    assert not anatomy.verified


def test_what_looks_like_attention_by_name_only_is_not_taken_for_it(watch):
    assert watch("rwkv").examined.anatomy.mode is AttentionMode.NONE


def test_hybrids_name_the_layers_that_attend(watch):
    anatomy = watch("qwen3-next").examined.anatomy
    assert anatomy.layers_with_attention == [3]
    assert [layer.type for layer in anatomy.attention] == [
        *["linear_attention"] * 3,
        "full_attention",
    ]
