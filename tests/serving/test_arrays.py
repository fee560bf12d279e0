"""Arrays on the wire: what a client makes of them again."""

import base64
import io
import json

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes
from hypothesis.extra.numpy import arrays as numpy_arrays

from transformers_api.serving.inspect import arrays

WEIGHTS = numpy_arrays(
    numpy.float32,
    array_shapes(min_dims=2, max_dims=3, max_side=9),
    elements=st.floats(0, 1, width=32),
)


def unpack(envelope):
    """As the documents tell a client to."""
    raw = base64.b64decode(envelope["data"])
    values = numpy.frombuffer(raw, {"float16": "<f2", "uint8": "u1"}[envelope["dtype"]])
    values = values.reshape(envelope["shape"]).astype(numpy.float64)
    if envelope["dtype"] == "uint8":
        scale = numpy.array(envelope["scale"]).reshape(*envelope["shape"][:-1], 1)
        values = values / 255 * scale
    return values


@given(WEIGHTS)
def test_float16_keeps_three_digits(weights):
    envelope = arrays.float16(weights)
    assert (envelope["order"], envelope["encoding"]) == ("C", "base64")
    numpy.testing.assert_allclose(unpack(envelope), weights, rtol=2**-11, atol=2**-25)


@given(WEIGHTS)
def test_uint8_is_off_by_at_most_half_a_step_of_its_row(weights):
    envelope = arrays.uint8(weights)
    most = weights.max(axis=-1, keepdims=True).astype(numpy.float64)
    assert (numpy.abs(unpack(envelope) - weights) <= most * (1 / 510 + 1e-6) + 1e-38).all()


def test_uint8_has_one_scale_per_row_and_small_rows_keep_their_detail():
    envelope = arrays.uint8(numpy.array([[1.0, 0.5], [0.001, 0.0005], [0, 0]], numpy.float32))
    assert envelope["scale"] == [1.0, 0.001, 0.0]
    assert unpack(envelope)[1] == pytest.approx([0.001, 0.0005], rel=0.01)
    assert unpack(envelope)[2].tolist() == [0, 0]


@pytest.mark.parametrize("pack", [arrays.float16, arrays.uint8])
def test_the_order_does_not_depend_on_how_the_array_lies_in_memory(pack):
    weights = numpy.linspace(0, 1, 12, dtype=numpy.float32).reshape(3, 4)
    assert pack(numpy.asfortranarray(weights)) == pack(weights)
    assert pack(weights.T)["shape"] == [4, 3]


def test_an_empty_array_has_an_envelope():
    assert arrays.uint8(numpy.zeros((2, 0), numpy.float32))["data"] == ""
    assert arrays.float16(numpy.zeros((2, 0), numpy.float32))["shape"] == [2, 0]


def test_rows_have_five_decimals_and_null_for_what_there_is_not():
    values = numpy.array([[0.1234567, numpy.nan], [1e-6, 1]], numpy.float32)
    assert arrays.rounded(values) == [[0.12346, None], [0.0, 1.0]]


@given(WEIGHTS)
def test_exact_rows_are_the_same_to_the_last_bit(weights):
    again = numpy.array(json.loads(json.dumps(arrays.exact(weights))), numpy.float32)
    assert again.tobytes() == weights.tobytes()


@given(WEIGHTS)
def test_the_shortest_digits_are_the_same_float32(weights):
    assert numpy.array(arrays.shortest(weights), numpy.float32).tolist() == weights.ravel().tolist()


@pytest.mark.parametrize("how", ["max", "mean"])
def test_pooled_cells_are_those_that_fall_together(how):
    values = numpy.arange(5 * 7, dtype=numpy.float32).reshape(5, 7)
    pooled = arrays.pool(values, 2, 3, how)
    reduce = getattr(numpy, how)
    assert pooled.tolist() == [
        [pytest.approx(reduce(values[r0:r1, c0:c1])) for c0, c1 in ((0, 2), (2, 4), (4, 7))]
        for r0, r1 in ((0, 2), (2, 5))
    ]


def test_pooling_keeps_the_axes_before_and_never_enlarges():
    values = numpy.ones((2, 3, 5, 5), numpy.float32)
    assert arrays.pool(values, 2, 2, "mean").shape == (2, 3, 2, 2)
    assert arrays.pool(values, 9, 2, "max").shape == (2, 3, 5, 2)
    assert arrays.pool(values, 2, 2, "mean").tolist() == numpy.ones((2, 3, 2, 2)).tolist()


def test_numpy_opens_the_npz_without_pickles():
    weights = numpy.random.default_rng(1).random((2, 3, 3)).astype(numpy.float16)
    meta = {"layer": 3, "tokens": ["é", "世"]}
    raw = arrays.npz({"attn": weights, "token_ids": numpy.array([1, 2], numpy.int32)}, meta)
    with numpy.load(io.BytesIO(raw), allow_pickle=False) as file:
        assert sorted(file.files) == ["attn", "meta", "token_ids"]
        assert file["attn"].tobytes() == weights.tobytes()
        assert file["token_ids"].dtype == numpy.int32
        assert json.loads(file["meta"].tobytes()) == meta


def test_small_and_large_numbers_have_six_digits():
    numbers = numpy.array([0, 1.23456789e-7, -123456.789, numpy.nan, 0.3], numpy.float32)
    assert arrays.significant(numbers) == [0, 1.23457e-07, -123457.0, None, 0.3]
    assert arrays.digits(0.000012345678) == 1.23457e-05
