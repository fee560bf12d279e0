"""How a prompt was foreseen, the logit lens and the residual stream, by the real engine."""

from __future__ import annotations

import copy
import gc
import weakref

import numpy
import pytest
import torch
import transformers as tf

from tests.engine.models import BATCHED, SEQUENTIAL, TOGETHER, prompts_of
from tests.engine.reading import GREEDY, ask, read, tokens
from tests.inspection.models import tiny
from tests.inspection.test_parts import OURS, hooks_on, model_of
from transformers_api.engine.backends import choose_backends
from transformers_api.engine.load_options import LoadOptions
from transformers_api.engine.loader import build_engine
from transformers_api.errors import ModelNotCapable
from transformers_api.inspection.attachment import Attachment
from transformers_api.inspection.attribution_question import AttributionQuestion
from transformers_api.inspection.reading import HEAD_ROWS
from transformers_api.inspection.reading import read as read_ids

PROMPT = prompts_of(5)[4]  # 22 tokens: three slices of 8
KINDS = [*BATCHED, *TOGETHER, *SEQUENTIAL, "granite", "cohere2", "deepseek-mla", "qwen3-next"]
CLOSE = {"rtol": 1e-4, "atol": 2e-5}  # slices and packed weights round otherwise


@torch.inference_mode()
def logits_of(name, ids=PROMPT):
    """(n, V), by one plain forward."""
    return tiny(name)(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0].float()


@pytest.mark.parametrize("name", KINDS)
def test_a_prompt_is_read_as_a_plain_forward_reads_it(name, watch):
    watched = watch(name)
    reading = watched.run(watched.inspector.read_prompt(PROMPT, 3))
    logprobs = logits_of(name)[:-1].log_softmax(-1)
    own = logprobs.gather(1, torch.tensor(PROMPT[1:])[:, None])
    top = logprobs.topk(3)
    assert reading.surprisal.shape == (len(PROMPT) - 1,)
    numpy.testing.assert_allclose(reading.surprisal, -own[:, 0].numpy(), **CLOSE)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    numpy.testing.assert_allclose(reading.entropy, entropy.numpy(), **CLOSE)
    numpy.testing.assert_array_equal(reading.rank, (logprobs > own).sum(-1).numpy())
    numpy.testing.assert_array_equal(reading.top_ids, top.indices.numpy())
    numpy.testing.assert_allclose(reading.top_logprobs, top.values.numpy(), **CLOSE)


@pytest.mark.parametrize("name", OURS)
def test_our_own_families_are_read_as_a_plain_forward_reads_them(name, watch):
    model = model_of(name)
    watched = watch(model)
    last = watched.inspector.anatomy.layers - 1
    reading = watched.run(watched.inspector.read_prompt(PROMPT, 1))
    table = watched.run(watched.inspector.lens(PROMPT, [last], [21], 1, None))
    found = watched.run(watched.inspector.attribute(PROMPT, AttributionQuestion(position=21)))
    with torch.inference_mode():
        logprobs = model(input_ids=torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    own = logprobs[:-1].gather(1, torch.tensor(PROMPT[1:])[:, None])[:, 0]
    numpy.testing.assert_allclose(reading.surprisal, -own.numpy(), **CLOSE)
    best = logprobs[-1].max().item()
    assert table.target_prob[0, 0] == pytest.approx(numpy.exp(best), rel=1e-4)
    assert found.value == pytest.approx(best, abs=1e-4)
    assert watched.run(watched.inspector.check_gradients())


def test_one_token_has_nothing_to_be_foreseen(watch):
    watched = watch("llama")
    reading = watched.run(watched.inspector.read_prompt([5], 3))
    assert reading.surprisal.shape == (0,)
    assert reading.top_ids.shape == (0, 3)


def test_more_tokens_than_go_through_the_head_together_are_read_in_order(watch):
    prompt = torch.randint(3, 90, (HEAD_ROWS + 9,)).tolist()
    watched = watch("llama", prefill_chunk=HEAD_ROWS + 4)
    reading = watched.run(watched.inspector.read_prompt(prompt, 1))
    logprobs = logits_of("llama", prompt)[:-1].log_softmax(-1)
    own = logprobs.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    numpy.testing.assert_allclose(reading.surprisal, -own.numpy(), **CLOSE)


def test_ids_that_the_tokenizer_lacks_are_neither_foreseen_nor_counted(watch):
    watched = watch("llama", tokenizer_size=50)
    prompt = [token % 50 for token in PROMPT]
    reading = watched.run(watched.inspector.read_prompt(prompt, 50))
    assert reading.top_ids.max() == 49
    numpy.testing.assert_allclose(numpy.exp(reading.top_logprobs).sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral-window-8", "gpt-oss-sinks"])
@pytest.mark.parametrize("width", [1, 5, 8])
@torch.inference_mode()
def test_chunks_give_the_logits_of_the_whole(name, width):
    model, ids = tiny(name), torch.tensor([PROMPT, PROMPT[::-1]])
    chunks = list(read_ids(model, ids, width, whole_logits=True))
    logits = torch.cat([chunk.logits for chunk in chunks], 1)
    assert (chunks[0].start, chunks[-1].stop, len(chunks)) == (0, 22, -(-22 // width))
    torch.testing.assert_close(logits, model(input_ids=ids).logits, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", KINDS)
def test_the_lens_on_the_last_layer_says_what_the_model_says(name, watch):
    watched = watch(name)
    last = watched.inspector.anatomy.layers - 1
    positions = [len(PROMPT) - 1, 0, 9]
    table = watched.run(watched.inspector.lens(PROMPT, [-1, 0, last], positions, 4, None))
    probs = logits_of(name)[positions].softmax(-1)
    top = probs.topk(4)
    numpy.testing.assert_array_equal(table.top_ids[:, 2], top.indices.numpy())
    numpy.testing.assert_allclose(table.top_probs[:, 2], top.values.numpy(), **CLOSE)
    numpy.testing.assert_array_equal(table.target_ids, top.indices[:, 0].numpy())
    numpy.testing.assert_array_equal(table.target_rank[:, 2], 0)
    numpy.testing.assert_allclose(table.target_prob[:, 2], top.values[:, 0].numpy(), **CLOSE)
    entropy = -(probs * probs.log()).sum(-1)
    numpy.testing.assert_allclose(table.entropy[:, 2], entropy.numpy(), **CLOSE)
    assert table.top_ids.shape == (3, 3, 4)
    assert not numpy.array_equal(table.top_probs[:, 0], table.top_probs[:, 2])


def test_the_lens_follows_a_target(watch):
    watched = watch("gpt2")
    table = watched.run(watched.inspector.lens(PROMPT, [2], [4, 4], 1, 33))
    logits = logits_of("gpt2")[4]
    assert table.target_ids.tolist() == [33, 33]
    assert table.target_rank[:, 0].tolist() == [int((logits > logits[33]).sum())] * 2
    numpy.testing.assert_allclose(table.target_prob[:, 0], logits.softmax(-1)[33].item(), **CLOSE)


def test_a_lens_in_a_layer_is_norm_and_head_of_its_residual_stream(watch):
    watched = watch("llama")
    table = watched.run(watched.inspector.lens(PROMPT, [0, -1], [7], 97, 5))
    model = copy.deepcopy(tiny("llama"))
    with torch.inference_mode():
        states = model(torch.tensor([PROMPT]), output_hidden_states=True).hidden_states
        for column, state in enumerate((states[1], states[0])):
            probs = model.lm_head(model.model.norm(state[0, 7])).softmax(-1)
            numpy.testing.assert_allclose(
                table.top_probs[0, column], probs.topk(97).values.numpy(), **CLOSE
            )


# (transformers does not number the states of these as the others'.)
STATES = [name for name in KINDS if name not in ("mamba", "rwkv", "qwen3-next")]


@pytest.mark.parametrize("name", STATES)
def test_hidden_states_are_those_of_transformers_before_the_final_norm(name, watch):
    watched = watch(name)
    layers = list(range(-1, watched.inspector.anatomy.layers - 1))
    positions = [21, 3, 8, 7]
    states = watched.run(watched.inspector.hidden_states(PROMPT, layers, positions))
    with torch.inference_mode():
        wanted = copy.deepcopy(tiny(name))(  # asking for states leaves hooks behind
            torch.tensor([PROMPT]), output_hidden_states=True, use_cache=False
        ).hidden_states
    assert states.dtype == numpy.float32
    for each, state in zip(states, wanted, strict=False):
        numpy.testing.assert_allclose(each, state[0, positions].numpy(), rtol=1e-3, atol=2e-5)


def test_the_last_hidden_state_becomes_transformers_own_through_the_final_norm(watch):
    watched = watch("llama")
    (state,) = watched.run(watched.inspector.hidden_states(PROMPT, [2], list(range(22))))
    model = copy.deepcopy(tiny("llama"))
    with torch.inference_mode():
        wanted = model(torch.tensor([PROMPT]), output_hidden_states=True).hidden_states[-1][0]
        given = model.model.norm(torch.from_numpy(state))
    numpy.testing.assert_allclose(given.numpy(), wanted.numpy(), **CLOSE)


def test_what_a_model_does_not_show_is_refused(watch):
    torch.manual_seed(0)
    config = tf.OPTConfig(
        vocab_size=97,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        word_embed_proj_dim=16,
    )
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    watched = watch(model)
    with pytest.raises(ModelNotCapable, match="opt does not show a residual stream that its head"):
        watched.inspector.lens(PROMPT, [0], [0], 1, None)
    reading = watched.run(watched.inspector.read_prompt(PROMPT, 1))  # by the model's own logits
    with torch.inference_mode():
        logprobs = model(torch.tensor([PROMPT])).logits[0, :-1].log_softmax(-1)
    own = logprobs.gather(1, torch.tensor(PROMPT[1:])[:, None])[:, 0]
    numpy.testing.assert_allclose(reading.surprisal, -own.numpy(), **CLOSE)


# -- next to others


JOBS = {
    "read_prompt": lambda inspector: inspector.read_prompt(PROMPT, 3),
    "lens": lambda inspector: inspector.lens(PROMPT, [-1, 0, 1], [3, 21], 3, None),
    "hidden_states": lambda inspector: inspector.hidden_states(PROMPT, [-1, 0], [3, 21]),
    "occlusion": lambda inspector: inspector.attribute(PROMPT, AttributionQuestion(position=21)),
    "gradients": lambda inspector: inspector.attribute(
        PROMPT, AttributionQuestion(position=21, method="gradient_x_input")
    ),
    "integrated": lambda inspector: inspector.attribute(
        PROMPT, AttributionQuestion(position=21, method="integrated_gradients", steps=3)
    ),
}


@pytest.mark.parametrize("job", JOBS)
def test_a_job_that_is_left_early_leaves_no_hooks_and_changes_no_answer(job, watch):
    watched = watch("llama")
    before = tokens(watched.engine.submit([ask(PROMPT, max_tokens=6, **GREEDY)]))
    visit = watched.engine.call
    hooks = visit(hooks_on).result()  # transformers' own
    generator = visit(JOBS[job](watched.inspector)).result()
    slices = 0
    while slices < 4:
        try:
            visit(lambda _: next(generator)).result()
        except StopIteration:
            break
        slices += 1
        assert visit(hooks_on).result() == hooks  # nor between two slices
        assert visit(lambda _: torch.is_inference_mode_enabled()).result()
        assert not visit(lambda _: torch.is_grad_enabled()).result()
    assert slices
    visit(lambda _: generator.close()).result()
    assert visit(hooks_on).result() == hooks
    assert tokens(watched.engine.submit([ask(PROMPT, max_tokens=6, **GREEDY)])) == before


@pytest.mark.parametrize("job", JOBS)
def test_others_are_answered_between_the_slices_of_a_job(job, watch):
    watched = watch("llama")
    alone = tokens(watched.engine.submit([ask(PROMPT, max_tokens=8, **GREEDY)]))
    expected = watched.run(JOBS[job](watched.inspector))
    stream = watched.engine.submit([ask(PROMPT, max_tokens=8, **GREEDY)])
    result = watched.run(JOBS[job](watched.inspector))
    assert [output.token_id for output in read(stream)[0]] == alone[0]
    numpy.testing.assert_equal(as_plain(result), as_plain(expected))


@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_a_job_that_fails_leaves_the_engine_as_it_was(name, watch):
    watched = watch(name)
    hooks = watched.engine.call(hooks_on).result()
    with pytest.raises((IndexError, RuntimeError)):
        watched.run(watched.inspector.read_prompt([5, 1000], 1))
    assert watched.engine.call(hooks_on).result() == hooks
    assert watched.run(watched.inspector.read_prompt([5, 6], 1)).rank.shape == (1,)


def test_the_inspector_keeps_no_unloaded_model_alive(engine_thread):
    model = copy.deepcopy(tiny("llama"))
    alive = weakref.ref(model)

    def build(model=model):
        attachment = Attachment(slice_tokens=8)
        options = LoadOptions(num_slots=2)
        (backend,) = choose_backends(options, "cpu", 1)
        engine = build_engine(model, backend, options, engine_thread, attachment.wrap)
        return engine, attachment.inspector(engine)

    engine, inspector = engine_thread.call(build).result()
    assert engine.call(inspector.read_prompt(PROMPT, 1)).result()
    engine.close()
    del model, build
    engine_thread.call(gc.collect).result()
    assert inspector.anatomy.lens
    assert alive() is None


def as_plain(result):
    """Arrays and numbers of a result, in a form that can be compared."""
    if isinstance(result, numpy.ndarray):
        return result
    return {name: getattr(result, name) for name in result.__slots__}
