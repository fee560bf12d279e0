"""Loop nests of operations, and loop fusion over tokens.

Between two matrix products a pass has dozens of small operations. Where each computes for a token
what the next one reads for the same token only, a thread can run all of them for a tile of tokens,
without a barrier in between and with the numbers in its cache. Sizes and strides prove it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from transformers_api.kernels.capture import Operation

Pair = tuple[int, int]
Strides = tuple[int, ...]
Dimension = tuple[Pair, tuple[Strides, Strides]]  # sizes, strides of the operands; of two passes
DIMENSIONS = 4
# These need the last dimension whole.
REDUCTIONS = ("mean", "sum", "largest")
ROW_OPS = (*REDUCTIONS, "softmax", "layer_norm", "gather", "matmul", "top_k", "take", "put")
WHOLE = ("layer_norm", "gather", "matmul")  # with operands that are the same for every line
KERNELS = ("linear", "experts", "attention", "write_cache", "read_cache", "unpack_rows")


class NotRecordable(Exception):
    """A forward pass that the native program cannot run; the text says why."""


@dataclass(frozen=True)
class LoopNest:
    """The loops of one step in both passes: sizes, and strides of each operand."""

    sizes: tuple[Strides, Strides]
    strides: tuple[list[Strides], list[Strides]]


@dataclass
class StepGroup:
    """The steps ``begin`` to ``end``. With ``loops`` they are fused, token by token.

    ``opens_with_product``: the first one is a product, for which there are no loops: see gates.py.
    """

    begin: int
    end: int
    loops: list[LoopNest] | None = None
    opens_with_product: bool = False


def collapsed_loops(a: Operation, b: Operation) -> LoopNest:
    """The step with as few dimensions as describe it."""
    return _loop_nest(a, _merged(_dimensions(a, b), a.op), 0)


def step_groups(
    pairs: list[tuple[Operation, Operation]], sizes: Pair, cuts: Collection[int] = ()
) -> Iterator[StepGroup]:
    """All steps in order, fused where possible; ``sizes`` are the tokens of the two passes.

    No group goes on over one of the ``cuts``, numbers of steps: the pass may stop there.
    """
    group: _Group | None = None
    cache: dict[Any, LoopNest | None] = {}  # a model's layers are alike
    for i, (a, b) in enumerate(pairs):
        key = _signature(a), _signature(b)
        if key not in cache:
            cache[key] = _token_loops(a, b, sizes)
        loops = cache[key]
        if group and i in cuts:
            yield group.steps
            group = None
        if group and loops and group.accepts(a, b, loops):
            group.steps.end = i + 1
            continue
        if group:
            yield group.steps
        group = _Group(StepGroup(i, i + 1, []), sizes) if loops else None
        if not (group and loops and group.accepts(a, b, loops)):
            yield StepGroup(i, i + 1)
            group = None
    if group:
        yield group.steps


def _signature(operation: Operation) -> Any:
    """A key of all that a loop nest depends on."""
    shapes = tuple((ref.tensor.shape, ref.tensor.stride()) for ref in operation.refs)
    return operation.op, tuple(operation.sizes), shapes


@dataclass
class _Group:
    """The fused steps so far, and the token strides of the storages that they touch."""

    steps: StepGroup
    sizes: Pair
    strides: dict[Pair, set[Pair | None]] = field(default_factory=dict)  # of each storage
    written: set[Pair] = field(default_factory=set)

    def accepts(self, a: Operation, b: Operation, loops: LoopNest) -> bool:
        """Add a step, if no token of it depends on the steps of another token."""
        added: dict[Pair, set[Pair | None]] = {}
        result: Pair | None = None
        for i, (x, y) in enumerate(zip(a.refs, b.refs, strict=True)):
            if not x.is_dynamic:
                continue
            storage = x.storage, y.storage
            own = [self._token_bytes(r, loops, i, which) for which, r in enumerate((x, y))]
            both = None if own[0] is None or own[1] is None else (own[0], own[1])
            added.setdefault(storage, set()).add(both)
            if a.op != "write_cache" and i == len(a.refs) - 1:
                result = storage
        for storage, own_strides in added.items():
            strides = own_strides | self.strides.get(storage, set())
            is_written = storage == result or storage in self.written
            if is_written and (len(strides) > 1 or None in strides):
                return False
        for storage, own_strides in added.items():
            self.strides.setdefault(storage, set()).update(own_strides)
        if result is not None:
            self.written.add(result)
        assert self.steps.loops is not None
        self.steps.loops.append(loops)
        return True

    def _token_bytes(self, ref: Any, loops: LoopNest, index: int, which: int) -> int | None:
        """Bytes from a token to the next, if tokens share no memory of the operand; else None.

        Its memory is then a table with a column for each token, and all that belongs to a token
        lies in its column.
        """
        item = ref.tensor.element_size()
        sizes, strides = loops.sizes[which], loops.strides[which][index]
        column = strides[0] * item
        table = column * self.sizes[which]
        if column <= 0:
            return None
        inner = [
            (n - 1) * stride * item
            for n, stride in zip(sizes[1:], strides[1:], strict=True)
            if n > 1 and stride * item % table
        ]
        fits = ref.offset % table + sum(inner) + item <= column
        return column if fits else None


def _token_loops(a: Operation, b: Operation, sizes: Pair) -> LoopNest | None:
    """The loop nest with the tokens as its first dimension; None if there is none such."""
    if a.op == "write_cache":
        return _cache_loops(a, b, sizes)
    if a.op in KERNELS:
        return None
    dims = _dimensions(a, b)
    growing = [d for d, (size, _) in enumerate(dims) if size[0] != size[1]]
    if len(growing) != 1 or (a.op in ROW_OPS and growing[0] == len(dims) - 1):
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
    return _loop_nest(a, others, 1, tokens)


def _cache_loops(a: Operation, b: Operation, sizes: Pair) -> LoopNest | None:
    """The loop nest of new keys or values (B, G, T, D): a token of many rows, or many of one."""
    shapes = [operation.refs[0].tensor.shape for operation in (a, b)]
    axes = [d for d in (0, 2) if (shapes[0][d], shapes[1][d]) == sizes]
    if len(axes) != 1 or shapes[0][2 - axes[0]] != 1:
        return None
    order = [axes[0], *(d for d in range(DIMENSIONS) if d != axes[0])]
    none = (0,) * DIMENSIONS
    views = [
        (tuple(tensor.shape[d] for d in order), tuple(tensor.stride(d) for d in order))
        for tensor in (operation.refs[0].tensor for operation in (a, b))
    ]
    strides = [[states, *([none] * (len(a.refs) - 1))] for _, states in views]
    return LoopNest((views[0][0], views[1][0]), (strides[0], strides[1]))


def _dimensions(a: Operation, b: Operation) -> list[Dimension]:
    strides = [[_strides(r, i) for i in range(len(r.refs))] for r in (a, b)]
    sizes = zip(a.sizes, b.sizes, strict=True)
    return [
        (size, (tuple(s[d] for s in strides[0]), tuple(s[d] for s in strides[1])))
        for d, size in enumerate(sizes)
    ]


def _merged(dims: list[Dimension], op: str) -> list[Dimension]:
    """The loops with adjacent dimensions collapsed where strides permit it."""
    collapsed: list[Dimension] = []
    for d, (size, inner) in enumerate(dims):
        is_row = d == len(dims) - 1 and op in ROW_OPS
        if size == (1, 1) and not is_row:
            continue
        if collapsed and not is_row and _can_collapse(collapsed[-1][1], size, inner):
            outer = collapsed.pop()[0]
            size = outer[0] * size[0], outer[1] * size[1]
        collapsed.append((size, inner))
    return collapsed


def _loop_nest(
    operation: Operation, dims: list[Dimension], first: int, tokens: Dimension | None = None
) -> LoopNest:
    """Pad to four dimensions: ``tokens``, if they are apart, then the others, last ones last."""
    if len(dims) + first > DIMENSIONS:
        raise NotRecordable(f"{operation.op} over {len(dims)} dimensions")
    none = (0,) * len(operation.refs)
    filled = [((1, 1), (none, none))] * (DIMENSIONS - first - len(dims)) + dims
    filled = ([tokens] if tokens else []) + filled
    a, b = (
        (
            tuple(size[which] for size, _ in filled),
            [tuple(inner[which][i] for _, inner in filled) for i in range(len(operation.refs))],
        )
        for which in (0, 1)
    )
    return LoopNest((a[0], b[0]), (a[1], b[1]))


def _can_collapse(
    outer: tuple[Strides, Strides], size: Pair, inner: tuple[Strides, Strides]
) -> bool:
    """True where the outer dimension continues the inner one, for every operand."""
    return all(
        o == n * i
        for n, outers, inners in zip(size, outer, inner, strict=True)
        for o, i in zip(outers, inners, strict=True)
    )


def _scaled(strides: tuple[Strides, Strides], times: int) -> tuple[Strides, Strides]:
    a, b = (tuple(times * stride for stride in each) for each in strides)
    return a, b


def _strides(operation: Operation, index: int) -> Strides:
    """Strides of an operand along the operation's dimensions; 0 where it is broadcast."""
    dimensions = len(operation.sizes)
    is_out = index == len(operation.refs) - 1
    if operation.op in WHOLE and index > 0 and not is_out:
        return (0,) * dimensions  # weights, bias or a table: whole for every line
    tensor = operation.refs[index].tensor
    sizes, strides = tuple(tensor.shape), tensor.stride()
    if operation.op == "gather" and index == 0:
        sizes, strides = (*sizes, 1), (*strides, 0)
    own = tuple(0 if n == 1 else s for n, s in zip(sizes, strides, strict=True))
    if _is_line(operation.op, index, is_out):
        own = (*own[:-1], 0)
    return (0,) * (dimensions - len(own)) + own


def _is_line(op: str, index: int, is_out: bool) -> bool:
    """True for an operand whose lines, which lie together, are longer or shorter than the loop."""
    return (op in ("matmul", "take") and index == 0) or (op in ("top_k", "put") and is_out)
