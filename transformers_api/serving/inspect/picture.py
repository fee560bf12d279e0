"""A matrix as a picture for people: cells that can be seen, the tokens beside them, a scale."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import numpy
from numpy.typing import NDArray

from transformers_api.serving.inspect.arrays import Numbers

LARGEST_CELL = 64  # px
SEEN_FROM = 512  # px: the longer side, if no cell has to be larger for it
MOST = 4096  # px, cells alone
LABELLED_FROM = 9  # px: smaller cells have no room for a word
LABEL = 112  # px: of the longest word
FONT = 12  # px
GAP = 5  # px
SCALE = (128, 12)  # px
MARKS = (0.0, 0.25, 1.0)
WHITE = 255
UNKNOWN = "\uffff"  # a character that no font has
STAND_INS = str.maketrans({"␠": "·", "⏎": "\\n", "␍": "\\r", "⇥": "\\t"})  # which the font has


def cell_size(height: int, width: int, pixels: int | None = None) -> int:
    """The side of a cell in px: ``pixels``, else so that the picture can be seen; at least 1."""
    longest = max(height, width, 1)
    size = pixels or min(-(-SEEN_FROM // longest), LARGEST_CELL)
    return max(min(size, MOST // longest), 1)


def draw(
    weights: Numbers,
    cell: int,
    rows: Sequence[str] | None = None,
    cols: Sequence[str] | None = None,
) -> bytes:
    """A PNG of (R, C) weights from 0 to 1, cells of ``cell`` px, with the words beside them.

    Light is the square root of a weight, so that one of a hundredth can be seen; the scale
    says so. Without words it is the cells alone.
    """
    from PIL import Image, ImageDraw

    light = numpy.repeat(numpy.repeat(_light(weights), cell, 0), cell, 1)
    if rows is None or cols is None or cell < LABELLED_FROM:
        return _png(Image.fromarray(light))
    words = [[_drawable(word) for word in words] for words in (rows, cols)]
    left, above = (GAP * 2 + max(map(_width, each), default=0) for each in words)
    height, width = light.shape
    size = (max(left + width, SCALE[0] + 2 * LABEL), above + height + SCALE[1] + FONT + 4 * GAP)
    image = Image.new("L", size, WHITE)
    image.paste(Image.fromarray(light), (left, above))
    pen = ImageDraw.Draw(image)
    for row, word in enumerate(words[0]):
        place = (left - GAP, above + row * cell + cell // 2)
        pen.text(place, word, fill=0, font=_font(), anchor="rm")
    for column, word in enumerate(words[1]):
        upright = Image.new("L", (_width(word) + 1, FONT + GAP), WHITE)
        ImageDraw.Draw(upright).text((0, FONT), word, fill=0, font=_font(), anchor="ls")
        turned = upright.rotate(90, expand=True)
        middle = left + column * cell + cell // 2
        image.paste(turned, (middle - turned.width // 2, above - GAP - turned.height))
    _draw_scale(image, pen, (left, above + height + 2 * GAP))
    return _png(image)


def _light(weights: Numbers) -> NDArray[numpy.uint8]:
    clear = numpy.nan_to_num(weights.astype(numpy.float32), nan=0.0)
    grey: NDArray[numpy.uint8] = numpy.rint(numpy.sqrt(numpy.clip(clear, 0, 1)) * 255).astype(
        numpy.uint8
    )
    return grey


def _draw_scale(image: Any, pen: Any, place: tuple[int, int]) -> None:
    from PIL import Image

    width, height = SCALE
    x, y = place
    ramp = numpy.linspace(0, 255, width).round().astype(numpy.uint8)
    image.paste(Image.fromarray(numpy.tile(ramp, (height, 1))), place)
    pen.rectangle((x - 1, y - 1, x + width, y + height), outline=0)
    for mark in MARKS:
        at = x + round(mark**0.5 * (width - 1))
        pen.text((at, y + height + GAP // 2), f"{mark:g}", fill=0, font=_font(), anchor="ma")


def _png(image: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@cache
def _font() -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(FONT)


def _width(word: str) -> int:
    width: float = _font().getlength(word)
    return round(width)


@lru_cache(1 << 14)
def _drawable(word: str) -> str:
    """A word of what the font has, not too long; ``?`` stands for a character that it lacks."""
    nothing = bytes(_font().getmask(UNKNOWN))
    text = "".join(
        char if char.isprintable() and bytes(_font().getmask(char)) != nothing else "?"
        for char in word[:LABEL].translate(STAND_INS)
    )
    if _width(text) <= LABEL:
        return text
    while _width(f"{text}…") > LABEL:
        text = text[:-1]
    return f"{text}…"
