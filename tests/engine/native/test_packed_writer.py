"""The thread that writes packed weights to the disk, beside the model that serves."""

from __future__ import annotations

import os
import threading

import torch

from transformers_api.engine.native import packed_store, packed_weights
from transformers_api.engine.native.packed_store import PackedStore, StoredWeight
from transformers_api.engine.native.packed_weights import PackedFile
from transformers_api.kernels.abi import Library
from transformers_api.kernels.build import build
from transformers_api.kernels.modules.linear import PackedWeight
from transformers_api.kernels.modules.weight_memory import WeightMemory

PIECE = 1 << 16
PATIENCE_S = 30


def test_a_model_that_is_unloaded_meanwhile_is_let_go_with_the_piece_at_hand(
    native_cache, tmp_path, monkeypatch
):
    library = Library(build(native_cache), threads=1)
    sizes, is_writing, goes_on = [], threading.Event(), threading.Event()
    honest = os.pwrite

    def pwrite(file, data, offset):
        sizes.append(len(data))
        if len(data) == PIECE:
            is_writing.set()
            goes_on.wait(PATIENCE_S)
        return honest(file, data, offset)

    for module in (packed_store, packed_weights):
        monkeypatch.setattr(module, "AT_ONCE", PIECE)
    monkeypatch.setattr(packed_weights, "SMALLEST", 0)
    monkeypatch.setattr(os, "pwrite", pwrite)
    weights = [PackedWeight(library, [torch.ones(512, 512)], "float32", WeightMemory())]
    store = PackedStore(tmp_path / "packed", 1 << 30)
    writer = PackedFile(store, "a" * 32, "model").write_later(library, weights)
    assert is_writing.wait(PATIENCE_S)
    weights.clear()
    goes_on.set()
    writer.join(PATIENCE_S)
    assert sizes.count(PIECE) == 1
    assert list(store.folder.iterdir()) == []


def test_no_part_is_held_while_the_next_one_is_waited_for(tmp_path):
    part = bytearray(64)

    def parts():
        for _ in range(2):
            yield part
            part.extend(b"-")  # BufferError for one that somebody has a view of
            part.pop()

    weights = [StoredWeight(0, 2, 3, 0.0, 0, 128, 0)]
    PackedStore(tmp_path, 1 << 30).write("a" * 32, "model", weights, parts())
    assert PackedStore(tmp_path, 1 << 30).size("a" * 32) == 128
