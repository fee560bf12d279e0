"""A compiled grammar, and what holds one sequence to it."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy

from transformers_api.engine.base import Mask
from transformers_api.errors import ConstraintFailed
from transformers_api.serving.constraints.listener import ConstraintListener
from transformers_api.serving.constraints.mask_worker import worker
from transformers_api.serving.constraints.spec import ConstraintSpec

if TYPE_CHECKING:
    from llguidance import LLMatcher


class Grammar:
    """A compiled constraint: makes one ``GrammarConstraint`` after the other."""

    def __init__(
        self,
        matcher: LLMatcher,
        first: bytes,
        spec: ConstraintSpec,
        size: int,
        listener: ConstraintListener,
    ) -> None:
        self.spec = spec
        self.size = size  # bytes
        self.listener = listener
        self._matcher = matcher
        self._first = first  # the mask of the first token
        self._forced = tuple(matcher.deep_copy().compute_ff_tokens())
        self.warnings = matcher.get_grammar_warnings()  # what is not enforced

    def fits(self, tokens: Sequence[int]) -> bool:
        """True where an answer may begin with ``tokens``, and something may follow."""
        matcher = self._matcher.deep_copy()
        return matcher.consume_tokens(list(tokens)) and not matcher.is_stopped()

    def start(
        self, tokens: Sequence[int] = (), *, forbidden: Collection[int] = ()
    ) -> GrammarConstraint:
        """A constraint behind ``tokens``, which fit; ``forbidden`` tokens never come."""
        mask = numpy.frombuffer(self._first, numpy.uint32).copy()
        constraint = GrammarConstraint(
            self, self._matcher.deep_copy(), mask, self._forced, self.spec.param, forbidden
        )
        for token in tokens:
            constraint.take(token)
        return constraint


class GrammarConstraint:
    """Meets ``engine.base.TokenConstraint``. The mask is worked out while the model reads.

    Where the grammar leaves one text only, its tokens are those that the tokenizer makes of it: no
    other way of cutting it is allowed, so that no mask has to be worked out for any but the first,
    and all of them can be read at once (``draft``).
    """

    def __init__(
        self,
        grammar: Grammar,
        matcher: LLMatcher,
        mask: Mask,
        forced: Sequence[int],
        param: str,
        forbidden: Collection[int] = (),
    ) -> None:
        self.grammar = grammar  # whose memory it shares
        self._matcher = matcher
        self._mask = mask
        self._forced: list[int] = []  # what has to come, the next token last
        self._param = param
        self.forbidden = frozenset(forbidden)
        self._permitted = ~_bits(forbidden, len(mask)) if forbidden else None
        self._is_ready = threading.Lock()  # held while the mask is worked out
        self._has_failed = False
        self._stopped = False
        self._is_forced = False  # the mask that is worked out may be of one token
        if not self._force(forced) and self._permitted is not None:
            mask &= self._permitted

    def allowed(self) -> Mask:
        """See TokenConstraint."""
        began = time.perf_counter()
        with self._is_ready:
            self.grammar.listener.on_wait(time.perf_counter() - began)
            if self._has_failed:
                raise ConstraintFailed(
                    "What may follow by the requested format is too complex to work out",
                    param=self._param,
                )
            return self._mask

    def take(self, token_id: int) -> None:
        """See TokenConstraint."""
        with self._is_ready:
            self._has_failed = not self._matcher.consume_token(token_id)
            self._stopped = self._matcher.is_stopped()
            if self._has_failed or self._stopped:
                self._forced = []
                return
            if self._forced and self._forced.pop() == token_id and self._forced:
                self._allow_one(self._forced[-1])
                return
            self._forced = []
            self._is_forced = bool(self._matcher.compute_ff_bytes())
        self._is_ready.acquire()
        worker.submit(self._fill)

    def draft(self, most: int) -> Sequence[int]:
        """See TokenConstraint."""
        if most <= 0 or not (self._forced or self._is_forced):  # or it would wait for the mask
            return ()
        with self._is_ready:
            return self._forced[: -most - 1 : -1]

    @property
    def is_complete(self) -> bool:
        """See TokenConstraint."""
        return self._stopped and not self._has_failed

    def _fill(self) -> None:
        try:
            forced = self._matcher.compute_ff_tokens() if self._is_forced else ()
            if not self._force(forced):
                mask = self._mask
                self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
                if self._permitted is not None:
                    mask &= self._permitted
            self._has_failed = self._matcher.is_error()
        except BaseException:  # a panic of Rust is no Exception
            self._has_failed = True
        finally:
            self._is_ready.release()

    def _force(self, tokens: Sequence[int]) -> bool:
        """Allow nothing but ``tokens``, one after the other; False where that is not to be."""
        if not tokens or not self.forbidden.isdisjoint(tokens):
            return False
        self._forced = list(reversed(tokens))
        self._allow_one(tokens[0])
        return True

    def _allow_one(self, token_id: int) -> None:
        self._mask.fill(0)
        self._mask[token_id // 32] = numpy.uint32(1 << (token_id % 32))


def _bits(ids: Collection[int], words: int) -> Mask:
    bits = numpy.zeros(words * 32, numpy.uint8)
    bits[[token for token in ids if token < len(bits)]] = 1
    return numpy.packbits(bits, bitorder="little").view(numpy.uint32)
