"""The store of vectors: bounded, each owner's own, fair."""

from __future__ import annotations

import numpy
import pytest

from transformers_api.errors import NotFound, PayloadTooLarge
from transformers_api.serving.inspect.vector_derivation import derive
from transformers_api.serving.inspect.vector_store import Vector, VectorStore


def vector(width=4, layers=None, fill=1.0):
    rows = numpy.full((1 if layers is None else len(layers), width), fill, numpy.float32)
    return Vector(rows=rows, layers=layers, source="json")


def test_vectors_are_their_owners_alone():
    store = VectorStore()
    assert store.put("one", "calm", vector())
    assert store.put("other", "calm", vector(width=8))
    assert not store.put("one", "calm", vector(width=2))
    assert store.get("one", "calm").width == 2
    assert store.get("other", "calm").width == 8
    store.delete("one", "calm")
    with pytest.raises(NotFound, match="No vector 'calm' in the store; it is empty"):
        store.get("one", "calm")
    assert list(store.of("other")) == ["calm"]


def test_one_too_many_is_refused_and_none_is_dropped_for_it():
    store = VectorStore(most=2)
    store.put("one", "a", vector())
    store.put("one", "b", vector())
    with pytest.raises(PayloadTooLarge, match=r"There are 2 vectors \(max 2\); delete one"):
        store.put("one", "c", vector())
    store.put("one", "b", vector(width=2))
    with pytest.raises(NotFound, match="No vector 'c' in the store; there are: a, b"):
        store.get("one", "c")


def test_an_owners_bytes_are_bounded_and_what_takes_anothers_place_frees_its_own():
    store = VectorStore(most_bytes=1000)
    store.put("one", "a", vector(width=200))
    store.put("one", "a", vector(width=250))
    with pytest.raises(PayloadTooLarge, match=r"would take 1004 bytes \(max 1000\)"):
        store.put("one", "b", vector(width=1))


def test_where_all_take_too_much_who_has_most_loses_what_was_used_least():
    store = VectorStore(most_bytes=1000)
    for name in ("a", "b", "c"):
        store.put("large", name, vector(width=70))
    store.put("small", "own", vector(width=20))
    store.get("large", "a")
    store.put("new", "own", vector(width=30))
    assert list(store.of("large")) == ["a", "c"]
    assert list(store.of("small")) == list(store.of("new")) == ["own"]


def test_a_direction_is_that_of_its_layer_or_of_any():
    assert (vector().at(17) == 1).all()
    rows = vector(layers=(2, 5))
    assert rows.at(3) is None
    assert (rows.at(5) == 1).all()


def test_cosines_are_over_the_layers_of_both():
    one = vector(layers=(1, 2))
    assert one.cosine(vector(layers=(2, 3), fill=-2.0)) == pytest.approx(-1)
    assert one.cosine(vector()) == pytest.approx(1)
    assert vector().cosine(one) == pytest.approx(1)
    assert one.cosine(vector(layers=(3,))) is None
    assert one.cosine(vector(width=5)) is None
    assert one.cosine(vector(layers=(1,), fill=0.0)) == 0


@pytest.mark.parametrize("method", ["mean", "pca"])
def test_a_layer_that_knows_the_difference_separates_and_noise_does_not(method):
    random = numpy.random.default_rng(0)
    positive, negative = random.normal(size=(2, 40, 4, 16)).astype(numpy.float32)
    direction = random.normal(size=16)
    size = random.uniform(1, 5, size=(40, 1))  # so that it is what varies, too
    positive[:, 2] += size * direction
    derived = derive(positive, negative, [3, 4, 5, 6], method)
    row = derived.rows[2]
    cosine = row @ direction / numpy.linalg.norm(row) / numpy.linalg.norm(direction)
    assert cosine > 0.95
    assert derived.separation[2] > 0.95
    assert abs(derived.separation[[0, 1, 3]] - 0.5).max() < 0.25
    assert derived.window[0] <= 5 <= derived.window[1]
    along = positive[:, 2].mean(axis=0) - negative[:, 2].mean(axis=0)
    assert derived.gap[2] == pytest.approx(along @ row / numpy.linalg.norm(row), rel=1e-5)


@pytest.mark.parametrize(
    ("layers", "window"), [(30, (13, 15)), (7, (2, 4)), (4, (0, 2)), (2, (0, 1))]
)
def test_of_layers_that_tell_equally_well_those_in_the_middle_are_the_best(layers, window):
    positive = numpy.ones((3, layers, 4), numpy.float32)
    assert derive(positive, -positive, range(layers), "mean").window == window


def test_a_principal_component_is_that_of_the_singular_values():
    random = numpy.random.default_rng(1)
    for pairs, width, size in ((3, 40, 1.0), (40, 3, 1e-30), (9, 9, 1e30)):
        positive = (random.normal(size=(pairs, 1, width)) * size).astype(numpy.float32)
        row = derive(positive, positive * 0, [0], "pca").rows[0]
        centred = positive[:, 0].astype(float) - positive[:, 0].astype(float).mean(axis=0)
        expected = numpy.linalg.svd(centred, full_matrices=False)[2][0]
        assert abs(row @ expected) == pytest.approx(1, abs=1e-6)


def test_a_derivation_ends_where_it_is_told_to():
    checks = iter(range(50))

    def check():
        if next(checks) == 40:
            raise TimeoutError

    streams = numpy.random.default_rng(0).normal(size=(2, 20, 3, 4)).astype(numpy.float32)
    with pytest.raises(TimeoutError):
        derive(*streams, [0, 1, 2], "pca", check)
