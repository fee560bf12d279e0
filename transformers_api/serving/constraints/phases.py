"""An answer in phases: what the model thinks, what it says freely, what a grammar holds.

Free text has no mask at all, so that an answer without calls has the tokens that it would have had
without tools. It is watched for the beginning of a call; from there on the grammar holds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy

from transformers_api.engine.base import Mask
from transformers_api.serving.constraints.compiler import Compiler
from transformers_api.serving.constraints.grammar import Grammar, GrammarConstraint
from transformers_api.serving.text.vocabulary import Vocabulary

_LONGEST_TAIL = 256  # bytes that are looked at for the end of a phase


@dataclass(frozen=True, slots=True, kw_only=True)
class Thought:
    """The phase before the answer, until ``close``; after ``budget`` tokens that is forced."""

    open_id: int | None  # the token that opens it, where the prompt has not
    close: bytes
    close_ids: tuple[int, ...]
    budget: int | None = None
    is_open: bool = False  # by the prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Phases:
    """The phases of one answer: a thought, free text until ``trigger``, a grammar.

    ``trigger`` None: the grammar holds from the start, or after the thought. ``grammar`` None: the
    answer is free to its end.
    """

    thought: Thought | None = None
    trigger: re.Pattern[bytes] | None = None  # its group is what the grammar begins with
    grammar: Grammar | None = None
    loose: Grammar | None = None  # of what the trigger's last token holds besides: if not the other
    forbidden: Collection[int] = ()
    prefix: Sequence[int] = ()  # tokens of the prompt that the grammar has to begin with

    def start(self, compiler: Compiler, vocabulary: Vocabulary) -> PhasedConstraint:
        """A constraint at its start."""
        return PhasedConstraint(self, compiler, vocabulary)


class PhasedConstraint:
    """Meets ``engine.base.TokenConstraint``."""

    def __init__(self, phases: Phases, compiler: Compiler, vocabulary: Vocabulary) -> None:
        self.phases = phases
        self._compiler = compiler
        self._token_bytes = vocabulary.token_bytes
        self._held: GrammarConstraint | None = None
        self._tail = b""
        self._tokens: list[tuple[int, int]] = []  # (token, bytes of the tail before it)
        self._thought_tokens = 0
        self._closing = 0  # ids of the mark that have been forced
        # Where a form is due after the thought, the answer does not end in it.
        has_form = phases.grammar is not None and phases.trigger is None
        self._endless = _all_but(compiler.end_ids, compiler.mask_words) if has_form else None
        # A function of the class: a bound one would know this object, which knows it.
        self._step: Callable[[PhasedConstraint, int], None]
        thought = phases.thought
        if thought is not None and thought.is_open:
            self._step = PhasedConstraint._think
        elif thought is not None and thought.open_id is not None:
            self._step = PhasedConstraint._first
            self._held = self._started()
        else:
            self._answer()

    def allowed(self) -> Mask | None:
        """See TokenConstraint."""
        if self._step is PhasedConstraint._think:
            return self._one(self._next_of_close) if self._is_closing else self._endless
        if self._held is None:
            return None
        mask = self._held.allowed()
        if self._step is PhasedConstraint._first:  # it may think first
            thought = self.phases.thought
            assert thought is not None
            mask = mask | self._one(thought.open_id or 0)
        return mask

    def take(self, token_id: int) -> None:
        """See TokenConstraint."""
        self._step(self, token_id)

    def draft(self, most: int) -> Sequence[int]:
        """See TokenConstraint."""
        return self._held.draft(most) if self._held is not None else ()

    @property
    def is_complete(self) -> bool:
        """See TokenConstraint."""
        return self._held is not None and self._held.is_complete

    # The phases: each takes a token and sets the next.

    def _first(self, token_id: int) -> None:
        thought = self.phases.thought
        assert thought is not None
        if token_id == thought.open_id:
            self._held, self._step = None, PhasedConstraint._think
        else:
            self._answer()
            self._step(self, token_id)

    def _think(self, token_id: int) -> None:
        thought = self.phases.thought
        assert thought is not None
        self._closing += self._is_closing
        self._thought_tokens += 1
        self._note(token_id)
        if thought.close in self._tail or self._closing >= len(thought.close_ids) > 0:
            self._tail, self._tokens = b"", []
            self._answer()

    def _free(self, token_id: int) -> None:
        self._note(token_id)
        trigger = self.phases.trigger
        match = None if trigger is None else trigger.search(self._tail)
        if match is None:
            return
        tokens = self._since(match.start(match.lastindex or 0))
        for grammar in (self.phases.grammar, self.phases.loose):
            if grammar is not None and grammar.fits(tokens):
                self._held = grammar.start(tokens, forbidden=self.phases.forbidden)
                self._step = PhasedConstraint._hold
                return
        self._tail, self._tokens = b"", []  # it only looks like a call

    def _hold(self, token_id: int) -> None:
        assert self._held is not None
        self._held.take(token_id)

    def _answer(self) -> None:
        """Begin the phase after the thought, or without one."""
        if self.phases.grammar is None or self.phases.trigger is not None:
            self._held, self._step = None, PhasedConstraint._free
        else:
            self._held = self._held or self._started()
            self._step = PhasedConstraint._hold

    def _started(self) -> GrammarConstraint | None:
        grammar = self.phases.grammar
        if grammar is None or self.phases.trigger is not None:
            return None
        return grammar.start(self.phases.prefix, forbidden=self.phases.forbidden)

    def _note(self, token_id: int) -> None:
        self._tokens.append((token_id, len(self._tail)))
        self._tail += self._token_bytes(token_id)
        while len(self._tail) > _LONGEST_TAIL:
            cut = self._tokens[1][1] if len(self._tokens) > 1 else len(self._tail)
            self._tail = self._tail[cut:]
            self._tokens = [(token, at - cut) for token, at in self._tokens[1:]]

    def _since(self, start: int) -> list[int]:
        """The tokens from a byte of the tail on; of one that is cut, those of its rest."""
        later = [token for token, at in self._tokens if at >= start]
        first = next((at for _, at in self._tokens if at >= start), len(self._tail))
        rest = self._tail[start:first]
        return [*(self._compiler.encode(rest.decode(errors="ignore")) if rest else []), *later]

    @property
    def _is_closing(self) -> bool:
        """True once the budget is spent and no character is unfinished: the mark has to come."""
        thought = self.phases.thought
        assert thought is not None
        if thought.budget is None or not thought.close_ids:
            return False
        is_spent = self._thought_tokens >= thought.budget
        return self._closing > 0 or (is_spent and _is_whole(self._tail))

    @property
    def _next_of_close(self) -> int:
        thought = self.phases.thought
        assert thought is not None
        return thought.close_ids[self._closing]

    def _one(self, token_id: int) -> Mask:
        mask = numpy.zeros(self._compiler.mask_words, numpy.uint32)
        mask[token_id // 32] = numpy.uint32(1 << (token_id % 32))
        return mask


def _all_but(ids: Collection[int], words: int) -> Mask:
    mask = numpy.full(words, 0xFFFFFFFF, numpy.uint32)
    for token in ids:
        mask[token // 32] &= numpy.uint32(~(1 << (token % 32)) & 0xFFFFFFFF)
    return mask


def _is_whole(text: bytes) -> bool:
    """True where ``text``, the end of one, ends with a whole character."""
    for size in range(1, min(len(text), 4) + 1):
        byte = text[-size]
        if byte & 0xC0 != 0x80:  # the first byte of the last character
            needed = 1 if byte < 0x80 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return size >= needed
    return True
