"""Pictures of matrices: cells, words, a scale."""

from __future__ import annotations

import io

import numpy
import pytest
from PIL import Image

from transformers_api.serving.inspect import picture


def opened(raw: bytes) -> numpy.ndarray:
    image = Image.open(io.BytesIO(raw))
    assert (image.format, image.mode) == ("PNG", "L")
    return numpy.asarray(image)


def test_one_pixel_a_cell_shows_square_roots():
    weights = numpy.array([[1, 0.25, 0], [0.01, numpy.nan, 2]], numpy.float32)
    assert opened(picture.draw(weights, 1)).tolist() == [[255, 128, 0], [26, 0, 255]]


@pytest.mark.parametrize(
    ("height", "width", "asked", "size"),
    [
        (2, 2, None, 64),  # the largest cell
        (11, 11, None, 47),
        (600, 40, None, 1),
        (11, 11, 20, 20),
        (500, 11, 64, 8),  # no picture is larger than 4096
        (5000, 5000, None, 1),
        (0, 0, None, 64),
    ],
)
def test_cells_are_as_large_as_can_be_seen(height, width, asked, size):
    assert picture.cell_size(height, width, asked) == size


def test_words_and_a_scale_stand_beside_the_cells():
    weights = numpy.tril(numpy.full((3, 3), 0.25, numpy.float32))
    words = ["<|im_start|>", "␠東京", "a" * 300]
    plain = opened(picture.draw(weights, 20))
    shown = opened(picture.draw(weights, 20, words, words))
    assert plain.shape == (60, 60)
    height, width = shown.shape
    left = 2 * picture.GAP + picture.LABEL
    assert left > 60
    assert height > 60 + 60
    at = next(
        (y, x)
        for y in range(height - 60)
        for x in range(width - 60)
        if (shown[y : y + 60, x : x + 60] == plain).all()
    )
    beside = shown[at[0] : at[0] + 60, : at[1]]
    for row in range(3):
        assert (beside[20 * row : 20 * row + 20] < 128).any(), row  # its word
    below = shown[at[0] + 60 :]
    assert set(numpy.unique(below)) >= {0, 64, 129, 255}  # the ramp has every grey


def test_cells_without_room_have_no_words():
    weights = numpy.ones((4, 4), numpy.float32)
    assert opened(picture.draw(weights, 8, ["a"] * 4, ["b"] * 4)).shape == (32, 32)
