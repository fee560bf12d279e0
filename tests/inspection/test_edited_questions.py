"""Questions about a text that is read with edits, beside a plain model that is edited by hand."""

from __future__ import annotations

import copy
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import numpy
import pytest
import torch

from tests.engine.models import prompts_of
from tests.inspection.models import tiny
from tests.inspection.test_attention_edits import attention, ranges, temper
from tests.inspection.test_attention_inputs import inputs
from tests.inspection.test_edits import FORMULAS, LAYER, VECTOR, edit, plan
from tests.inspection.test_lenses import sae
from tests.inspection.test_token_figures import run as written
from tests.repeats import slow
from transformers_api.engine.places import model_places
from transformers_api.errors import ModelNotCapable
from transformers_api.inspection.attribution_question import AttributionQuestion
from transformers_api.inspection.base import TracePlan
from transformers_api.inspection.grid_question import Cell, GridQuestion
from transformers_api.inspection.logit_share import LogitPartsQuestion
from transformers_api.inspection.sae import FeatureEdit

PROMPT = prompts_of(4)[3]  # 17 tokens: three slices of 8
COUNT, LAST = len(PROMPT), len(PROMPT) - 1
OTHER = [*PROMPT[:5], (PROMPT[5] + 3) % 60, *PROMPT[6:]]
EDGES = {
    "an edge": attention(positions=((LAST, COUNT),), keys=((4, 7),)),
    "cold": temper(0.2, units=(0, 3)),
    "queries": inputs("scale", "q", (1, 3), by=-40.0),
    "keys": inputs("scale", "k", by=30.0),
    "values": inputs("scale", "v", (0,), by=3.0),
}
LATE = "only where nothing is predicted"
EDITS = {what: own for what, (own, _) in FORMULAS.items()} | EDGES
EDITS[LATE] = edit(do="scale", part="mlp", by=0.0, positions=((3, 6),))
CHANGES = {what: change for what, (_, change) in FORMULAS.items()}
FEW = ("add", "erase", "keep norm", "zero heads", "set neurons", "an edge", "values", LATE)
CASES = [*FEW, *slow(*(what for what in EDITS if what not in FEW))]
CHANGES[LATE] = lambda rows: torch.cat([rows[:, :3], 0 * rows[:, 3:6], rows[:, 6:]], 1)


@contextmanager
def by_hand(what, name="llama"):
    """A plain copy whose modules or attention do what the edit ``what`` does."""
    model = copy.deepcopy(tiny(name)).requires_grad_(False)
    model.config._attn_implementation = "eager"
    with ExitStack() as stack:
        if what in EDGES:
            stack.enter_context(changed_attention(model, EDGES[what]))
        elif what in CHANGES:
            hooked(model, EDITS[what], CHANGES[what])
        yield model


def hooked(model, own, change):
    layer = model_places(copy.deepcopy(model))[max(own.layer, 0)]
    into = {"head": layer.reader, "neuron": layer.down}.get(own.part)
    into = layer.layer if own.layer < 0 else into
    if into:
        return model.get_submodule(into).register_forward_pre_hook(
            lambda _, args: (change(args[0]), *args[1:])
        )
    out = {"attn": layer.attn.name, "mlp": layer.mlp.name, "resid": layer.layer}[own.part]
    return model.get_submodule(out).register_forward_hook(
        lambda _m, _a, y: (change(y[0]), *y[1:]) if isinstance(y, tuple) else change(y)
    )


@contextmanager
def changed_attention(model, own):
    module = sys.modules[type(model).__module__]
    eager = module.eager_attention_forward

    def changed(layer, query, key, value, mask, **options):
        if layer.layer_idx == LAYER:
            states = {"q": query, "k": key, "v": value}
            mask = mask.expand(-1, query.shape[1], -1, -1).clone()
            for row in ranges(own.positions, query.shape[2]):
                for head in own.units:
                    if own.do == "block":
                        mask[:, head, row, ranges(own.keys, COUNT)] = torch.finfo(mask.dtype).min
                        continue
                    part = "q" if own.do == "temper" else own.part
                    by = 1 / own.by if own.do == "temper" else own.by
                    at = torch.ones_like(states[part])
                    at[0, head, row] = by
                    states[part] = states[part] * at
            query, key, value = states.values()
        return eager(layer, query, key, value, mask, **options)

    module.eager_attention_forward = changed
    try:
        yield
    finally:
        module.eager_attention_forward = eager


def logits_of(model, ids=PROMPT, embeds=None):
    with ExitStack() as stack:
        if embeds is not None:
            handle = model.get_input_embeddings().register_forward_hook(lambda *_: embeds[None])
            stack.callback(handle.remove)
        ids = torch.tensor([ids])
        return model(ids, use_cache=False, output_attentions=embeds is None)


def edited(watched, what):
    return watched.inspector.edited(plan(EDITS[what], identity=what))


# -- the parts of a logit


@pytest.mark.parametrize("what", CASES)
def test_the_parts_of_an_edited_logit_add_up_and_the_edit_is_one_of_them(watch, what):
    watched, own = watch("llama"), EDITS[what]
    with by_hand(what) as model, torch.no_grad():
        logits = logits_of(model).logits[0, -1]
        taken = {}
        layer = model.model.layers[LAYER]
        for name, module in {"o": layer.self_attn.o_proj, "mlp": layer.mlp}.items():
            module.register_forward_hook(lambda _m, a, y, n=name: taken.update({n: (a[0], y)}))
        model.model.norm.register_forward_hook(lambda _m, a, _y: taken.update(last=a[0]))
        logits_of(model)
    moves = own.part not in ("weights", "q", "k", "v") and what != LATE
    for by in ("layer", "head", "neuron", "source"):
        question = LogitPartsQuestion(position=LAST, token_id=5, by=by)
        result = watched.run(edited(watched, what).logit_parts(PROMPT, question))
        assert result.model_logit == pytest.approx(float(logits[5]), abs=1e-4)
        total = sum(share.value for share in result.shares) + result.constant
        assert total == pytest.approx(float(logits[5]), abs=1e-4)
        assert abs(result.rounding) < 1e-5
        edits = [share for share in result.shares if share.part == "edit"]
        assert [(each.layer, each.of) for each in edits] == [(own.layer, own.part)] * moves
        if what == "add":
            scale = model.model.norm.weight / (taken["last"][0, -1].square().mean() + 1e-6).sqrt()
            right = float(torch.tensor(VECTOR) @ (model.lm_head.weight[5] * scale))
            assert edits[0].value == pytest.approx(right, abs=1e-4)
    sources = [share for share in result.shares if share.part == "source" and share.layer == LAYER]
    if what == "an edge":
        blocked = [share.value for share in sources if 4 <= share.position < 7]
        assert blocked == [0] * 3 * 4


def test_a_silenced_part_has_its_share_taken_back_by_the_edit(watch):
    """Alone, and where an answer is written, beside what is read at once."""
    watched = watch("llama")
    for what, part in (("zero mlp", "mlp"), ("zero heads", "head")):
        by = "head" if part == "head" else "layer"
        question = LogitPartsQuestion(position=LAST, token_id=5, by=by)
        result = watched.run(edited(watched, what).logit_parts(PROMPT, question))
        units = EDITS[what].units or (-1,)
        taken = [
            share.value
            for share in result.shares
            if (share.part, share.layer) == (part, LAYER) and share.index in units
        ]
        (back,) = [share.value for share in result.shares if share.part == "edit"]
        assert back == pytest.approx(-sum(taken), abs=1e-6)
        assert abs(back) > 1e-4


@pytest.mark.parametrize(
    ("what", "native"),
    [
        *(("add to the embedding", True), ("zero heads", False), ("set neurons", True)),
        *slow(("add", True), ("add", False), ("zero heads", True), ("set neurons", False)),
    ],
)
def test_a_written_token_has_the_same_parts_with_the_edit_among_them(watch, what, native):
    watched = watch("llama", **({} if native else {"native": None}))
    for by in ("layer", "head"):
        traced = TracePlan(parts=LogitPartsQuestion(position=-1, by=by))
        own = plan(EDITS[what], identity=what)
        (outputs,) = written(watched.engine, [PROMPT], [traced], own)
        ids = list(PROMPT)
        for output in outputs:
            told = output.extras["trace"].parts
            question = LogitPartsQuestion(position=len(ids) - 1, token_id=output.token_id, by=by)
            right = watched.run(edited(watched, what).logit_parts(ids, question))
            keys = [
                [(s.part, s.layer, s.index, s.of) for s in each.shares] for each in (told, right)
            ]
            assert keys[0] == keys[1]
            assert [share.value for share in told.shares] == pytest.approx(
                [share.value for share in right.shares], abs=1e-4
            )
            assert abs(told.rounding) < 1e-4
            ids.append(output.token_id)


# -- attributions


@pytest.mark.parametrize("what", CASES)
def test_attributions_of_an_edited_text_are_those_of_the_edited_model(watch, what):
    watched, ids = watch("llama"), PROMPT
    inspector = edited(watched, what)

    def ask(method, **fields):
        question = AttributionQuestion(position=LAST, token_id=5, method=method, **fields)
        return watched.run(inspector.attribute(ids, question))

    with by_hand(what) as model:
        embeds = model.get_input_embeddings()(torch.tensor(ids)).detach()
        with torch.no_grad():
            value = logits_of(model, ids, embeds).logits[0, -1].log_softmax(-1)[5]
            away = embeds.clone()
            away[4] = model.get_input_embeddings().weight.mean(0)
            other = logits_of(model, ids, away).logits[0, -1].log_softmax(-1)[5]
        leaf = embeds.clone().requires_grad_()
        own = logits_of(model, ids, leaf).logits[0, -1].log_softmax(-1)[5]
        (gradient,) = torch.autograd.grad(own, leaf)
    occluded = ask("occlusion", groups=((4,),))
    assert occluded.value == pytest.approx(float(value), abs=1e-4)
    assert occluded.scores[4] == pytest.approx(float(value - other), abs=1e-4)
    scores = ask("gradient_x_input").scores
    right = (gradient * embeds).sum(-1).numpy()
    assert numpy.allclose(scores, right, rtol=1e-3, atol=1e-4)
    path = ask("integrated_gradients", baseline="zero", steps=2)
    assert path.value == pytest.approx(float(value), abs=1e-4)


def test_a_feature_has_no_gradient_and_can_be_occluded(watch):
    watched = watch("llama")
    feature = FeatureEdit(sae=sae(layer=LAYER), number=3, value=9.0)
    inspector = watched.inspector.edited(plan(edit(do="feature", feature=feature)))
    occlusion = AttributionQuestion(position=LAST, token_id=5)
    own = watched.run(inspector.attribute(PROMPT, occlusion))
    plain = watched.run(watched.inspector.attribute(PROMPT, occlusion))
    assert numpy.isfinite(own.scores).all()
    assert abs(own.value - plain.value) > 1e-3
    for method in ("gradient_x_input", "integrated_gradients"):
        with pytest.raises(ModelNotCapable, match="an edit of a feature has no gradient"):
            watched.run(inspector.attribute(PROMPT, replace(occlusion, method=method)))
    grid = GridQuestion(part="mlp", cells=[Cell(0)], method="gradient")
    with pytest.raises(ModelNotCapable, match="an edit of a feature has no gradient"):
        watched.run(inspector.grid(PROMPT, grid))


# -- grids and rollout


@pytest.mark.parametrize("what", ["add", "zero heads", "an edge", "values", LATE])
def test_grids_change_the_edited_model(watch, what):
    watched = watch("llama")
    inspector, own = edited(watched, what), plan(EDITS[what], identity="the donor's")
    patched = {"part": "resid", "cells": [Cell(2, 5), Cell(0, LAST)], "answer": 5, "against": 7}
    with by_hand(what) as model, torch.no_grad():
        streams, logits = {}, {}
        for at in (0, 2):
            model.model.layers[at].register_forward_hook(
                lambda _m, _a, y, at=at: streams.update({at: y})
            )
        donor = logits_of(model).logits[0, -1]
        donated = dict(streams)
        plain = logits_of(model, OTHER).logits[0, -1]
        for at, place in ((2, 5), (0, LAST)):

            def put(_m, _a, y, at=at, place=place):
                y = y.clone()
                y[:, place] = donated[at][:, place]
                return y

            handle = model.model.layers[at].register_forward_hook(put)
            logits[at] = logits_of(model, OTHER).logits[0, -1]
            handle.remove()
        handle = model.model.layers[2].mlp.register_forward_hook(lambda _m, _a, y: 0 * y)
        without = logits_of(model).logits[0, -1]
        handle.remove()
    grid = watched.run(inspector.grid(OTHER, GridQuestion(donor=PROMPT, donor_plan=own, **patched)))
    rights = [logits[2], logits[0], plain, donor]
    values = [*grid.values, grid.plain, grid.donor]
    assert values == pytest.approx([float(each[5] - each[7]) for each in rights], abs=1e-4)
    unedited = GridQuestion(donor=PROMPT, **patched)
    bare = watched.run(watched.inspector.grid(OTHER, unedited)).donor
    assert watched.run(inspector.grid(OTHER, unedited)).donor == pytest.approx(bare, abs=1e-5)
    ablated = GridQuestion(part="mlp", cells=[Cell(2), Cell(1)], answer=5, metric="logprob")
    cells = watched.run(inspector.grid(PROMPT, ablated)).values
    assert cells[0] == pytest.approx(float(without.log_softmax(-1)[5]), abs=1e-4)
    guess = watched.run(inspector.grid(PROMPT, replace(ablated, method="gradient")))
    assert guess.plain == pytest.approx(float(donor.log_softmax(-1)[5]), abs=1e-4)
    assert numpy.isfinite(guess.values).all()


def test_rollout_follows_attention_as_it_was_cut(watch):
    watched = watch("llama")
    with by_hand("an edge") as model, torch.no_grad():
        attentions = logits_of(model).attentions
    right = torch.eye(COUNT)
    for layer in range(LAYER + 1):
        right = (attentions[layer][0].mean(0) / 2 + torch.eye(COUNT) / 2) @ right
    result = watched.run(edited(watched, "an edge").rollout(PROMPT, (0, LAYER), False))
    assert numpy.allclose(result, right.numpy(), atol=1e-5)
