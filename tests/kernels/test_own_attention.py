"""Attention by operations of a model's own: recognised and given to the kernel, or refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from transformers_api.kernels.modules.attention import CausalRows
from transformers_api.kernels.modules.own_attention import (
    NotRecognised,
    cached,
    computes_own_attention,
    masked,
)

BATCH, HEADS, LENGTH, SIZE = 3, 4, 40, 16
SCALE = SIZE**-0.5
LEAST = torch.finfo(torch.float32).min
SLOPES = 2.0 ** -torch.arange(1.0, HEADS + 1)


class Rows:
    """A query of each of some rows, and the keys and values of the cache."""

    def __init__(self, library, groups=HEADS):
        seeded = torch.Generator().manual_seed(1)
        self.query = torch.randn(BATCH, HEADS, 1, SIZE, generator=seeded)
        self.key, self.value = torch.randn(
            2, BATCH, groups, LENGTH, SIZE, generator=seeded
        ).unbind()
        self.starts = torch.tensor([0, 17, LENGTH - 1])
        self.rows = CausalRows(library, self.starts, 0)

    @property
    def symbols(self):
        return cached(self.key), cached(self.value), masked(self.rows, LENGTH)

    def expected(self, scale=SCALE, slopes=None, window=LENGTH):
        group = HEADS // self.key.shape[1]
        key, value = (x.double().repeat_interleave(group, 1) for x in (self.key, self.value))
        distance = self.starts[:, None, None, None] - torch.arange(LENGTH)
        scores = self.query.double() @ key.transpose(2, 3) * scale
        if slopes is not None:
            scores = scores - slopes[:, None, None] * distance
        hidden = (distance < 0) | (distance >= window)
        return scores.masked_fill(hidden, -math.inf).softmax(-1) @ value


def gptj(query, key, value, mask):
    scores = torch.matmul(query, key.to(torch.float32).transpose(-1, -2)) / math.sqrt(SIZE)
    return torch.matmul((scores + mask).softmax(-1).to(value.dtype), value)


def codegen(query, key, value, mask):
    scores = torch.nn.Softmax(-1)((query @ key.transpose(-1, -2) + mask) / math.sqrt(SIZE))
    return functional.dropout(scores, 0.5, training=False) @ value


def xglm(query, key, value, mask):
    flat = (BATCH * HEADS, -1, SIZE)
    query, key, value = (
        (x * SCALE if x is query else x).reshape(flat) for x in (query, key, value)
    )
    scores = torch.bmm(query, key.transpose(1, 2)).view(BATCH, HEADS, 1, LENGTH) + mask
    scores = torch.max(scores, torch.tensor(LEAST)).view(BATCH * HEADS, 1, LENGTH)
    return torch.bmm(functional.softmax(scores, -1), value).view(BATCH, HEADS, 1, SIZE)


def mpt_without_bias(query, key, value, mask):
    scores = query @ key.transpose(-1, -2) * SCALE
    return functional.softmax(scores.masked_fill(~mask, LEAST).float(), -1) @ value


def falcon(query, key, value, mask):
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)


@pytest.mark.parametrize("attend", [gptj, codegen, xglm, mpt_without_bias, falcon])
def test_attention_is_recognised(library, attend):
    rows = Rows(library)
    made = attend(rows.query, *rows.symbols)
    torch.testing.assert_close(made.double(), rows.expected(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attend", [gptj, falcon])
def test_queries_may_share_one_head_of_keys(library, attend):
    rows = Rows(library, groups=1)
    made = attend(rows.query, *rows.symbols)
    torch.testing.assert_close(made.double(), rows.expected(), atol=1e-5, rtol=1e-5)


def test_a_bias_that_is_linear_in_the_distance_is_recognised_wherever_it_is_added(library):
    rows = Rows(library)
    key, value, mask = rows.symbols
    line = SLOPES[:, None, None] * torch.arange(1 - LENGTH, 1)  # (H, 1, S)
    scaled = (rows.query @ key.transpose(-1, -2) + line) * SCALE + mask
    expected = rows.expected(slopes=SLOPES * SCALE)
    torch.testing.assert_close(
        (scaled.softmax(-1) @ value).double(), expected, atol=1e-5, rtol=1e-5
    )
    in_mask = torch.masked_fill(line[None], torch.where(mask, 0.0, LEAST) < -1, LEAST)
    made = functional.scaled_dot_product_attention(rows.query, key, value, attn_mask=in_mask)
    torch.testing.assert_close(made.double(), rows.expected(slopes=SLOPES), atol=1e-5, rtol=1e-5)
    flat = line.repeat(BATCH, 1, 1)  # (B * H, 1, S), as BLOOM has it
    query, key = rows.query.view(-1, 1, SIZE), key.reshape(BATCH * HEADS, -1, SIZE)
    scores = flat.baddbmm(query, key.transpose(-1, -2), beta=1.0, alpha=SCALE)
    probs = (scores.view(BATCH, HEADS, 1, -1) + mask).softmax(-1).view(BATCH * HEADS, 1, -1)
    made = torch.bmm(probs, value.reshape(BATCH * HEADS, -1, SIZE)).view(BATCH, HEADS, 1, SIZE)
    torch.testing.assert_close(made.double(), rows.expected(slopes=SLOPES), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [1, 8, LENGTH])
def test_a_mask_of_the_models_own_narrows_the_window(library, window):
    rows = Rows(library)
    key, value, mask = rows.symbols
    own = torch.arange(LENGTH)[None, None, None] >= LENGTH - window
    scores = torch.where(own, rows.query @ key.transpose(-1, -2), torch.tensor(LEAST)) + mask
    made = (scores.softmax(-1) @ value).double()
    torch.testing.assert_close(made, rows.expected(1.0, window=window), atol=1e-5, rtol=1e-5)


REFUSED = {
    "no mask": lambda scores, mask, value: scores.softmax(-1) @ value,
    "not the last axis": lambda scores, mask, value: (scores + mask).softmax(1) @ value,
    "no softmax": lambda scores, mask, value: (scores + mask) @ value,
    "a curved bias": lambda scores, mask, value: scores + torch.arange(LENGTH).float() ** 2,
    "a bias of each query and key": lambda scores, mask, value: (
        scores + torch.rand(1, 4, 9, LENGTH)
    ),
    "a factor for each key": lambda scores, mask, value: scores * torch.rand(LENGTH),
    "hidden by a score": lambda scores, mask, value: scores.masked_fill(~mask, -1.0),
    "a mask with a gap": lambda scores, mask, value: torch.where(
        torch.arange(LENGTH) % 2 == 0, scores, LEAST
    ),
    "another function": lambda scores, mask, value: torch.tanh(scores),
    "probabilities in a sum": lambda scores, mask, value: (scores + mask).softmax(-1) + 1,
}


@pytest.mark.parametrize("name", REFUSED)
def test_all_else_is_refused(library, name):
    rows = Rows(library)
    key, value, mask = rows.symbols
    with pytest.raises(NotRecognised):
        REFUSED[name](rows.query @ key.transpose(-1, -2), mask, value)


def test_keys_in_another_order_are_refused(library):
    rows = Rows(library)
    key, _, _ = rows.symbols
    with pytest.raises(NotRecognised):
        rows.query @ key.transpose(0, 1).transpose(-1, -2)


def test_models_that_call_the_attention_interface_are_told_from_others():
    from transformers import GPTJConfig, GPTJModel, LlamaConfig, LlamaModel

    tiny = {"vocab_size": 9, "num_hidden_layers": 1}
    llama = LlamaModel(
        LlamaConfig(hidden_size=8, intermediate_size=8, num_attention_heads=2, **tiny)
    )
    gptj = GPTJModel(GPTJConfig(vocab_size=9, n_embd=8, n_layer=1, n_head=2, rotary_dim=4))
    assert not computes_own_attention(llama)
    assert computes_own_attention(gptj)
