"""Grids of changes, each cell against a forward pass with a hook of the test's own."""

from __future__ import annotations

import pytest
import torch

from tests.engine.models import prompts_of
from tests.inspection.models import tiny
from tests.repeats import slow
from transformers_api.errors import InvalidRequest, ModelNotCapable, PromptTooLarge
from transformers_api.inspection.grid_question import Cell, GridQuestion, Noise

CLEAN = prompts_of(4)[3]  # 17 tokens: three slices of 8
CORRUPT = [*CLEAN[:5], (CLEAN[5] + 3) % 60, *CLEAN[6:]]
LAYERS, PLACES = (0, 2), (4, 5, 16)


def ask(watched, ids, **question):
    return watched.run(watched.inspector.grid(ids, GridQuestion(**question)))


def last_logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0, -1].float()


def module_of(model, layer, part):
    own = model.model.layers[layer]
    return {"resid": own, "attn": own.self_attn, "mlp": own.mlp, "head": own.self_attn.o_proj}[part]


def by_hand(model, part, cell, donor):
    """The logits after a change that a hook makes."""
    module, kept = module_of(model, cell.layer, part), {}
    is_input = part == "head"

    def note(_module, args, output):
        kept["rows"] = args[0] if is_input else output[0] if isinstance(output, tuple) else output

    def change(rows):
        rows = rows.clone()
        at = slice(None) if cell.position is None else cell.position
        size = rows.shape[-1] // model.config.num_attention_heads
        columns = slice(None)
        if cell.head is not None:
            columns = slice(cell.head * size, (cell.head + 1) * size)
        rows[:, at, columns] = kept["rows"][:, at, columns] if donor else 0
        return rows

    handle = module.register_forward_hook(note)
    last_logits(model, donor or CLEAN)
    handle.remove()
    if is_input:
        handle = module.register_forward_pre_hook(lambda _, args: (change(args[0]),))
    else:
        handle = module.register_forward_hook(
            lambda _, __, made: (
                (change(made[0]), *made[1:]) if isinstance(made, tuple) else change(made)
            )
        )
    logits = last_logits(model, CORRUPT if donor else CLEAN)
    handle.remove()
    return logits


@pytest.mark.parametrize("part", ["resid", "attn", "mlp", "head"])
@pytest.mark.parametrize("name", ["llama", *slow("qwen3", "gemma2")])
def test_a_patched_cell_is_the_pass_with_that_one_change(watch, name, part):
    model = tiny(name)
    cells = [Cell(layer, place) for layer in LAYERS for place in PLACES]
    if part == "head":
        cells = [Cell(layer, head=head) for layer in LAYERS for head in range(4)]
    grid = ask(watch(name), CORRUPT, part=part, cells=cells, donor=CLEAN, answer=5, against=7)
    assert (grid.answer, grid.against) == (5, 7)
    for value, cell in zip(grid.values, cells, strict=True):
        logits = by_hand(model, part, cell, CLEAN)
        assert value == pytest.approx(float(logits[5] - logits[7]), abs=1e-4)
    for value, ids in ((grid.plain, CORRUPT), (grid.donor, CLEAN)):
        logits = last_logits(model, ids)
        assert value == pytest.approx(float(logits[5] - logits[7]), abs=1e-4)


@pytest.mark.parametrize("part", ["attn", "mlp", "head"])
def test_an_ablated_cell_is_the_pass_with_zeros_there(watch, part):
    model = tiny("llama")
    cells = [Cell(layer) for layer in LAYERS]
    if part == "head":
        cells = [Cell(layer, head=head) for layer in LAYERS for head in range(4)]
    grid = ask(watch("llama"), CLEAN, part=part, cells=cells, metric="logprob")
    for value, cell in zip(grid.values, cells, strict=True):
        scores = by_hand(model, part, cell, None).log_softmax(-1)
        assert value == pytest.approx(float(scores[grid.answer]), abs=1e-4)
    assert grid.answer == int(last_logits(model, CLEAN).argmax())


def test_the_last_layer_patched_at_the_last_position_is_the_clean_prompt(watch):
    grid = ask(watch("llama"), CORRUPT, part="resid", cells=[Cell(2, 16)], donor=CLEAN, answer=5)
    assert grid.values[0] == pytest.approx(grid.donor, abs=1e-5)


def test_a_prompt_patched_with_itself_is_as_it_was(watch):
    cells = [Cell(layer, place) for layer in LAYERS for place in PLACES]
    grid = ask(watch("llama"), CLEAN, part="resid", cells=cells, donor=CLEAN)
    assert grid.values == pytest.approx(grid.plain, abs=1e-5)
    assert grid.against is None


def test_what_cannot_be_is_refused(watch):
    cells = [Cell(0, 0), Cell(1, 0)]
    with pytest.raises(InvalidRequest, match="prompts have 16 and 17 tokens"):
        ask(watch("llama"), CORRUPT, part="resid", cells=cells, donor=CLEAN[:16])
    with pytest.raises(PromptTooLarge, match=r"A grid of 40 cells takes about .*up to \d+ cells"):
        ask(watch("llama"), CLEAN, part="attn", cells=cells * 20, within_s=1e-9)
    with pytest.raises(ModelNotCapable, match="has no mlp that can be changed"):
        ask(watch("mamba"), CLEAN, part="mlp", cells=cells)


NOISE = {"positions": (4, 5), "samples": 3, "seed": 7}
CELLS = [Cell(layer, place) for layer in LAYERS for place in PLACES]


def test_noise_is_drawn_on_the_embeddings_of_the_span_and_averaged(watch):
    model = tiny("llama")
    noise = Noise(size=2.0, **NOISE)
    grid = ask(watch("llama"), CLEAN, part="resid", cells=CELLS, donor=CLEAN, noise=noise, answer=5)
    with torch.no_grad():
        embeds = model.model.embed_tokens(torch.tensor([CLEAN])).float()
        shape = (3, 2, embeds.shape[-1])
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(7)) * 2 * embeds.std()
        own = embeds.repeat(3, 1, 1)
        own[:, [4, 5]] += drawn
        logits = model(inputs_embeds=own, use_cache=False).logits[:, -1].float()
    assert grid.against == int(logits.mean(0).argmax())
    assert grid.plain == pytest.approx(
        float((logits[:, 5] - logits[:, grid.against]).mean()), abs=1e-4
    )
    assert grid.values[-1] == pytest.approx(grid.donor, abs=1e-4)  # all of the last row is clean
    none = Noise(size=0.0, **NOISE)
    grid = ask(watch("llama"), CLEAN, part="resid", cells=CELLS, donor=CLEAN, noise=none)
    assert grid.values == pytest.approx(grid.donor, abs=1e-4)


@pytest.mark.parametrize("part", ["resid", "head", *slow("attn", "mlp")])
def test_a_guess_by_gradients_is_right_for_small_changes(watch, part):
    cells = CELLS
    if part == "head":
        cells = [Cell(layer, head=head) for layer in LAYERS for head in range(4)]
    fields = {"part": part, "cells": cells, "donor": CLEAN, "answer": 5, "against": 7}
    noise = Noise(size=0.05, **NOISE)
    exact = ask(watch("llama"), CLEAN, noise=noise, **fields)
    guess = ask(watch("llama"), CLEAN, noise=noise, method="gradient", **fields)
    changes = exact.values - exact.plain
    assert abs(changes).max() > 1e-5
    assert guess.values - guess.plain == pytest.approx(changes, abs=0.1 * float(abs(changes).max()))


def test_cells_alone_are_those_of_the_whole_grid(watch):
    whole = ask(watch("llama"), CORRUPT, part="resid", cells=CELLS, donor=CLEAN)
    rest = ask(
        watch("llama"),
        CORRUPT,
        part="resid",
        cells=CELLS[2:],
        donor=CLEAN,
        answer=whole.answer,
        against=whole.against,
        only_cells=True,
    )
    assert rest.values == pytest.approx(whole.values[2:], abs=1e-5)
    assert rest.plain != rest.plain
