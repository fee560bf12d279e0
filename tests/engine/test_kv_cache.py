"""The rows of the KV cache: where they lie, what is kept of them, and what memory they take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from transformers_api.engine import kv_cache
from transformers_api.engine.kv_cache import SlotCache
from transformers_api.engine.runners.cuda_graphs import PaddedCache

LAYERS = [(2, 4), (3, 6)]  # heads, numbers of each


def used(cache, tokens=5, layers=LAYERS):
    """After a forward of one sequence has shown the shapes."""
    positions = torch.arange(tokens)[None]
    cache.bind(0, positions, tokens)
    for layer, (heads, width) in zip(cache.slots, layers, strict=True):
        layer.update(*torch.rand(2, 1, heads, tokens, width))
    return cache


def rows_of(cache):
    return [rows for layer in cache.slots for rows in layer.rows]


def fill(cache):
    """Other numbers everywhere; what they are, by row."""
    for rows in rows_of(cache):
        rows.uniform_()
    return {row: [rows[row].clone() for rows in rows_of(cache)] for row in range(cache.rows)}


@pytest.fixture(params=[SlotCache, PaddedCache])
def cache(request):
    return used(request.param(len(LAYERS), 8, 2048))


def test_each_row_and_each_layer_has_numbers_of_its_own(cache):
    cache.reserve(8, 300)
    written = fill(cache)
    for row, parts in written.items():
        for rows, part in zip(rows_of(cache), parts, strict=True):
            assert torch.equal(rows[row], part)
    assert [tuple(rows.shape[1:]) for rows in rows_of(cache)] == [
        (heads, 512, width) for heads, width in LAYERS for _ in range(2)
    ]


@pytest.mark.parametrize("size", [(3, 256), (3, 400), (8, 2000)])
def test_rows_that_grow_keep_the_tokens_that_are_worth_it(cache, size):
    cache.reserve(2, 200)
    written = fill(cache)
    kept = {0: 256, 1: 7} if size[1] > 256 else {0: 256, 1: 256}
    cache.reserve(*size, kept)
    for row, tokens in kept.items():
        for rows, part in zip(rows_of(cache), written[row], strict=True):
            assert torch.equal(rows[row, :, :tokens], part[:, :tokens])
            assert not rows[row, :, tokens:].any()


def test_all_tokens_are_kept_where_nothing_is_said(cache):
    cache.reserve(2, 200)
    written = fill(cache)
    cache.reserve(4, 1000)
    for row, parts in written.items():
        for rows, part in zip(rows_of(cache), parts, strict=True):
            assert torch.equal(rows[row, :, :256], part)


def test_what_padding_wrote_is_nobodys_first_token():
    cache = used(PaddedCache(len(LAYERS), 8, 2048))
    for rows in rows_of(cache):
        rows[-1] = float("nan")
    cache.reserve(2, 100)
    assert not any(rows[:2].isnan().any() for rows in rows_of(cache))


def test_no_row_is_moved_for_another():
    cache = used(SlotCache(len(LAYERS), 8, 2048))
    cache.reserve(2, 600)
    places = {rows.data_ptr() for rows in rows_of(cache)}
    for count in range(3, 9):
        cache.reserve(count, 600)
        assert {rows.data_ptr() for rows in rows_of(cache)} == places
        assert all(len(rows) >= count for rows in rows_of(cache))


def test_a_system_that_promises_little_gives_the_rows_that_are_wanted(monkeypatch):
    cache = used(SlotCache(len(LAYERS), 8, 2048))
    honest, most = kv_cache.mmap.mmap, 4 * 1024 * cache.token_bytes

    def stingy(handle, size, flags):
        if size > most:
            raise OSError(12, "Cannot allocate memory")
        return honest(handle, size, flags)

    monkeypatch.setattr(kv_cache.mmap, "mmap", stingy)
    cache.reserve(2, 200)
    written = fill(cache)
    for rows in (2, 4):
        assert cache.reserve(rows, 1000) == (rows, 1024)
        for row, parts in written.items():
            for now, part in zip(rows_of(cache), parts, strict=True):
                assert torch.equal(now[row, :, :256], part)


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="not Linux")
def test_rows_take_the_memory_of_the_tokens_that_are_written():
    shape = [(8, 64)] * 4
    cache = used(SlotCache(4, 32, 4096), layers=shape)
    before = resident()
    cache.reserve(32, 4096)
    for layer in cache.slots:
        for rows in layer.rows:
            rows[:, :, :64] = 1
    assert cache.bytes == 32 * 4096 * cache.token_bytes == 1 << 31
    assert resident() - before < 1 << 27


def test_memory_that_was_let_go_is_taken_anew_for_all_layers(cache):
    cache.reserve(4, 600)
    fill(cache)
    cache.clear()
    assert (cache.rows, cache.length, cache.bytes) == (1, 256, 0)
    assert cache.token_bytes
    cache.reserve(2, 300)
    used(cache)
    assert cache.bytes == 2 * 512 * cache.token_bytes + cache.spare * 512 * cache.token_bytes
    assert not any(rows[1].any() for rows in rows_of(cache))
