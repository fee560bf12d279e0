"""From a constraint's words to token ids, by llguidance.

``Compiler`` belongs to one tokenizer. Its tables and its compiled grammars are shared; what a
sequence gets (``grammar.GrammarConstraint``) is a copy of its own.
"""

from __future__ import annotations

import re
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakSet

import numpy
import orjson

from transformers_api.errors import (
    ConstraintRefused,
    ConstraintsUnavailable,
    Overloaded,
)
from transformers_api.heap import used_bytes
from transformers_api.serving.constraints.grammar import Grammar
from transformers_api.serving.constraints.listener import (
    ConstraintListener,
    SilentConstraintListener,
)
from transformers_api.serving.constraints.spec import ConstraintSpec
from transformers_api.serving.text.vocabulary import Vocabulary

if TYPE_CHECKING:
    from llguidance import LLTokenizer
    from llguidance._lib import JsonCompileOptions
    from llguidance.gbnf_to_lark import ASTNode

MAX_COMPILED = 64  # grammars that are kept, the least recently used goes first, of so many bytes
MAX_COMPILED_BYTES = 64 << 20
MAX_LIVE_BYTES = 512 << 20  # of all grammars, with those of the requests that are being answered
MAX_GRAMMAR_BYTES = 64 << 20  # of one: no more is due to it, whatever other threads have allocated
_MEMO = 1024  # texts whose tokens are kept, of so many characters at most
_MEMO_CHARS = 64
_SAMPLES = ('{"a b": [1, 2.5], "ü": "x\\n"}', "Hello, world!\n  two", "日本 \N{GRINNING FACE} ok")
# No white space over many lines in front: it would take the square of their number.
_IS_LARK = re.compile(r"(?m)^[^\S\n]*(?:%llguidance\b|start\s*:)")
# Characters of a string in JSON, so many: what stands for all tokens of them at once where a string
# may have as many more. The library's own (10, 30, any) walk over more tokens in short strings.
_SLICES = [rf'[^"\\\x00-\x1F\x7F]{count}' for count in ("{1,8}", "{1,16}", "{1,30}", "+")]
_MARK = "\x02"  # no tokenizer joins it to what follows
_GRAMMAR_LIMITS: dict[str, Any] = {
    "max_items_in_row": 2_000,
    "initial_lexer_fuel": 300_000,  # some 100 bytes each
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 500_000,
    "verbose_errors": False,  # they would show the client's schema in the log
}


class Compiler:
    """Compiles constraints for one tokenizer. From any thread."""

    def __init__(
        self,
        tokenizer: Any,
        vocabulary: Vocabulary,
        size: int,
        end_ids: Collection[int],
        listener: ConstraintListener | None = None,
    ) -> None:
        self._listener = listener or SilentConstraintListener()
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._size = size  # ids below this can be sampled
        self.end_ids = sorted(token for token in end_ids if token < size)
        special = {vocabulary.added[token] for token in vocabulary.special_ids}
        longest_first = sorted(filter(None, special), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._grammars: OrderedDict[ConstraintSpec, Grammar] = OrderedDict()
        self._live: WeakSet[Grammar] = WeakSet()  # those, and others that are in use
        self._lock = threading.Lock()  # of the compiled grammars
        self._compiling = threading.Lock()  # one at a time: it takes a processor

    def compile(self, spec: ConstraintSpec) -> Grammar:
        """The grammar of ``spec``.

        Raises ConstraintRefused, ConstraintsUnavailable, and Overloaded where those of other
        requests take all the memory that grammars may have.
        """
        with self._lock:
            grammar = self._grammars.get(spec)
            if grammar is not None:
                self._grammars.move_to_end(spec)
                return grammar
        with self._compiling:
            self._make_room()
            tables, began = self._tables, time.perf_counter()
            try:
                grammar = self._compiled(spec, tables)
            finally:
                self._listener.on_compile(time.perf_counter() - began)
            self._live.add(grammar)
        with self._lock:
            self._grammars[spec] = grammar
            while len(self._grammars) > MAX_COMPILED or self._size_of_cache() > MAX_COMPILED_BYTES:
                self._grammars.popitem(last=False)
        return grammar

    def _size_of_cache(self) -> int:
        return sum(grammar.size for grammar in self._grammars.values())

    def _live_size(self) -> int:
        return sum(grammar.size for grammar in list(self._live))

    def _make_room(self) -> None:
        if self._live_size() > MAX_LIVE_BYTES:
            with self._lock:
                self._grammars.clear()
        if self._live_size() > MAX_LIVE_BYTES:
            raise Overloaded("The formats that other requests ask for take all memory there is")

    @cached_property
    def spells_text(self) -> bool:
        """True where the tokens can be told as bytes, without which there are no constraints."""
        return all(
            b"".join(map(self._vocabulary.token_bytes, self.encode(sample))) == sample.encode()
            for sample in _SAMPLES
        )

    @property
    def mask_words(self) -> int:
        """Words of a mask."""
        return (max(self._size, self._tables.vocab_size) + 31) // 32

    def encode(self, text: str) -> list[int]:
        """The tokens of a text in the middle of an answer; none of them is special."""
        tokens, start = [], 0
        while match := self._special.search(text, start):  # cut behind its first character
            tokens += self._continued(text[start : match.start() + 1])
            start = match.start() + 1
        return [*tokens, *self._continued(text[start:])]

    def _continued(self, text: str) -> list[int]:
        whole = self._ids(_MARK + text)
        mark = self._ids(_MARK)
        return whole[len(mark) :] if whole[: len(mark)] == mark else self._ids(text)

    def _compiled(self, spec: ConstraintSpec, tables: LLTokenizer) -> Grammar:
        from llguidance import LLMatcher, LLParserLimits

        before = used_bytes()
        limits = LLParserLimits(**_GRAMMAR_LIMITS)
        matcher = LLMatcher(tables, _source(spec), log_level=0, limits=limits)
        if matcher.is_error():
            raise _refusal(spec, matcher.get_error())
        first = numpy.zeros(self.mask_words, numpy.uint32)
        fresh = matcher.deep_copy()
        fresh.unsafe_compute_mask_ptr(first.ctypes.data, first.nbytes)
        if fresh.is_error() or not first.any():
            raise ConstraintRefused(f"'{spec.param}' allows no answer", param=spec.param)
        size = min(max(used_bytes() - before, 0), MAX_GRAMMAR_BYTES)
        return Grammar(matcher, first.tobytes(), spec, size, self._listener)

    @cached_property
    def _tables(self) -> LLTokenizer:
        """The tokens as bytes, in the compiler's own form. Takes some 0.3 s for 50,000 tokens."""
        from llguidance import LLTokenizer

        if not self.spells_text:
            raise ConstraintsUnavailable(
                "The tokens of this model cannot be told as bytes, so that its answers cannot "
                "be held to a format"
            )
        wrapped = _Wrapped(self, self._vocabulary, self._size, self.end_ids)
        return LLTokenizer(cast("Any", wrapped), eos_token=wrapped.end_ids, slices=_SLICES)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids


class _Wrapped:
    """A tokenizer as llguidance wants it (``llguidance.TokenizerWrapper``)."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(
        self, compiler: Compiler, vocabulary: Vocabulary, size: int, end_ids: list[int]
    ) -> None:
        self._encode = compiler.encode
        self._encode_again = lru_cache(_MEMO)(compiler.encode)  # names of fields come often
        self.tokens = [vocabulary.token_bytes(token) for token in range(size)]
        if not end_ids:  # a model that never ends needs one all the same: an id that it lacks
            end_ids = [size]
            self.tokens.append(b"<end>")
        self.end_ids = end_ids
        self.eos_token_id = end_ids[0]
        special = {*vocabulary.special_ids, *end_ids}
        self.special_token_ids = sorted(token for token in special if token < len(self.tokens))

    def __call__(self, text: str | bytes) -> list[int]:
        if isinstance(text, bytes):
            text = text.decode(errors="ignore")
        return self._encode(text) if len(text) > _MEMO_CHARS else list(self._encode_again(text))


def fits(schema: str, value: Any) -> bool:
    """True where a value of JSON fits ``schema``, as far as that can be enforced.

    The properties of its objects are in the schema's order.
    """
    from llguidance import LLMatcher, LLParserLimits

    source = _source(ConstraintSpec(kind="json_schema", source=schema, param="tools"))
    limits = LLParserLimits(**_GRAMMAR_LIMITS)
    matcher = LLMatcher(_bytes_as_tokens(), source, log_level=0, limits=limits)
    if matcher.is_error():
        return True
    return matcher.consume_tokens(list(orjson.dumps(value))) and matcher.is_accepting()


@lru_cache(maxsize=1)
def _bytes_as_tokens() -> LLTokenizer:
    from llguidance import LLTokenizer

    return LLTokenizer("byte")


def _source(spec: ConstraintSpec) -> str:
    """The grammar in the compiler's words."""
    from llguidance import LLMatcher

    if spec.kind == "regex":
        return LLMatcher.grammar_from_regex(spec.source)
    if spec.kind == "tags":
        return _tagged(spec.source)
    if spec.kind == "rules":
        return spec.source if spec.answer is None else _union(spec.source, spec.answer)
    if spec.kind == "lark":
        try:
            lark = spec.source if _IS_LARK.search(spec.source) else _lark_of(spec.source)
            return LLMatcher.grammar_from_lark(lark)
        except Exception as error:  # its parser raises what it likes, RecursionError among them
            raise _refusal(spec, str(error)) from None
    options: dict[str, Any] = {"whitespace_flexible": False, "lenient": not spec.strict}
    if spec.whitespace is None:
        options |= {"item_separator": ", ?", "key_separator": ": ?"}
    elif spec.whitespace:
        options |= {"whitespace_flexible": True, "whitespace_pattern": spec.whitespace}
    try:
        overrides = cast("JsonCompileOptions", options)
        return LLMatcher.grammar_from_json_schema(spec.source, overrides=overrides)
    except ValueError as error:
        raise _refusal(spec, str(error)) from None


def _union(rules: str, answer: ConstraintSpec) -> str:
    """The grammar of ``rules``, in which ``@answer`` stands for another one."""
    source = _source(answer)
    listed = [{"lark_grammar": source}]
    if source.startswith("{"):
        listed = orjson.loads(source)["grammars"]
    (other,) = listed
    return orjson.dumps(
        {"grammars": [{"lark_grammar": rules}, {**other, "name": "answer"}]}
    ).decode()


def _lark_of(gbnf: str) -> str:
    """A grammar of llama.cpp's in Lark. Raises what the converter does.

    It looks for rules that are terminals until a round brings no new one: in the order of their
    uses there are two rounds, in any other as many as there are rules.
    """
    from llguidance.gbnf_to_lark import GrammarParser, resolve

    parsed = GrammarParser().parse(gbnf)
    uses = {name: _rules_in(rule) for name, rule in parsed.items()}
    rules = {name: parsed[name] for name in _uses_first(uses)}
    resolve(rules)
    return "\n\n".join(["%llguidance {}", *map(str, rules.values())])


def _rules_in(rule: ASTNode) -> list[str]:
    """The names of the rules that stand in one."""
    from llguidance.gbnf_to_lark import RuleRefNode

    names, waiting = [], [rule]
    while waiting:
        node = waiting.pop()
        if isinstance(node, RuleRefNode):
            names.append(node.name)
        waiting += node.children()
    return names


def _uses_first(uses: Mapping[str, Sequence[str]]) -> list[str]:
    """The names, each behind those that it uses, but for circles."""
    ordered: dict[str, None] = {}
    visited: set[str] = set()
    waiting = [*reversed(list(uses))]
    while waiting:
        name = waiting[-1]
        if name in visited or name not in uses:
            waiting.pop()
            if name in uses:
                ordered.setdefault(name)
            continue
        visited.add(name)
        waiting += [used for used in uses[name] if used not in visited]
    return list(ordered)


def _tagged(source: str) -> str:
    """Free text with tags, each of which holds what its schema says."""
    from llguidance import StructTag

    tags = [
        StructTag(trigger=tag["trigger"], begin=tag["begin"], grammar=tag["schema"], end=tag["end"])
        for tag in orjson.loads(source)
    ]
    return StructTag.to_grammar(tags, assume_special=False)


def _refusal(spec: ConstraintSpec, message: str) -> ConstraintRefused:
    lines = filter(None, map(str.strip, message.splitlines()))
    reason = " ".join(lines)[:300] or "it is not understood"
    return ConstraintRefused(f"'{spec.param}' cannot be enforced: {reason}", param=spec.param)
