"""Operations as loops over four dimensions, and which of them can be done token by token.

Between two products a pass has dozens of small operations. If each makes of a token what the next
one reads for the same token only, then a thread can do all of them for its tokens, without waiting
for the others and with the numbers in its cache. That they do is seen from sizes and strides.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from transformers_api.kernels.capture import Recorded

Pair = tuple[int, int]
Strides = tuple[int, ...]
Dimension = tuple[Pair, tuple[Strides, Strides]]  # sizes, strides of the operands; of two passes
DIMENSIONS = 4
UNITS = ("mean", "layer_norm", "gather")  # these need the last dimension whole
KERNELS = ("linear", "attention", "write_cache", "unpack_rows")


class NotRecordable(Exception):
    """The forward pass has something in it that the native program cannot do."""


@dataclass(frozen=True)
class Lines:
    """Sizes, and strides of each operand, of one step in two passes."""

    sizes: tuple[Strides, Strides]
    strides: tuple[list[Strides], list[Strides]]


@dataclass
class Unit:
    """Steps ``begin`` to ``end``. With ``lines`` they are done together, token by token."""

    begin: int
    end: int
    lines: list[Lines] | None = None


def plain_lines(a: Recorded, b: Recorded) -> Lines:
    """As few dimensions as describe the step."""
    return _lines(a, _merged(_dimensions(a, b), a.op), 0)


def units(pairs: list[tuple[Recorded, Recorded]], sizes: Pair) -> Iterator[Unit]:
    """All steps, in order; ``sizes`` are the tokens of the two passes."""
    group: _Group | None = None
    known: dict[Any, Lines | None] = {}  # a model's layers are alike
    for i, (a, b) in enumerate(pairs):
        look = _look(a), _look(b)
        if look not in known:
            known[look] = _token_lines(a, b, sizes)
        lines = known[look]
        if group and lines and group.takes(a, b, lines):
            group.unit.end = i + 1
            continue
        if group:
            yield group.unit
        group = _Group(Unit(i, i + 1, []), sizes) if lines else None
        if not (group and lines and group.takes(a, b, lines)):
            yield Unit(i, i + 1)
            group = None
    if group:
        yield group.unit


def _look(recorded: Recorded) -> Any:
    """All that lines depend on."""
    shapes = tuple((ref.tensor.shape, ref.tensor.stride()) for ref in recorded.refs)
    return recorded.op, tuple(recorded.sizes), shapes


@dataclass
class _Group:
    """Steps that go together so far."""

    unit: Unit
    sizes: Pair
    strides: dict[Pair, set[Pair | None]] = field(default_factory=dict)  # of each storage
    written: set[Pair] = field(default_factory=set)

    def takes(self, a: Recorded, b: Recorded, lines: Lines) -> bool:
        """Add a step, if no token of it needs what another token's steps make."""
        added: dict[Pair, set[Pair | None]] = {}
        result: Pair | None = None
        for i, (x, y) in enumerate(zip(a.refs, b.refs, strict=True)):
            if not x.is_dynamic:
                continue
            storage = x.storage, y.storage
            own = [self._own_bytes(r, lines, i, which) for which, r in enumerate((x, y))]
            both = None if own[0] is None or own[1] is None else (own[0], own[1])
            added.setdefault(storage, set()).add(both)
            if a.op != "write_cache" and i == len(a.refs) - 1:
                result = storage
        for storage, own_strides in added.items():
            known = own_strides | self.strides.get(storage, set())
            is_written = storage == result or storage in self.written
            if is_written and (len(known) > 1 or None in known):
                return False
        for storage, own_strides in added.items():
            self.strides.setdefault(storage, set()).update(own_strides)
        if result is not None:
            self.written.add(result)
        assert self.unit.lines is not None
        self.unit.lines.append(lines)
        return True

    def _own_bytes(self, ref: Any, lines: Lines, index: int, which: int) -> int | None:
        """Bytes from a token to the next, if the operand's numbers for a token are its own.

        Its memory is then a table with a column for each token, read from left to right, and all
        that belongs to a token lies in its column.
        """
        unit = ref.tensor.element_size()
        sizes, strides = lines.sizes[which], lines.strides[which][index]
        column = strides[0] * unit
        table = column * self.sizes[which]
        if column <= 0:
            return None
        inner = [
            (n - 1) * stride * unit
            for n, stride in zip(sizes[1:], strides[1:], strict=True)
            if n > 1 and stride * unit % table
        ]
        fits = ref.offset % table + sum(inner) + unit <= column
        return column if fits else None


def _token_lines(a: Recorded, b: Recorded, sizes: Pair) -> Lines | None:
    """With the tokens as the first dimension, whose size is theirs; None if that cannot be."""
    if a.op == "write_cache":
        return _cache_lines(a, b, sizes)
    if a.op in KERNELS:
        return None
    dims = _dimensions(a, b)
    growing = [d for d, (size, _) in enumerate(dims) if size[0] != size[1]]
    if len(growing) != 1 or (a.op in UNITS and growing[0] == len(dims) - 1):
        return None
    (at,) = growing
    size, strides = dims[at]
    times, rest = divmod(size[0], sizes[0])
    if rest or size[1] != times * sizes[1]:
        return None
    tokens = sizes, _scaled(strides, times)
    others = _merged([*dims[:at], ((times, times), strides), *dims[at + 1 :]], a.op)
    if len(others) >= DIMENSIONS:
        return None
    return _lines(a, others, 1, tokens)


def _cache_lines(a: Recorded, b: Recorded, sizes: Pair) -> Lines | None:
    """New keys or values (B, G, T, D): one token of many rows, or many of one row."""
    shapes = [recorded.refs[0].tensor.shape for recorded in (a, b)]
    axes = [d for d in (0, 2) if (shapes[0][d], shapes[1][d]) == sizes]
    if len(axes) != 1 or shapes[0][2 - axes[0]] != 1:
        return None
    order = [axes[0], *(d for d in range(DIMENSIONS) if d != axes[0])]
    none = (0,) * DIMENSIONS
    made = [
        (tuple(tensor.shape[d] for d in order), tuple(tensor.stride(d) for d in order))
        for tensor in (recorded.refs[0].tensor for recorded in (a, b))
    ]
    strides = [[states, *([none] * (len(a.refs) - 1))] for _, states in made]
    return Lines((made[0][0], made[1][0]), (strides[0], strides[1]))


def _dimensions(a: Recorded, b: Recorded) -> list[Dimension]:
    strides = [[_strides(r, i) for i in range(len(r.refs))] for r in (a, b)]
    sizes = zip(a.sizes, b.sizes, strict=True)
    return [
        (size, (tuple(s[d] for s in strides[0]), tuple(s[d] for s in strides[1])))
        for d, size in enumerate(sizes)
    ]


def _merged(dims: list[Dimension], op: str) -> list[Dimension]:
    """The same loops with fewer dimensions, where one goes on in another."""
    made: list[Dimension] = []
    for d, (size, inner) in enumerate(dims):
        is_unit = d == len(dims) - 1 and op in UNITS
        if size == (1, 1) and not is_unit:
            continue
        if made and not is_unit and _follow(made[-1][1], size, inner):
            outer = made.pop()[0]
            size = outer[0] * size[0], outer[1] * size[1]
        made.append((size, inner))
    return made


def _lines(
    recorded: Recorded, dims: list[Dimension], first: int, tokens: Dimension | None = None
) -> Lines:
    """In four dimensions: ``tokens``, if they are apart, then the others, last ones last."""
    if len(dims) + first > DIMENSIONS:
        raise NotRecordable(f"{recorded.op} over {len(dims)} dimensions")
    none = (0,) * len(recorded.refs)
    filled = [((1, 1), (none, none))] * (DIMENSIONS - first - len(dims)) + dims
    filled = ([tokens] if tokens else []) + filled
    a, b = (
        (
            tuple(size[which] for size, _ in filled),
            [tuple(inner[which][i] for _, inner in filled) for i in range(len(recorded.refs))],
        )
        for which in (0, 1)
    )
    return Lines((a[0], b[0]), (a[1], b[1]))


def _follow(outer: tuple[Strides, Strides], size: Pair, inner: tuple[Strides, Strides]) -> bool:
    """Whether the outer dimension goes on where the inner one ends, for every operand."""
    return all(
        o == n * i
        for n, outers, inners in zip(size, outer, inner, strict=True)
        for o, i in zip(outers, inners, strict=True)
    )


def _scaled(strides: tuple[Strides, Strides], times: int) -> tuple[Strides, Strides]:
    a, b = (tuple(times * stride for stride in each) for each in strides)
    return a, b


def _strides(recorded: Recorded, index: int) -> Strides:
    """Strides of an operand along the operation's dimensions; 0 where it is repeated."""
    dimensions = len(recorded.sizes)
    if recorded.op in ("layer_norm", "gather") and 0 < index < len(recorded.refs) - 1:
        return (0,) * dimensions  # weights, bias or a table: whole for every line
    tensor = recorded.refs[index].tensor
    sizes, strides = tuple(tensor.shape), tensor.stride()
    if recorded.op == "gather" and index == 0:
        sizes, strides = (*sizes, 1), (*strides, 0)
    own = tuple(0 if n == 1 else s for n, s in zip(sizes, strides, strict=True))
    return (0,) * (dimensions - len(own)) + own
