"""Which tokens a prediction rests on, against naive loops and plain autograd."""

from __future__ import annotations

import copy

import numpy
import pytest
import torch
import transformers as tf
from torch import nn

from tests.engine.models import BATCHED, IDS, SEQUENTIAL, SIZES, TOGETHER, prompts_of
from tests.inspection.models import tiny
from tests.repeats import slow
from transformers_api.engine.load_options import LoadOptions
from transformers_api.engine.loader import load_engine
from transformers_api.engine.runners.packed_linear import PackedLinear, can_pack
from transformers_api.engine.thread import EngineThread
from transformers_api.errors import PromptTooLarge
from transformers_api.inspection.attachment import Attachment
from transformers_api.inspection.attribution_question import AttributionQuestion
from transformers_api.kernels.modules.linear import NativeLinear

PROMPT = prompts_of(4)[3]  # 17 tokens: three slices of 8
SHORT = PROMPT[:6]
KINDS = [
    *BATCHED,
    *TOGETHER,
    *SEQUENTIAL,
    "granite",
    "cohere2",
    "deepseek-mla",
    "qwen3-next",
    "qwen3-moe",
]
CLOSE = {"rtol": 1e-3, "atol": 2e-5}


def ask(watched, ids, **question):
    question = {"position": len(ids) - 1} | question
    return watched.run(watched.inspector.attribute(ids, AttributionQuestion(**question)))


def f_of(model, embeds, of="logprob", token=None):
    """f of embeddings (T, C), by hand; the token by default the likeliest."""
    handle = model.get_input_embeddings().register_forward_hook(lambda *_: embeds[None])
    try:
        ids = torch.zeros(1, len(embeds), dtype=torch.long)
        logits = model(input_ids=ids, use_cache=False).logits[0, -1].float()
    finally:
        handle.remove()
    scores = logits if of == "logit" else logits.log_softmax(-1)
    return scores[int(logits.argmax()) if token is None else token]


def embeds_of(model, ids):
    with torch.no_grad():
        return model.get_input_embeddings()(torch.tensor(ids))


def gradient_of(model, embeds, of="logprob", token=None):
    leaf = embeds.clone().requires_grad_()
    return torch.autograd.grad(f_of(model, leaf, of, token), leaf)[0]


@pytest.fixture
def reference():
    """reference(name): the same model as it is built, nothing packed, with gradients."""
    return lambda name: copy.deepcopy(tiny(name)).requires_grad_(False)


@pytest.mark.parametrize(
    ("name", "of"),
    [
        ("llama", "logit"),
        ("gemma2", "logit"),
        ("gpt2", "logprob"),
        *slow(*[(name, "logprob") for name in KINDS if name != "gpt2"]),
    ],
)
def test_occlusion_is_what_is_lost_when_one_embedding_is_the_mean(name, of, watch, reference):
    watched = watch(name)
    found = ask(watched, PROMPT, of=of)
    model = reference(name)
    embeds = embeds_of(model, PROMPT)
    mean = embeds_of(model, list(range(97))).mean(0)
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT]), use_cache=False).logits[0, -1].float()
        token = int(logits.argmax())
        value = f_of(model, embeds, of)
        losses = []
        for place in range(len(PROMPT)):
            without = embeds.clone()
            without[place] = mean
            losses.append(value - f_of(model, without, of, token))
    assert found.token_id == token
    assert found.logprob == pytest.approx(logits.log_softmax(-1)[token].item(), abs=1e-4)
    assert found.value == pytest.approx(value.item(), abs=1e-4)
    numpy.testing.assert_allclose(found.scores, torch.stack(losses).numpy(), rtol=1e-3, atol=1e-4)
    assert found.convergence_delta is None


@pytest.mark.parametrize("slice_tokens", [3, 6, 12, 64])
def test_occlusion_does_not_depend_on_how_it_is_sliced(slice_tokens, watch):
    whole = ask(watch("llama", prefill_chunk=1000), SHORT).scores
    sliced = ask(watch("llama", prefill_chunk=slice_tokens), SHORT).scores
    numpy.testing.assert_allclose(sliced, whole, **CLOSE)


@pytest.mark.parametrize("prefill_chunk", [4, 8, 24])
def test_a_slice_of_an_occlusion_reads_about_one_chunk_of_tokens(prefill_chunk, watch):
    watched = watch("llama", prefill_chunk=prefill_chunk)
    read = []

    def note(module, args, kwargs):
        read.append(kwargs["input_ids"].numel())

    handle = watched.engine.call(
        lambda model: model.register_forward_pre_hook(note, with_kwargs=True)
    ).result()
    generator = watched.engine.call(
        watched.inspector.attribute(SHORT, AttributionQuestion(position=5))
    ).result()
    while True:
        read.clear()
        try:
            watched.engine.call(lambda _: next(generator)).result()
        except StopIteration:
            break
        assert sum(read) <= prefill_chunk
    watched.engine.call(lambda _: handle.remove()).result()


@pytest.mark.parametrize("name", KINDS)
def test_gradients_are_those_of_autograd_on_the_unpacked_model(name, watch, reference):
    watched = watch(name)
    model = reference(name)
    embeds = embeds_of(model, PROMPT)
    gradient = gradient_of(model, embeds)
    product = ask(watched, PROMPT, method="gradient_x_input")
    length = ask(watched, PROMPT, method="gradient_norm")
    scale = float(gradient.norm(dim=-1).max())
    close = {"rtol": 1e-3, "atol": 1e-4 * scale}
    numpy.testing.assert_allclose(product.scores, (gradient * embeds).sum(-1).numpy(), **close)
    numpy.testing.assert_allclose(length.scores, gradient.norm(dim=-1).numpy(), **close)
    assert watched.run(watched.inspector.check_gradients())


@pytest.mark.parametrize("packed", [PackedLinear, NativeLinear])
def test_a_batching_engine_differentiates_through_packed_layers(watch, packed, request):
    native = request.getfixturevalue("native_cache") if packed is NativeLinear else None
    watched = watch("llama", native=native)
    kinds = watched.engine.call(lambda model: {type(each) for each in model.modules()}).result()
    assert packed in kinds
    assert nn.Linear not in kinds
    assert numpy.abs(ask(watched, SHORT, method="gradient_norm").scores).min() > 0


def test_an_earlier_position_looks_at_the_tokens_up_to_it(watch):
    watched = watch("llama")
    early = ask(watched, PROMPT, position=5)
    assert early.scores.shape == (6,)
    numpy.testing.assert_allclose(early.scores, ask(watched, SHORT).scores, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["occlusion", "gradient_x_input", "integrated_gradients"])
def test_a_target_is_kept(method, watch, reference):
    watched = watch("llama")
    found = ask(watched, SHORT, token_id=33, method=method)
    model = reference("llama")
    with torch.no_grad():
        value = f_of(model, embeds_of(model, SHORT), token=33)
    assert found.token_id == 33
    assert found.value == found.logprob == pytest.approx(value.item(), abs=1e-5)


@pytest.mark.parametrize("baseline", ["mean", "zero"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mamba"])
def test_integrated_gradients_are_the_sum_along_the_line(name, baseline, watch, reference):
    watched = watch(name)
    found = ask(
        watched, SHORT, method="integrated_gradients", steps=4, baseline=baseline, of="logit"
    )
    model = reference(name)
    embeds = embeds_of(model, SHORT)
    mean = embeds_of(model, list(range(97))).mean(0)
    start = torch.zeros_like(embeds) if baseline == "zero" else mean.expand_as(embeds)
    line = embeds - start
    total = sum(
        gradient_of(model, start + (step + 0.5) / 4 * line, "logit", found.token_id)
        for step in range(4)
    )
    scores = (line * total / 4).sum(-1)
    with torch.no_grad():
        first = f_of(model, start, "logit", found.token_id)
    scale = float(scores.abs().max())
    numpy.testing.assert_allclose(found.scores, scores.numpy(), rtol=1e-3, atol=1e-3 * scale)
    delta = found.value - first.item() - float(scores.sum())
    assert found.convergence_delta == pytest.approx(delta, abs=1e-3 * max(scale, 1))
    half = sum(
        gradient_of(model, start + (step + 0.5) / 2 * line, "logit", found.token_id)
        for step in range(2)
    )
    change = float((scores - (line * half / 2).sum(-1)).abs().max())
    assert found.steps == 4
    assert found.largest_change == pytest.approx(change, abs=2e-3 * max(scale, 1))
    assert "the first token is on the path" in found.note
    if abs(change - 0.05 * scale) > 1e-3 * scale:
        assert ("did not converge" in found.note) == (change > 0.05 * scale)


def test_a_token_in_place_of_the_others_leaves_the_first_where_it_is(watch, reference):
    watched = watch("llama")
    question = {"baseline": "token", "baseline_token_id": 11, "of": "logit", "steps": 6}
    found = ask(watched, SHORT, method="integrated_gradients", **question)
    model = reference("llama")
    embeds = embeds_of(model, SHORT)
    start = torch.cat([embeds[:1], embeds_of(model, [11] * (len(SHORT) - 1))])
    line = embeds - start
    total = sum(
        gradient_of(model, start + (step + 0.5) / 6 * line, "logit", found.token_id)
        for step in range(6)
    )
    scores = (line * total / 6).sum(-1).numpy()
    assert numpy.isnan(found.scores[0])
    numpy.testing.assert_allclose(found.scores[1:], scores[1:], rtol=1e-3, atol=1e-5)


def test_steps_are_doubled_until_no_score_moves(watch):
    watched = watch("llama")
    asked = {"method": "integrated_gradients", "baseline": "token", "baseline_token_id": 11}
    found = ask(watched, SHORT, **asked)
    assert found.steps in (16, 32, 64, 128)
    assert found.note is None
    largest = numpy.nanmax(numpy.abs(found.scores))
    assert found.largest_change <= 0.05 * largest
    finer = ask(watched, SHORT, **asked, steps=128)
    assert numpy.nanmax(numpy.abs(found.scores - finer.scores)) <= 0.1 * largest


def test_what_has_not_converged_says_by_how_much(watch):
    found = ask(watch("llama"), SHORT, method="integrated_gradients", steps=1, baseline="token")
    assert found.largest_change is None
    assert found.note == "did not converge: with one step nothing is known of it"


def test_doubling_ends_in_time_and_says_so(watch):
    asked = {"method": "integrated_gradients", "baseline": "token", "within_s": 1e-6}
    found = ask(watch("llama"), SHORT, **asked)
    assert found.steps == 8
    assert numpy.isfinite(found.scores[1:]).all()
    assert found.note == (
        "did not converge: nothing is known of it after 8 steps, "
        "and more would take longer than 1e-06 s"
    )


def test_only_the_places_that_are_asked_for_are_taken_away(watch):
    watched = watch("llama")
    whole = ask(watched, SHORT).scores
    some = ask(watched, SHORT, groups=((1,), (4,))).scores
    assert numpy.isnan(some[[0, 2, 3, 5]]).all()
    numpy.testing.assert_allclose(some[[1, 4]], whole[[1, 4]], **CLOSE)


def test_tokens_of_a_word_are_taken_away_together(watch, reference):
    watched = watch("llama")
    found = ask(watched, SHORT, groups=((0,), (1, 2, 3), (4, 5)))
    model = reference("llama")
    embeds = embeds_of(model, SHORT)
    without = embeds.clone()
    without[1:4] = embeds_of(model, list(range(97))).mean(0)
    with torch.no_grad():
        loss = found.value - float(f_of(model, without, token=found.token_id))
    numpy.testing.assert_allclose(found.scores[1:4], loss, rtol=1e-3, atol=1e-4)
    assert found.scores[4] == found.scores[5]


def test_a_screen_leaves_the_tokens_with_the_largest_gradients(watch):
    watched = watch("llama")
    product = numpy.abs(ask(watched, PROMPT, method="gradient_x_input").scores)
    whole = ask(watched, PROMPT).scores
    found = ask(watched, PROMPT, screen=5).scores
    places = numpy.flatnonzero(~numpy.isnan(found))
    assert set(places) == set(numpy.argsort(-product)[:5])
    numpy.testing.assert_allclose(found[places], whole[places], rtol=1e-3, atol=2e-5)


def test_an_occlusion_that_would_take_too_long_says_what_would_not(watch):
    with pytest.raises(PromptTooLarge, match=r"ask for up to \d+ positions, or \"screen\": \d+"):
        ask(watch("llama"), PROMPT, within_s=1e-6)


def test_integrated_gradients_add_up_where_the_way_is_short(watch):
    """A model whose f is almost linear: many steps leave no gap, and say so."""
    torch.manual_seed(0)
    config = tf.LlamaConfig(**SIZES, **IDS, initializer_range=1e-3)
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    watched = watch(model)
    steps = {
        count: ask(watched, SHORT, method="integrated_gradients", steps=count, of="logit")
        for count in (1, 64)
    }
    assert abs(steps[64].convergence_delta) <= abs(steps[1].convergence_delta)
    assert "did not converge" not in steps[64].note


def test_a_model_that_stops_gradients_has_none(watch):
    model = copy.deepcopy(tiny("llama"))
    model.model.layers[0] = Restarting(model.model.layers[0])
    watched = watch(model)
    assert not watched.run(watched.inspector.check_gradients())


class Restarting(nn.Module):
    """A layer with which the residual stream begins anew, as far as gradients go."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x, *args, **kwargs):
        return self.inner(x.detach(), *args, **kwargs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_loaded_from_its_folder_on_the_engine_thread_has_gradients(tmp_path, dtype):
    """What is loaded inside inference mode could not be differentiated."""
    tiny("llama").save_pretrained(tmp_path)
    thread = EngineThread(num_threads=1)
    attachment = Attachment(slice_tokens=8)
    options = LoadOptions(num_slots=2, dtype=dtype)
    engine = thread.call(lambda: load_engine(tmp_path, options, thread, attachment.wrap)).result()
    try:
        inspector = attachment.inspector(engine)
        generator = engine.call(inspector.check_gradients()).result()
        engine.call(lambda _: next(generator)).result()
        with pytest.raises(StopIteration) as end:
            engine.call(lambda _: next(generator)).result()
        assert end.value.value is True
    finally:
        engine.close()
        thread.stop()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_linear_gives_the_same_bits_with_and_without_a_gradient(dtype, bias):
    if not can_pack(dtype):
        pytest.skip(f"no packed products of {dtype} on this processor")
    torch.manual_seed(0)
    linear = nn.Linear(33, 65, bias=bias, dtype=dtype).requires_grad_(False)
    packed = PackedLinear(linear, is_shared=False)
    x = torch.randn(2, 7, 33, dtype=dtype)
    leaf = x.clone().requires_grad_()
    y = packed(leaf)
    with torch.inference_mode():
        assert torch.equal(packed(x), y.detach())
    weights = torch.randn_like(y)
    (given,) = torch.autograd.grad((y * weights).sum(), leaf)
    other = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad((linear(other) * weights).sum(), other)
    torch.testing.assert_close(given, wanted)
