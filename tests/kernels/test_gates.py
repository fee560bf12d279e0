"""Gated layers are one step where nobody looks between, with the bits of their parts."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch.nn import functional as F

from transformers_api.kernels.abi import LowRank, LowRankPart, Step
from transformers_api.kernels.capture import current
from transformers_api.kernels.graph.executor import RecordedPass
from transformers_api.kernels.graph.planner import STEP_WORDS, WORD
from transformers_api.kernels.modules.linear import PackedWeight
from transformers_api.kernels.modules.low_rank import LowRankPair
from transformers_api.kernels.modules.weight_memory import WeightMemory

INPUTS, OUTPUTS = 96, 64
ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
WHOLE = [1, 3, 2, 0]  # how many steps each one opens


class Layer:
    """``activation`` of one half of a product times the other half; then one is added."""

    def __init__(self, library, kind, activation=F.silu, gate_is_first=True, outputs=OUTPUTS):
        seeded = torch.Generator().manual_seed(7)
        weights = torch.randn(2 * outputs, INPUTS, generator=seeded)
        self.weight = PackedWeight(library, [weights], kind, WeightMemory())
        self.activation, self.gate_is_first = activation, gate_is_first
        self.recorded = RecordedPass(library)

    def joined(self, both):
        halves = both.chunk(2, -1)
        gates, others = halves if self.gate_is_first else halves[::-1]
        return self.activation(gates) * others

    def forward(self, x):
        return self.joined(self.weight.multiply(x))

    def learn(self):
        for size in (5, 7):
            x = torch.ones(size, INPUTS)
            self.recorded.record(size, [x], [], lambda x=x: self.forward(x + 1))
        assert not self.recorded.failure

    def opened(self):
        plan = self.recorded.plan
        return plan.steps.base[Step.fused.offset // WORD :: STEP_WORDS].tolist()


class WithAReader(Layer):
    """The product is needed once more."""

    def forward(self, x):
        both = self.weight.multiply(x)
        return self.joined(both) + both[:, :OUTPUTS]


class Shown(Layer):
    """A hook sees the product."""

    def forward(self, x):
        both = self.weight.multiply(x)
        if recorder := current():
            recorder.add_module_call(torch.nn.Identity(), [x, both])
        return self.joined(both)


def numbers(rows):
    return torch.randn(rows, INPUTS, generator=torch.Generator().manual_seed(rows))


def check_bits(layer):
    """Whatever the number of rows: those of the operations one by one."""
    apart = RecordedPass(layer.weight.library)
    for size in (5, 7):
        both = torch.ones(size, layer.weight.out_features)
        apart.record(size, [both], [], lambda both=both: layer.joined(both))
    for rows in (1, 2, 8, 9, 33, 50, 70):
        x = numbers(rows)
        given = layer.recorded.run(rows, [x], [])
        assert torch.equal(given, apart.run(rows, [layer.weight.multiply(x + 1)], []))


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_a_gated_layer_is_one_step_with_the_bits_of_its_parts(library, name, kind):
    layer = Layer(library, kind, ACTIVATIONS[name], gate_is_first=name != "gelu")
    layer.learn()
    assert layer.opened() == WHOLE
    check_bits(layer)


def test_outputs_that_fill_no_whole_panels_are_made_one_step_after_the_other(library):
    layer = Layer(library, "bfloat16", outputs=40)
    layer.learn()
    check_bits(layer)


@pytest.mark.parametrize("kind", [WithAReader, Shown])
def test_a_product_that_somebody_else_sees_stays_a_step_of_its_own(library, kind):
    layer = kind(library, "bfloat16")
    layer.learn()
    assert layer.opened()[1] == 0
    x = numbers(20)
    assert torch.allclose(
        layer.recorded.run(20, [x], []), layer.forward(x + 1), rtol=1e-5, atol=1e-4
    )


def test_what_an_adapter_adds_to_a_gated_layer_comes_before_its_activation(library):
    layer = Layer(library, "bfloat16")
    layer.learn()
    seeded, memory = torch.Generator().manual_seed(2), WeightMemory()
    down, up = (torch.randn(*n, generator=seeded) for n in ((4, INPUTS), (2 * OUTPUTS, 4)))
    pair = LowRankPair(library, down, up, "float32", memory)
    parts = (LowRankPart * 1)(LowRankPart(pair.down.address, pair.up.address, 0, 0))
    table = LowRank(1, ctypes.addressof(parts), 2 * OUTPUTS, 1)
    layer.recorded.add_adapters({layer.weight.address: ctypes.addressof(table)})
    x, adapters = numbers(20), torch.arange(20) % 2 - 1
    given = layer.recorded.run(20, [x], [], adapters=adapters)
    both = layer.weight.multiply(x + 1)
    both[1::2] += (x + 1)[1::2] @ down.T @ up.T
    assert torch.allclose(given, layer.joined(both), rtol=1e-4, atol=1e-2)
