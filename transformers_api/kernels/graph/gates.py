"""Gated layers: one product makes gates and what they are for, and two operations join these.

They become one group with the product, where nobody else reads what lies between: so a kernel may
join both while they are in its cache, and write the result alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from transformers_api.kernels.capture import Operation, Recorder
from transformers_api.kernels.graph.tiling import StepGroup

GATES = ("silu", "gelu", "gelu_tanh")  # and then "mul"


def joined_gates(
    groups: list[StepGroup], recorder: Recorder, observed: Iterable[int]
) -> list[StepGroup]:
    """``groups`` with those of gated layers joined; ``observed``: storages others read, too."""
    uses = _uses(recorder, observed)
    cuts = {call.at for call in recorder.module_calls}
    joined: list[StepGroup] = []
    for group in groups:
        first = joined[-1] if joined else None
        if first and group.begin not in cuts and _is_gated(first, group, recorder.steps, uses):
            joined[-1] = StepGroup(first.begin, group.end, group.loops, opens_with_product=True)
        else:
            joined.append(group)
    return joined


def _uses(recorder: Recorder, observed: Iterable[int]) -> dict[int, int]:
    """The uses of each storage, as an operand and by others."""
    uses: dict[int, int] = {}
    operands = (ref.storage for step in recorder.steps for ref in step.refs)
    for storage in (*operands, *observed):
        uses[storage] = uses.get(storage, 0) + 1
    return uses


def _is_gated(
    first: StepGroup, group: StepGroup, steps: Sequence[Operation], uses: dict[int, int]
) -> bool:
    product, *others = steps[first.begin : group.end]
    if product.op != "linear" or [step.op for step in others[1:]] != ["mul"]:
        return False
    gate, mul = others
    both, gates = product.refs[-1].storage, gate.refs[-1].storage
    operands = [ref.storage for ref in (gate.refs[0], *mul.refs[:2])]
    numbers = {ref.tensor.dtype for step in (product, gate, mul) for ref in step.refs}
    return (
        gate.op in GATES
        and operands in ([both, gates, both], [both, both, gates])
        and numbers == {torch.float32}
        and (uses[both], uses[gates]) == (3, 2)
    )
