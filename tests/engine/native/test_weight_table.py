"""weights.json of a sidecar that somebody has changed: an error, before a byte is read by it."""

from __future__ import annotations

import copy
import json
from contextlib import suppress

import gguf
import pytest
import torch

from tests.engine.native.test_stored_weights import LLAMA, load, stored  # noqa: F401
from transformers_api.checkpoints.headers.weight_table import BLOCKS, read_table
from transformers_api.engine.gguf_weights import GgufWeights
from transformers_api.errors import ModelLoadFailed
from transformers_api.serving.models.sidecars import read_stored_tensors, tensor_shapes

NAME = "model.layers.0.self_attn.q_proj.weight"
PART = ("tensors", NAME, "parts", 0)
HOSTILE = ("x", None, -1, 1 << 62, 1.5, [], [-1], [1 << 40, 1 << 40], {}, True)


def leaves(value, path=()):
    if path:
        yield path
    if isinstance(value, dict):
        for key, each in value.items():
            yield from leaves(each, (*path, key))
    elif isinstance(value, list):
        for index, each in enumerate(value):
            yield from leaves(each, (*path, index))


def changed(table, path, value):
    """A copy of a table with another value at a path; without it for ``...``."""
    made = place = copy.deepcopy(table)
    for key in path[:-1]:
        place = place[key]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("table")
    stored(LLAMA, folder, ("Q4_0", "Q8_0", "F16"))
    return folder


@pytest.fixture
def table(folder):
    text = (folder / "weights.json").read_text()
    yield json.loads(text)
    (folder / "weights.json").write_text(text)


def test_no_value_of_a_table_is_believed(folder, table):
    assert read_table(folder) == table
    small = {**table, "tensors": {NAME: table["tensors"][NAME]}}
    for path in leaves(small):
        for value in (*HOSTILE, ...):
            (folder / "weights.json").write_text(json.dumps(changed(table, path, value)))
            with suppress(ModelLoadFailed):
                read_stored_tensors(folder)
                tensor_shapes(folder)
                with suppress(OSError, KeyError):  # no such file, no such parameter
                    GgufWeights(folder).dense(NAME, torch.float32)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ((*PART, "offset"), 1 << 40, "ends behind its file"),
        ((*PART, "bytes"), 64, "64 bytes, which"),
        ((*PART, "type"), "Q8_9", "Q8_9"),
        ((*PART, "file"), 1, "index out of range"),
        ((*PART, "ops"), [{"op": "heads", "heads": 0}], "0 is no size"),
        ((*PART, "ops"), [{"op": "heads", "heads": 5}], "no rows of 5 heads"),
        ((*PART, "ops"), [{"op": "run"}], "run"),
        (("tensors", NAME, "shape"), [64, 32], "its parts make"),
        (("tensors", NAME, "parts"), [], "has no parts"),
        (("files",), [], "index out of range"),
        (("tensors",), 5, "no attribute"),
    ],
)
def test_a_load_says_what_is_damaged(load, folder, table, native_cache, path, value, message):  # noqa: F811
    (folder / "weights.json").write_text(json.dumps(changed(table, path, value)))
    for native in (native_cache, None):
        with pytest.raises(ModelLoadFailed, match=rf"weights\.json is damaged: .*{message}"):
            load(folder, native=native)


def test_types_have_the_sizes_of_the_gguf_package():
    sizes = gguf.GGML_QUANT_SIZES
    assert {kind.name: size for kind, size in sizes.items()} == BLOCKS
