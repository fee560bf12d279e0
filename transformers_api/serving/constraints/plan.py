"""A constraint before it starts, as plain data: it may start on another machine."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers_api.engine.base import TokenConstraint
from transformers_api.serving.constraints.phases import Phases, Thought
from transformers_api.serving.constraints.spec import ConstraintSpec

if TYPE_CHECKING:
    from transformers_api.serving.constraints.compiler import Compiler
    from transformers_api.serving.text.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class ConstraintPlan:
    """See ``phases.Phases``, with grammars as they were asked for."""

    is_phased: bool = False
    thought: Thought | None = None
    trigger: re.Pattern[bytes] | None = None
    grammar: ConstraintSpec | None = None
    loose: ConstraintSpec | None = None
    forbidden: Sequence[int] = ()
    prefix: Sequence[int] = ()

    def start(self, compiler: Compiler, vocabulary: Vocabulary) -> TokenConstraint:
        """The constraint at its start. Raises what ``Compiler.compile`` does."""
        grammar = None if self.grammar is None else compiler.compile(self.grammar)
        if grammar is not None and not self.is_phased:
            return grammar.start(forbidden=self.forbidden)
        phases = Phases(
            thought=self.thought,
            trigger=self.trigger,
            grammar=grammar,
            loose=None if self.loose is None else compiler.compile(self.loose),
            forbidden=self.forbidden,
            prefix=self.prefix,
        )
        return phases.start(compiler, vocabulary)


def plan_of(constraint: TokenConstraint) -> ConstraintPlan:
    """The plan of a constraint of ours that has not taken a token yet."""
    from transformers_api.serving.constraints.grammar import GrammarConstraint
    from transformers_api.serving.constraints.phases import PhasedConstraint

    if isinstance(constraint, GrammarConstraint):
        return ConstraintPlan(
            grammar=constraint.grammar.spec, forbidden=tuple(constraint.forbidden)
        )
    assert isinstance(constraint, PhasedConstraint)
    phases = constraint.phases
    return ConstraintPlan(
        is_phased=True,
        thought=phases.thought,
        trigger=phases.trigger,
        grammar=None if phases.grammar is None else phases.grammar.spec,
        loose=None if phases.loose is None else phases.loose.spec,
        forbidden=tuple(phases.forbidden),
        prefix=tuple(phases.prefix),
    )
