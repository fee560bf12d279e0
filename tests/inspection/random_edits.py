"""Edits of every kind at random, for tests of what they must not do to others."""

from __future__ import annotations

import numpy

from tests.inspection.test_edits import plan
from tests.inspection.test_lenses import sae
from transformers_api.inspection.edit_plan import Edit
from transformers_api.inspection.sae import FeatureEdit

LAYERS, WIDTH, HEADS, GROUPS, SIZE, NEURONS = 3, 32, 4, 2, 8, 30
PARTS = ("resid", "attn", "mlp")


def _vector(chance, *shape):
    generator = numpy.random.default_rng(chance.randrange(1 << 32))
    return generator.normal(size=shape).astype(numpy.float32)


def _some(chance, count):
    return tuple(sorted(chance.sample(range(count), chance.randint(1, count - 1))))


def _positions(chance, length):
    start = chance.randrange(length + 4)
    stop = chance.choice([None, None, start + 2, start + chance.randint(2, 6)])
    return ((0, 1), (start + 1, stop)) if chance.random() < 0.2 else ((start, stop),)


def _add(chance, _length):
    part = chance.choice(PARTS)
    return {"part": part, "vector": 2 * _vector(chance, WIDTH), "keeps_norm": chance.random() < 0.3}


def _erase(chance, _length):
    rows, _ = numpy.linalg.qr(_vector(chance, WIDTH, chance.randint(1, 3)))
    return {"part": chance.choice(PARTS), "vector": rows.T.copy()}


def _heads(chance, _length):
    return {"part": "head", "units": _some(chance, HEADS), "by": chance.choice([0.0, 3.0])}


def _set_head(chance, _length):
    return {"part": "head", "units": (chance.randrange(HEADS),), "vector": _vector(chance, SIZE)}


def _neurons(chance, _length):
    units = _some(chance, NEURONS)
    return {"part": "neuron", "units": units, "vector": 4 * _vector(chance, len(units))}


def _patch(chance, length):
    """Numbers of another text, a row for each position."""
    start = chance.randrange(length)
    count = chance.randint(1, 4)
    part = chance.choice(PARTS)
    positions = ((start, start + count),)
    return {"part": part, "positions": positions, "is_aligned": True} | {
        "vector": _vector(chance, count, WIDTH)
    }


def _edges(chance, length):
    first = chance.randrange(length)
    keys = ((first, chance.choice([None, first + 1, first + 3])),)
    return {"part": "weights", "units": _some(chance, HEADS), "keys": keys}


def _temper(chance, _length):
    return {"part": "weights", "units": _some(chance, HEADS), "by": chance.choice([0.3, 2.0, 9.0])}


def _inputs(chance, _length):
    part = chance.choice("qkv")
    units = _some(chance, HEADS if part == "q" else GROUPS)
    return {"part": part, "units": units, "by": chance.choice([0.0, -2.0, 30.0])}


def _feature(chance, layer):
    own = sae(layer=layer)
    feature = FeatureEdit(sae=own, number=chance.randrange(8), value=chance.choice([0.0, 9.0]))
    return {"part": "resid", "feature": feature}


KINDS = {
    "add": _add,
    "erase": _erase,
    "scale": _heads,
    "set": _set_head,
    "set neurons": _neurons,
    "set aligned": _patch,
    "block": _edges,
    "temper": _temper,
    "scale inputs": _inputs,
    "scale parts": lambda chance, _: {
        "part": chance.choice(PARTS),
        "by": chance.choice([0.0, 2.0]),
    },
    "feature": _feature,
}


def random_edit(chance, kind, length):
    """One edit of a text whose prompt has ``length`` tokens."""
    layer = chance.randrange(LAYERS)
    positions = _positions(chance, length)
    own = KINDS[kind](chance, layer if kind == "feature" else length)
    return Edit(**{"do": kind.split()[0], "layer": layer, "positions": positions} | own)


def random_plan(chance, length, kinds=tuple(KINDS)):
    """(up to three edits, the kinds that they are of)."""
    kinds = chance.choices(kinds, k=chance.randint(1, 3))
    edits = [random_edit(chance, kind, length) for kind in kinds]
    return plan(*edits, identity=f"random {chance.random()}"), kinds
