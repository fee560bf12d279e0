"""Decode steps that are seen once and then run natively."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.engine.models import BATCHED, tiny_model
from tests.kernels.conftest import EVERY, OWN
from tests.repeats import slow
from transformers_api.engine.kv_cache import SlotCache, SlotLayer
from transformers_api.engine.runners.model_runner import MaskBuilder
from transformers_api.kernels.graph.executor import RecordedPass
from transformers_api.kernels.modules.attention import (
    NAME,
    CausalRows,
    describing,
    register,
    write_cache,
)
from transformers_api.kernels.modules.replace import Widths, layer_groups, pack_model

PROMPT = [5, 9, 33, 71, 8, 2, 90, 17, 44, 3, 61]
IDS = [torch.tensor([[7], [50], [23], [9]]), torch.tensor([[81], [4], [66], [1]])]
NEAR = {"rtol": 1e-4, "atol": 1e-5}
BEST = EVERY[:1]
# Which operations a family has is seen with one instruction set, and the sets with few families.
FEW = ("gemma3", "gpt-oss-sinks", "gpt2")
EACH = [(variant, name) for variant in OWN for name in sorted(BATCHED)]
FIRST = [
    (variant, name)
    for variant, name in EACH
    if variant in BEST or (variant in EVERY and name in FEW)
]
families = pytest.mark.parametrize(
    ("variant", "name"),
    [*FIRST, *slow(*(pair for pair in EACH if pair not in FIRST))],
    indirect=["variant"],
    ids=lambda value: getattr(value, "name", value),
)


class NativeLayer(SlotLayer):
    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        cache = self.cache
        for rows, states in zip(self.rows, (key_states, value_states), strict=True):
            write_cache(cache.library, states, rows, cache.starts, cache.cache_rows)
        return tuple(rows[:, :, : cache.context] for rows in self.rows)


class Setup:
    """A packed model over a slot cache of four rows, which hold 8, 9, 10 and 11 tokens."""

    def __init__(self, library, name, kind="float32"):
        register()
        self.library = library
        self.model = copy.deepcopy(tiny_model(name))
        self.model.set_attn_implementation(NAME)
        ids = torch.tensor([PROMPT[:2]])
        with torch.no_grad():
            groups = layer_groups(self.model, lambda: self.model(input_ids=ids, use_cache=False))
        pack_model(self.model, library, Widths(kind), groups)
        layers = self.model.config.get_text_config(decoder=True).num_hidden_layers
        self.cache = SlotCache(layers, 4, 128)
        self.cache.library = library
        self.cache.slots = [NativeLayer(self.cache) for _ in self.cache.slots]
        self.cache.layers = list(self.cache.slots)
        self.cache.reserve(4, 64)
        self.windows = MaskBuilder(self.model).windows
        self.decode, self.prefill = RecordedPass(library), RecordedPass(library)
        self.lengths = torch.tensor([8, 9, 10, 11])
        self.fill()

    def fill(self):
        for row, length in enumerate(self.lengths.tolist()):
            self.plain([PROMPT[:length]], [0], row)

    @torch.no_grad()
    def forward(self, ids, positions, starts, cache_rows):
        seen = self.cache.length
        self.cache.bind(0, positions, seen)
        self.cache.starts, self.cache.cache_rows = starts, cache_rows
        mask = torch.ones(len(ids), 1, ids.shape[1], seen, dtype=torch.bool)
        masks = {kind: mask.clone() for kind in self.windows}
        rows = [
            (masks[kind], CausalRows(self.library, starts, window, cache_rows))
            for kind, window in self.windows.items()
        ]
        with describing(rows):
            return self.model(
                input_ids=ids,
                position_ids=positions,
                attention_mask=masks.get("", masks),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits

    def inputs(self, ids, starts, first):
        ids, starts = torch.as_tensor(ids).clone(), torch.as_tensor(starts).clone()
        rows = torch.arange(first, first + len(ids))
        return [ids, starts[:, None] + torch.arange(ids.shape[1]), starts, rows]

    def plain(self, ids, starts, first=0):
        return self.forward(*self.inputs(ids, starts, first))

    def tensors(self):
        return [rows for layer in self.cache.slots for rows in layer.rows]

    def learn(self, which, size, ids, starts):
        inputs = self.inputs(ids, starts, 0)
        which.record(size, inputs, self.tensors(), lambda: self.forward(*inputs))

    def learn_all(self):
        for rows in (2, 3):
            self.learn(self.decode, rows, IDS[0][:rows], self.lengths[:rows])
        for width in (5, 7):
            self.learn(self.prefill, width, [PROMPT[:width]], [0])
        self.fill()  # what was learned wrote what nobody computed

    def step(self, ids, rows, count=0):
        inputs = self.inputs(ids[:rows], self.lengths[:rows] + count, 0)
        return self.decode.run(rows, inputs, self.tensors()).clone()

    def read(self, ids, start, first):
        inputs = self.inputs([ids], [start], first)
        return self.prefill.run(len(ids), inputs, self.tensors()).clone()

    def mixed(self, pieces):
        """Logits of the last tokens of (ids, start, row) that are read in one pass."""
        ids = torch.tensor([token for ids, _, _ in pieces for token in ids])[:, None]
        starts = [start + place for ids, start, _ in pieces for place in range(len(ids))]
        rows = torch.tensor([row for ids, _, row in pieces for _ in ids])
        starts = torch.tensor(starts)
        inputs = [ids, starts[:, None].clone(), starts, rows]
        logits = self.decode.run(len(ids), inputs, self.tensors()).clone()
        return logits[torch.tensor([len(ids) for ids, _, _ in pieces]).cumsum(0) - 1]


@families
def test_decode_steps_of_any_size_give_the_models_own_logits(library, name):
    setup = Setup(library, name)
    setup.learn_all()
    assert not setup.decode.failure
    for rows in (3, 1, 4, 2):
        for count, ids in enumerate(IDS):
            given = setup.step(ids, rows, count)
            plain = setup.plain(ids[:rows], setup.lengths[:rows] + count)
            assert torch.allclose(given, plain, **NEAR)


@families
def test_prompts_of_any_length_give_the_models_own_logits(library, name):
    setup = Setup(library, name)
    setup.learn_all()
    assert not setup.prefill.failure
    ids = (PROMPT * 4)[:40]
    for row, width in ((2, 5), (0, 40), (3, 1), (1, 23)):
        given = setup.read(ids[:width], 0, row)
        assert torch.allclose(given, setup.plain([ids[:width]], [0], row), **NEAR)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral-window-8"])
def test_logits_are_the_same_to_the_bit_for_any_chunking_of_a_prompt(library, name, kind):
    setup = Setup(library, name, kind)
    setup.learn_all()
    ids = (PROMPT * 5)[:50]
    whole = setup.read(ids, 0, 1)
    for widths in ([1] * 50, [16, 16, 16, 2], [49, 1], [7, 43]):
        start = 0
        for width in widths:
            last = setup.read(ids[start : start + width], start, 3)
            start += width
        assert torch.equal(last, whole), widths


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_row_is_the_same_to_the_bit_alone_and_in_company(library, name, kind):
    setup = Setup(library, name, kind)
    setup.learn_all()
    alone, *others = (setup.step(IDS[0], rows) for rows in (1, 2, 3, 4))
    assert all(torch.equal(other[:1], alone) for other in others)
    assert torch.equal(others[2][:3], others[1])
    by_itself = setup.read([7], 8, 0)
    assert torch.equal(by_itself, alone), "a decode step is a prompt of one token"


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral-window-8"])
def test_pieces_of_prompts_and_decode_steps_in_one_pass_have_the_bits_of_their_own(
    library, name, kind
):
    setup = Setup(library, name, kind)
    setup.learn_all()
    ids = (PROMPT * 5)[:50]
    whole = [setup.read(ids[:n], 0, 0) for n in (40, 24, 1)]
    setup.fill()
    step = setup.read([7], 11, 3)
    setup.fill()
    setup.mixed([(ids[:13], 0, 1), (ids[:7], 0, 0)])
    given = setup.mixed([([7], 11, 3), (ids[7:24], 7, 0), (ids[:1], 0, 2), (ids[13:40], 13, 1)])
    assert torch.equal(given, torch.cat([step, whole[1], whole[2], whole[0]]))


def test_a_cache_that_grew_needs_no_new_recording(library):
    setup = Setup(library, "llama")
    setup.learn_all()
    before = setup.step(IDS[0], 4)
    setup.cache.reserve(4, 128)
    assert torch.equal(setup.step(IDS[0], 4), before)


def test_a_result_that_an_unknown_operation_wrote_is_refused(library):
    taught = RecordedPass(library)
    for rows in (2, 3):
        x = torch.ones(rows, 8)

        def written_over(x=x):
            doubled = x * 2
            return torch.cumsum(doubled, 1, out=doubled)

        taught.record(rows, [x], [], written_over)
    assert "cumsum" in taught.failure
