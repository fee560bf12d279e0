"""Linear layers and embeddings over packed weights, in the place of torch's."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from transformers_api.kernels.abi import TYPE_NUMBERS, TYPES, WEIGHT_TYPES, Library, Weight
from transformers_api.kernels.capture import current
from transformers_api.kernels.modules.blocks import Blocks, Matrix, Pieces
from transformers_api.kernels.modules.weight_memory import WeightMemory

LONG = 64  # rows from which a call releases the interpreter's lock


CENTRED = TYPE_NUMBERS["I4C"]
QUANTIZED = {WEIGHT_TYPES["int8"], WEIGHT_TYPES["int4"], CENTRED}
UNPACKED_BYTES = 4 << 20  # of float32 at once
PANEL = 32  # rows that lie together in packed weights


class PackedWeight:
    """A weight matrix (out, in) as the kernels read it: ``kind`` float32, bfloat16, int8 or int4.

    int8: groups of 32 along ``in`` with a scale each; inputs are quantised in the same groups, but
    by AMX, where both become bfloat16.
    int4: scale and minimum of each group, found by search; inputs as for int8. Where all of it is
    Q4_0 there are no minima, and it takes a tenth less memory. ``error`` is the norm of the
    quantisation error relative to that of the weights, of int4 and of blocks, whose codes stay as
    they are where the kind has room for them. bfloat16: inputs are rounded to bfloat16. Sums are
    float32 everywhere. ``number``: its place in the order of packing.
    """

    error = 0.0
    sources: Sequence[Any] = ()  # what it is made of, where that can be read again

    def __init__(
        self, library: Library, weights: list[Matrix], kind: str, memory: WeightMemory
    ) -> None:
        self.library = library
        self.out_features, self.in_features = sum(len(w) for w in weights), weights[0].shape[1]
        self._weight = Weight(type=WEIGHT_TYPES[kind], n=self.out_features, k=self.in_features)
        self._is_int4 = kind == "int4"
        self._bias: Tensor | None = None
        self._address = ctypes.addressof(self._weight)
        self.number = memory.next_number()
        self.fill(weights, memory)

    def fill(self, weights: list[Matrix], memory: WeightMemory) -> None:
        """Pack ``weights``, one below the other, unless ``memory`` has them already.

        Raises ValueError if they are of other sizes, OtherWeights.
        """
        shapes = {(sum(len(w) for w in weights), w.shape[1]) for w in weights}
        if shapes != {(self.out_features, self.in_features)}:
            raise ValueError(f"weights of {shapes}, not {self.out_features, self.in_features}")
        if self._is_int4:
            is_centred = all(isinstance(w, Blocks) and w.is_centred for w in weights)
            self._weight.type = CENTRED if is_centred else WEIGHT_TYPES["int4"]
        size = self.library.with_gil.packed_bytes(self._weight)
        if (stored := memory.stored(self.number, self._weight, size)) is not None:
            self._memory, self.error = stored
            self._weight.data = self._memory.data_ptr()
            return
        self._memory = memory.take(size)
        self._weight.data = self._memory.data_ptr()
        first = 0
        sums = torch.zeros(self.out_features, 2, dtype=torch.float64)  # squared errors, squares
        for weight in weights:
            is_left = not self._is_int4 and memory.packs_later(
                self._weight, first, weight, self._memory
            )
            for row, piece in () if is_left else self._pieces(weight):
                self._put(piece, first + row, sums[first + row :], memory)
            first += len(weight)
        if sums[:, 1].any():
            error = math.sqrt(sums[:, 0].sum() / sums[:, 1].sum())
            self.error = error if math.isfinite(error) else math.inf

    def _pieces(self, weight: Matrix) -> Iterator[tuple[int, Tensor | Blocks]]:
        """The parts of a matrix, each with the number of its first row."""
        if not isinstance(weight, Pieces):
            yield 0, weight
            return
        for row in range(0, len(weight), at_once := self._rows_at_once()):
            yield row, weight.make(row, min(at_once, len(weight) - row))

    def _put(self, weight: Tensor | Blocks, first: int, sums: Tensor, memory: WeightMemory) -> None:
        if isinstance(weight, Tensor):
            self._pack(weight, first, sums)
        elif self._weight.type in QUANTIZED:
            self._pack_blocks(weight, first, sums)
        else:
            self._unpack_blocks(weight, first, sums, memory)

    def _pack(self, weight: Tensor, first: int, sums: Tensor) -> None:
        dense = weight.detach()
        dense = (dense if dense.dtype in TYPES else dense.float()).contiguous()
        arguments = self._weight, dense.data_ptr(), TYPES[dense.dtype], first, len(dense)
        if self._is_int4:
            self.library.without_gil.pack_int4(*arguments, sums.data_ptr())
        else:
            self.library.without_gil.pack(*arguments)

    def _pack_blocks(self, weight: Blocks, first: int, sums: Tensor) -> None:
        weight.check(self.library)
        order = None if weight.order is None else weight.order.data_ptr()
        self.library.without_gil.pack_blocks(
            self._weight,
            weight.memory.data_ptr(),
            weight.number,
            order,
            first,
            len(weight),
            sums.data_ptr(),
        )

    def _unpack_blocks(
        self, weight: Blocks, first: int, sums: Tensor, memory: WeightMemory
    ) -> None:
        weight.check(self.library)
        for row in range(0, len(weight), at_once := self._rows_at_once()):
            count = min(at_once, len(weight) - row)
            numbers = memory.numbers(count, self.in_features)
            weight.read(self.library, torch.arange(row, row + count), numbers)
            self._pack(numbers, first + row, sums[row:])

    def _rows_at_once(self) -> int:
        """Whole panels, which are packed the fastest."""
        return max(UNPACKED_BYTES // (4 * self.in_features) // PANEL, 1) * PANEL

    @property
    def address(self) -> int:
        """The address of its Weight structure, constant during its life."""
        return self._address

    def release(self) -> None:
        """Give the memory back; ``fill`` before the next product."""
        self._memory, self._weight.data = torch.empty(0, dtype=torch.uint8), None

    @property
    def memory(self) -> Tensor:
        """The packed form, in bytes; none of them after ``release``."""
        return self._memory

    @property
    def kind_number(self) -> int:
        """The number of its kind, as the kernels have it."""
        return int(self._weight.type)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed form."""
        return self._memory.nbytes

    @property
    def bias(self) -> Tensor | None:
        """The bias (out) of every result."""
        return self._bias

    def set_bias(self, bias: Tensor) -> None:
        """Add ``bias`` (out) to every result."""
        self._bias = bias.detach().float().contiguous()
        self._weight.bias = self._bias.data_ptr()

    def multiply(self, x: Tensor) -> Tensor:
        """The product of ``x`` (…, in): (…, out), of the same dtype, float32 or bfloat16."""
        if not x.is_contiguous():
            x = x.contiguous()
        shape = x.shape
        rows = x.numel() // self.in_features
        if recorder := current():  # a recording needs no numbers
            y = torch.zeros((*shape[:-1], self.out_features), dtype=x.dtype)
            recorder.add("linear", y, [x], (rows,), call=self._address)
            return y
        y = x.new_empty((*shape[:-1], self.out_features))
        call = self.library.with_gil if rows < LONG else self.library.without_gil
        call.linear(
            self._address, x.data_ptr(), rows, self.in_features, y.data_ptr(), TYPES[x.dtype]
        )
        return y

    def rows(self, indices: Tensor) -> Tensor:
        """The rows ``indices`` (…) as (…, in) float32."""
        indices = indices.contiguous()
        shape = (*indices.shape, self.in_features)
        if recorder := current():
            rows = torch.zeros(shape)
            size = (indices.numel(),)
            recorder.add("unpack_rows", rows, [indices], size, call=self._address)
            return rows
        rows = torch.empty(shape)
        self.library.with_gil.unpack_rows(
            self._weight, indices.data_ptr(), indices.numel(), rows.data_ptr()
        )
        return rows

    def dense(self) -> Tensor:
        """The matrix (out, in) as float32, after quantisation."""
        return self.rows(torch.arange(self.out_features))


FEW = 8  # times fewer rows than there are: then these alone are unpacked


class _Multiply(torch.autograd.Function):
    """Differentiable with respect to the input; the weights are fixed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: PackedWeight) -> Tensor:
        ctx.weight = weight
        return weight.multiply(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        (places,) = gradient.reshape(-1, gradient.shape[-1]).any(0).nonzero(as_tuple=True)
        if FEW * len(places) < gradient.shape[-1]:  # of few outputs, as of one logit
            product = gradient[..., places].float() @ ctx.weight.rows(places)
        else:
            product = gradient.float() @ ctx.weight.dense()
        return product.to(gradient.dtype), None


class JoinedWeights:
    """The weights of layers with the same input: the first layer called computes all products."""

    def __init__(self, weight: PackedWeight, sizes: list[int]) -> None:
        self.weight = weight
        self.sizes = sizes
        self._x: Tensor | None = None
        self._parts: dict[int, Tensor] = {}

    def part(self, index: int, x: Tensor) -> Tensor:
        """The output of layer ``index`` for ``x``; each part is returned once."""
        if x is not self._x or index not in self._parts:
            self._x, self._parts = (
                x,
                dict(enumerate(torch.split(multiply(self.weight, x), self.sizes, -1))),
            )
        part = self._parts.pop(index)
        if not self._parts:
            self._x = None
        return part


def multiply(weight: PackedWeight, x: Tensor) -> Tensor:
    """``weight.multiply``, with a gradient where one is required."""
    if x.requires_grad and torch.is_grad_enabled():
        return cast(Tensor, _Multiply.apply(x, weight))  # type: ignore[no-untyped-call]
    return weight.multiply(x)


class NativeLinear(nn.Module):
    """A Linear whose weights are in ``joined``; its own ``weight`` (meta) is only a shape."""

    only_multiplies = True  # see engine/places.py

    def __init__(
        self, joined: JoinedWeights, index: int, weight: Tensor, is_transposed: bool = False
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = joined.weight.in_features, joined.sizes[index]
        self.joined = joined
        self.index = index
        self.weight = weight
        self.is_transposed = is_transposed  # in the checkpoint
        self.bias = None
        self._alone = joined.weight if len(joined.sizes) == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (…, in) to (…, out)."""
        if self._alone is not None:
            return multiply(self._alone, x)
        return self.joined.part(self.index, x)


def scale_of(scale: Any) -> Tensor | None:
    """The factor of all numbers of an embedding, as a tensor; None: none."""
    return None if scale is None else torch.as_tensor(scale, dtype=torch.float32)


class NativeEmbedding(nn.Module):
    """An Embedding over packed weights, which the output layer may share."""

    scale: Tensor | None

    def __init__(self, packed: PackedWeight, weight: Tensor, scale: Any = None) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = packed.out_features, packed.in_features
        self.packed = packed
        self.weight = weight
        self.register_buffer("scale", scale_of(scale), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Map ``ids`` (…) to (…, embedding_dim) float32."""
        rows = self.packed.rows(ids)
        return rows if self.scale is None else rows * self.scale
