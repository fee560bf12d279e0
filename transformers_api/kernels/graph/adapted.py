"""A plan whose linear layers add what adapters add: the same plan, with steps between its own.

Input and result of a linear layer are in memory when it has run, so that the step behind it needs
no memory of its own. A pass without adapters runs the plan as it was.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import replace

import numpy

from transformers_api.kernels.abi import OPS, Operand, Step
from transformers_api.kernels.graph.planner import STEP_WORDS, WORD, Affine, Plan, Words

CALL = Step.call.offset // WORD
FUSED = Step.fused.offset // WORD
SIZE = Step.sizes.offset // WORD
FIRST_INPUT = Step.inputs.offset // WORD
SECOND_INPUT = FIRST_INPUT + ctypes.sizeof(Operand) // WORD
RESULT = Step.out.offset // WORD
LOW_RANK = Step(op=OPS.index("low_rank"), operands=2)


def adaptable_weights(plan: Plan) -> set[int]:
    """The addresses of the weights that every token of the pass is multiplied with."""
    return {int(plan.steps.base[at * STEP_WORDS + CALL]) for at in _linears(plan)}


def adapted_plan(plan: Plan, tables: Mapping[int, int]) -> Plan:
    """The plan with a step behind each linear layer, whose table has the weight's address here.

    ``adapter_words`` are to hold the address of the adapters' numbers, one for each token.
    """
    base, slope = (words.reshape(-1, STEP_WORDS) for words in (plan.steps.base, plan.steps.slope))
    places = [at for at in _linears(plan) if int(base[at, CALL]) in tables]
    fresh = numpy.array([at + i + 1 for i, at in enumerate(places)], numpy.int64)  # new rows
    own = numpy.setdiff1d(numpy.arange(len(base) + len(places)), fresh)  # rows of the old steps
    rows, slopes = (
        numpy.zeros((len(base) + len(places), STEP_WORDS), numpy.int64) for _ in range(2)
    )
    rows[own], slopes[own] = base, slope
    rows[fresh], slopes[fresh] = base[places], slope[places]
    rows[fresh, 0] = numpy.frombuffer(bytes(LOW_RANK), numpy.int64)[0]  # operation, operands
    rows[fresh, FUSED] = rows[own[places], FUSED] = 0  # see gates.py
    rows[fresh, CALL] = [tables[int(base[at, CALL])] for at in places]

    def moved(words: Words) -> Words:
        return own[words // STEP_WORDS] * STEP_WORDS + words % STEP_WORDS

    added = [row * STEP_WORDS + word for row in fresh for word in (FIRST_INPUT, RESULT)]
    return replace(
        plan,
        steps=Affine(plan.size, rows.reshape(-1), slopes.reshape(-1)),
        step_relocations=numpy.append(moved(plan.step_relocations), added).astype(numpy.int64),
        step_call_relocations=moved(plan.step_call_relocations),
        weights=moved(plan.weights),
        constants=[
            (is_call, word if is_call else int(moved(numpy.array([word]))[0]), index)
            for is_call, word, index in plan.constants
        ],
        hook_points=[
            replace(point, at=int(own[point.at - 1]) + 1 + int(point.at - 1 in places))
            if point.at
            else point
            for point in plan.hook_points
        ],
        adapter_words=fresh * STEP_WORDS + SECOND_INPUT,
    )


def _linears(plan: Plan) -> list[int]:
    """The steps that multiply every token of the pass with a packed weight."""
    base, slope = (words.reshape(-1, STEP_WORDS) for words in (plan.steps.base, plan.steps.slope))
    is_linear = base[:, 0] & 0xFFFFFFFF == OPS.index("linear")
    is_whole = (base[:, SIZE] == plan.size) & (slope[:, SIZE] == 1)
    places: list[int] = numpy.flatnonzero(is_linear & is_whole).tolist()
    return places
