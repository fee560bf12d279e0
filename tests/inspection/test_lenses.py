"""Lenses and features beside torch's own arithmetic, afterwards and while a model writes."""

from __future__ import annotations

import numpy
import pytest
import torch

from tests.engine.models import prompts_of
from tests.engine.reading import read
from tests.inspection.models import tiny
from tests.repeats import slow
from transformers_api.engine.base import SamplingParams, SequenceRequest
from transformers_api.inspection.base import TracePlan
from transformers_api.inspection.edit_plan import Edit, EditPlan
from transformers_api.inspection.lens_maps import LensMaps
from transformers_api.inspection.sae import FeatureEdit, FeaturePlan, Sae, largest

PROMPT = prompts_of(3)[2]
LAYERS, POSITIONS, WIDTH, FEATURES = (-1, 0, 1, 2), (0, 3, -1), 32, 48
SEED = numpy.random.default_rng(1)
MAPS = SEED.normal(size=(2, WIDTH, WIDTH)).astype(numpy.float32) / WIDTH
BIASES = SEED.normal(size=(2, WIDTH)).astype(numpy.float32)


def identity(kind):
    if kind == "tuned":
        zeros = numpy.zeros((3, WIDTH, WIDTH), numpy.float32)
        return LensMaps("tuned", (-1, 0, 2), zeros, numpy.zeros((3, WIDTH), numpy.float32))
    one = numpy.eye(WIDTH, dtype=numpy.float32)
    return LensMaps("jacobian", (-1, 0, 2), numpy.stack([one] * 3))


def table(watched, via):
    places = [place % len(PROMPT) for place in POSITIONS]
    return watched.run(watched.inspector.lens(PROMPT, LAYERS, places, 5, 7, via))


def readings(watched, **plan):
    plan = TracePlan(topk=1, lens_layers=LAYERS, lens_topk=3, **plan)
    params = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
    stream = watched.engine.submit([SequenceRequest(PROMPT, params)], observe={"trace": plan})
    return [output.extras["trace"] for output in read(stream)[0]]


@pytest.mark.parametrize("kind", ["tuned", "jacobian"])
@pytest.mark.parametrize("name", ["llama", *slow("gpt2", "gemma2")])
def test_a_lens_that_changes_nothing_is_the_logit_lens_to_the_bit(watch, name, kind):
    watched, lens = watch(name), identity(kind)
    plain, mapped = table(watched, None), table(watched, lens)
    for field in ("top_ids", "top_probs", "entropy", "target_prob", "target_rank"):
        assert numpy.array_equal(getattr(plain, field), getattr(mapped, field))
    pairs = zip(readings(watched), readings(watched, lens_via=lens), strict=True)
    assert all(one.lens == other.lens and len(one.lens) == 4 for one, other in pairs)


@pytest.mark.parametrize("kind", ["tuned", "jacobian"])
def test_a_lens_maps_the_stream_before_norm_and_head(watch, kind):
    lens = LensMaps(kind, (0, 2), MAPS, BIASES if kind == "tuned" else None)
    own = table(watch("llama"), lens)
    model, (a, b) = tiny("llama"), (torch.from_numpy(MAPS), torch.from_numpy(BIASES))
    with torch.no_grad():
        states = _streams(model)
        for column, layer in enumerate(LAYERS):
            for row, place in enumerate(POSITIONS):
                h = states[layer + 1][place]
                if layer in lens.layers:
                    n = lens.layers.index(layer)
                    h = h + a[n] @ h + b[n] if kind == "tuned" else a[n] @ h
                probs = model.lm_head(model.model.norm(h)).softmax(-1)
                assert own.target_prob[row, column] == pytest.approx(float(probs[7]), rel=1e-3)


def _streams(model):
    """The embedding and the stream after each layer, (T, C) each."""
    taken = []
    handles = [
        layer.register_forward_hook(
            lambda _m, _a, output: taken.append(output[0] if isinstance(output, tuple) else output)
        )
        for layer in model.model.layers
    ]
    ids = torch.tensor([PROMPT])
    model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    rows = [each if each.dim() == 2 else each[0] for each in taken]
    return [model.model.embed_tokens(ids)[0], *rows]


def test_the_fit_is_the_distance_from_what_the_model_says(watch):
    watched = watch("llama")
    none = watched.run(watched.inspector.fit_lens(PROMPT, identity("tuned"), 99))
    assert none.lens == none.plain
    assert none.lens[-1] == pytest.approx(0, abs=1e-6)
    off = watched.run(watched.inspector.fit_lens(PROMPT, LensMaps("jacobian", (0, 2), MAPS), 5))
    assert off.lens[-1] > 0.001 > off.plain[-1]


def test_a_direction_raises_the_tokens_that_it_is_of(watch):
    watched, model = watch("llama"), tiny("llama")
    direction = model.lm_head.weight[9].detach().float().numpy()
    reading = watched.run(watched.inspector.read_direction(PROMPT, direction, 4))
    assert reading.raised[0][0] == 9
    assert reading.raised[0][1] > 0 > reading.lowered[0][1]


# -- sparse autoencoders


def sae(architecture="standard", layer=1, part="resid", **fields):
    extra = {}
    if architecture == "jumprelu":
        extra = {"threshold": numpy.full(FEATURES, 0.3, numpy.float32)}
    if architecture == "gated":
        extra = {"r_mag": BIASES[0].repeat(2)[:FEATURES], "b_mag": BIASES[1].repeat(2)[:FEATURES]}
    generator = numpy.random.default_rng(2)
    numbers = {
        "encoder": generator.normal(size=(WIDTH, FEATURES)),
        "decoder": generator.normal(size=(FEATURES, WIDTH)),
        "encoder_bias": generator.normal(size=FEATURES),
        "decoder_bias": generator.normal(size=WIDTH),
    }
    floats = {name: each.astype(numpy.float32) for name, each in numbers.items()}
    own = {"k": 4, "extra": extra, **floats} | fields
    return Sae(name="s", digest="d", architecture=architecture, part=part, layer=layer, **own)


def encoded(own, x):
    """Features by torch, one row."""
    if own.subtracts_bias:
        x = x - torch.from_numpy(own.decoder_bias)
    product = x @ torch.from_numpy(own.encoder)
    before = product + torch.from_numpy(own.encoder_bias)
    if own.architecture == "jumprelu":
        return before.relu() * (before > torch.from_numpy(own.extra["threshold"]))
    if own.architecture == "gated":
        size = product * torch.from_numpy(own.extra["r_mag"]).exp()
        return (before > 0) * (size + torch.from_numpy(own.extra["b_mag"])).relu()
    features = before.relu()
    if own.architecture == "topk":
        top = features.topk(own.k)
        return torch.zeros_like(features).scatter(-1, top.indices, top.values)
    return features


@pytest.mark.parametrize("subtracts", [True, False])
@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "topk", "gated"])
def test_features_are_those_of_the_formulas(architecture, subtracts):
    own = sae(architecture, subtracts_bias=subtracts)
    rows = numpy.random.default_rng(3).normal(size=(5, WIDTH)).astype(numpy.float32)
    features = own.encode(rows)
    assert numpy.allclose(features, encoded(own, torch.from_numpy(rows)).numpy(), atol=1e-4)
    assert 0 < (features > 0).mean() < 1
    for number in (0, 7):
        assert numpy.allclose(own.feature(rows, number), features[:, number], atol=1e-5)


@pytest.mark.parametrize("normalization", ["none", "layer_norm", "constant_norm_rescale"])
def test_an_orthonormal_autoencoder_gives_its_rows_back(normalization):
    basis = numpy.linalg.qr(numpy.random.default_rng(4).normal(size=(WIDTH, WIDTH)))[0]
    both = numpy.concatenate([basis, -basis], 1).astype(numpy.float32)
    own = sae(
        encoder=both,
        decoder=numpy.ascontiguousarray(both.T),
        encoder_bias=numpy.zeros(2 * WIDTH, numpy.float32),
        decoder_bias=BIASES[0],
        subtracts_bias=True,
        normalization=normalization,
    )
    rows = 30 * numpy.random.default_rng(5).normal(size=(4, WIDTH)).astype(numpy.float32)
    assert numpy.allclose(own.decode(own.encode(rows), rows), rows, atol=1e-3, rtol=1e-5)
    changed = FeatureEdit(own, 3, 2.5).applied(rows)
    assert numpy.allclose(own.feature(changed, 3)[0], 2.5, atol=1e-3) or normalization != "none"


def test_features_are_noted_of_the_stream_while_it_writes(watch):
    own, watched = sae("topk"), watch("llama")
    traces = readings(watched, features=FeaturePlan(own, 3))
    states = watched.run(watched.inspector.hidden_states(PROMPT, [1], [len(PROMPT) - 1]))
    expected = largest(own.encode(states[0])[0], 3)
    assert [number for number, _ in traces[0].features] == [number for number, _ in expected]
    for (_, value), (_, other) in zip(traces[0].features, expected, strict=True):
        assert value == pytest.approx(other, rel=1e-3)
    assert all(len(trace.features) == 3 for trace in traces)


@pytest.mark.parametrize("architecture", ["jumprelu", *slow("topk", "gated", "standard")])
@pytest.mark.parametrize("part", ["resid", "mlp"])
def test_a_feature_is_set_and_the_rest_stays(watch, part, architecture):
    own, watched, model = sae(architecture, part=part), watch("llama"), tiny("llama")
    edit = Edit(
        do="feature",
        part=part,
        layer=1,
        positions=((0, None),),
        feature=FeatureEdit(own, 5, 4.0),
    )
    plan = EditPlan(edits=(edit,), identity=f"{part} {architecture}")
    params = SamplingParams(max_tokens=3, temperature=0, logprobs=3, ignore_eos=True)
    outputs = read(watched.engine.submit([SequenceRequest(PROMPT, params, edits=plan)]))[0]
    layer = model.model.layers[1]
    module = layer if part == "resid" else layer.mlp

    def change(_module, _args, output):
        x = output[0] if isinstance(output, tuple) else output
        features = encoded(own, x)
        moved = x + (4.0 - features[..., 5:6]) * torch.from_numpy(own.decoder[5])
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    handle, ids = module.register_forward_hook(change), list(PROMPT)
    try:
        for output in outputs:
            with torch.no_grad():
                scores = model(torch.tensor([ids]), use_cache=False).logits[0, -1].log_softmax(-1)
            assert output.token_id == int(scores.argmax())
            assert output.score.logprob == pytest.approx(float(scores.max()), abs=1e-3)
            ids.append(output.token_id)
    finally:
        handle.remove()
    assert plan.tally.tokens == len(PROMPT) + 2
