"""Attention of given tokens, against the models' own eager way of computing it."""

from __future__ import annotations

import numpy
import pytest

from tests.engine.models import prompts_of
from tests.inspection.test_trace import CLOSE, SHOWN, generate, written_out
from transformers_api.errors import AttentionUnavailable, PromptTooLarge
from transformers_api.inspection.matrices import check_rollout

IDS = [*prompts_of(6)[5], 11, 12, 13, 14]  # 31 tokens: four chunks of eight, the last one short
EVERY_LAYER = ["llama", "gpt2", "mistral-window-8", "gemma2", "bloom-alibi", "falcon"]


def whole(watched, layer, heads="all", ids=IDS):
    count = len(ids)
    return watched.run(watched.inspector.attention(ids, layer, heads, (0, count), (0, count)))


@pytest.mark.parametrize("name", [*SHOWN, "falcon"])
def test_matrices_are_those_of_eager_attention(watch, name):
    watched = watch(name)
    layers = watched.examined.anatomy.layers_with_attention
    expected = dict(zip(layers, written_out(name, IDS), strict=True))
    for layer in layers:
        window = whole(watched, layer)
        numpy.testing.assert_allclose(window.weights, expected[layer], atol=CLOSE)
        assert not numpy.triu(window.weights[0], 1).any()


def test_a_window_is_a_part_of_the_whole(watch):
    watched = watch("llama")
    expected = whole(watched, 1).weights
    for rows, cols in [
        ((0, 3), (0, 31)),
        ((6, 27), (4, 12)),
        ((30, 31), (30, 31)),
        ((2, 9), (9, 20)),
    ]:
        job = watched.inspector.attention(IDS, 1, 2, rows, cols)
        window = watched.run(job)
        wanted = expected[2:3, rows[0] : rows[1], cols[0] : cols[1]]
        numpy.testing.assert_allclose(window.weights, wanted, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "max"])
def test_heads_can_be_reduced_to_one_matrix(watch, reduction):
    watched = watch("qwen3")
    expected = getattr(whole(watched, 0).weights, reduction)(0, keepdims=True)
    numpy.testing.assert_allclose(whole(watched, 0, reduction).weights, expected, atol=1e-6)


@pytest.mark.parametrize("heads", ["all", 1, "mean"])
def test_sinks_are_told_beside_the_rows(watch, heads):
    watched = watch("gpt-oss-sinks")
    assert all(layer.sinks for layer in watched.examined.anatomy.attention)
    window = whole(watched, 1, heads)
    assert window.sink.shape == window.weights.shape[:2]
    assert window.sink.min() > 0
    numpy.testing.assert_allclose(window.weights.sum(-1) + window.sink, 1, atol=CLOSE)


def test_a_sliding_window_shows_nothing_before_it(watch):
    watched = watch("mistral-window-8")
    weights = whole(watched, 0).weights
    queries, keys = numpy.indices(weights.shape[1:])
    assert not weights[:, queries - keys >= 8].any()
    numpy.testing.assert_allclose(weights.sum(-1), 1, atol=CLOSE)


@pytest.mark.parametrize("name", [*EVERY_LAYER, "qwen3-next", "gpt-oss-sinks"])
def test_the_grid_tells_of_every_head_what_its_matrix_tells(watch, name):
    watched = watch(name)
    anatomy = watched.examined.anatomy
    count = len(IDS)
    grid = watched.run(watched.inspector.heads(IDS, 8))
    assert grid.entropy.shape == (anatomy.layers, anatomy.heads)
    assert grid.thumbs.shape == (anatomy.layers, anatomy.heads, 8, 8)
    queries, keys = numpy.indices((count, count))
    expected = dict(zip(anatomy.layers_with_attention, written_out(name, IDS), strict=True))
    for layer in range(anatomy.layers):
        if layer not in expected:
            assert numpy.isnan(grid.entropy[layer]).all()
            assert numpy.isnan(grid.thumbs[layer]).all()
            continue
        p = expected[layer].astype(numpy.float64)
        entropy = -(p * numpy.log(numpy.where(p > 0, p, 1))).sum((-1, -2)) / count
        close = {"atol": 1e-4, "rtol": 1e-4}
        numpy.testing.assert_allclose(grid.entropy[layer], entropy, **close)
        distance = (p * abs(queries - keys)).sum((-1, -2)) / count
        numpy.testing.assert_allclose(grid.distance[layer], distance, **close)
        numpy.testing.assert_allclose(grid.first[layer], p[:, :, 0].mean(-1), **close)
        before = p[:, range(1, count), range(count - 1)].sum(-1) / count
        numpy.testing.assert_allclose(grid.previous[layer], before, **close)
        own = p[:, range(count), range(count)].mean(-1)
        numpy.testing.assert_allclose(grid.itself[layer], own, **close)
        cells = numpy.arange(count) * 8 // count
        shares = (cells[:, None] == numpy.arange(8)) / numpy.bincount(cells)
        numpy.testing.assert_allclose(grid.thumbs[layer], shares.T @ p @ shares, **close)
    if name == "gpt-oss-sinks":
        assert (grid.sink > 0).all()
    else:
        assert grid.sink is None


def test_a_short_text_has_pictures_of_its_own_size(watch):
    watched = watch("llama")
    grid = watched.run(watched.inspector.heads(IDS[:5], 32))
    numpy.testing.assert_allclose(grid.thumbs[0], whole(watched, 0, ids=IDS[:5]).weights, atol=1e-6)
    assert watched.run(watched.inspector.heads(IDS[:5], 0)).thumbs is None


@pytest.mark.parametrize("name", EVERY_LAYER)
def test_rollout_is_the_product_over_the_layers(watch, name):
    watched = watch(name)
    expected = numpy.eye(len(IDS))
    for weights in written_out(name, IDS):
        expected = (0.5 * weights.mean(0) + 0.5 * numpy.eye(len(IDS))) @ expected
    layers = (0, watched.inspector.anatomy.layers - 1)
    given = watched.run(watched.inspector.rollout(IDS, layers, False))
    numpy.testing.assert_allclose(given, expected, atol=CLOSE)
    numpy.testing.assert_allclose(given.sum(-1), 1, atol=1e-4)


def test_rollout_of_some_layers_that_reads_nothing_from_the_first_token(watch):
    watched = watch("llama")
    matrices = written_out("llama", IDS)
    expected = numpy.eye(len(IDS))
    for weights in matrices[1:]:
        mean = weights.mean(0).astype(numpy.float64)
        mean[1:, 0] = 0  # the first token has nothing else to read from
        mean /= mean.sum(-1, keepdims=True)
        expected = (0.5 * mean + 0.5 * numpy.eye(len(IDS))) @ expected
    given = watched.run(watched.inspector.rollout(IDS, (1, len(matrices) - 1), True))
    numpy.testing.assert_allclose(given, expected, atol=CLOSE)
    assert (given[1:, 0] == 0).all()


def test_rollout_needs_attention_in_each_of_its_layers(watch):
    inspector = watch("qwen3-next").inspector
    with pytest.raises(AttentionUnavailable, match="1 of 4 have it"):
        inspector.rollout(IDS, (0, 3), False)
    (attending,) = inspector.anatomy.layers_with_attention
    inspector.rollout(IDS, (attending, attending), False)


def test_rollout_of_a_text_that_is_too_long_is_refused():
    check_rollout(2048, 30, 30)
    with pytest.raises(PromptTooLarge, match=r"2200 tokens \(max 2115\)"):
        check_rollout(2200, 30, 30)


def test_a_layer_without_attention_is_refused(watch):
    inspector = watch("qwen3-next").inspector
    with pytest.raises(AttentionUnavailable, match="layer 0 has no attention weights"):
        inspector.attention(IDS, 0, 0, (0, 1), (0, 1))


def test_others_are_answered_between_two_slices(watch):
    watched = watch("llama")
    job = watched.inspector.heads(IDS, 8)
    generator = watched.engine.call(job).result()
    slices = 0
    while True:
        try:
            watched.engine.call(lambda _model: next(generator)).result()
        except StopIteration:
            break
        slices += 1
    assert slices == 4


def test_nothing_is_watched_between_two_slices(watch):
    """What is generated meanwhile is not taken for a part of the text that is looked at."""
    watched = watch("llama")
    expected = watched.run(watched.inspector.heads(IDS, 8))
    generator = watched.engine.call(watched.inspector.heads(IDS, 8)).result()
    while True:
        try:
            watched.engine.call(lambda _model: next(generator)).result()
        except StopIteration as end:
            given = end.value
            break
        generate(watched.engine, prompts_of(2), max_tokens=2)
    numpy.testing.assert_allclose(given.entropy, expected.entropy, atol=1e-6)
