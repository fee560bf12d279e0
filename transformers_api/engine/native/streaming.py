"""The weights of files on their way into packed ones, without ever being numbers at once."""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from transformers_api.engine.gguf_weights import FLOATS, GgufWeights, StoredMatrix
from transformers_api.engine.stored_weights import StoredRows, StoredWeights
from transformers_api.kernels.abi import Library
from transformers_api.kernels.modules.blocks import KINDS, PLAIN, Blocks, Matrix, Pieces, number_of
from transformers_api.kernels.modules.experts import Sources, stream_experts
from transformers_api.kernels.modules.replace import is_embedding
from transformers_api.kernels.modules.streamed import Source, StreamedEmbedding, StreamedLinear

LAYERS = (nn.Linear, Conv1D)
BYTES = {"int8": 34 / 32, "int4": 20 / 32}  # of a packed weight
CENTRED_BYTES = {"Q4_0": 18 / 32}


@dataclass(frozen=True)
class GgufSource:
    """Meets Source: a matrix of a GGUF file."""

    library: Library
    stored: StoredMatrix
    weights: GgufWeights

    @property
    def shape(self) -> tuple[int, int]:
        """See Source."""
        return self.stored.shape

    @property
    def exact(self) -> str | None:
        """See Source."""
        return None

    @property
    def width(self) -> str | None:
        """See Source. int8 for types that the kernels do not read."""
        if self.stored.floats() is not None:
            return None
        return KINDS[self.stored.kind][1] if self.stored.kind in KINDS else "int8"

    def matrix(self) -> Matrix:
        """See Source."""
        stored = self.stored
        if (floats := stored.floats()) is not None:
            return floats
        return self._blocks() or self._numbers()

    def _blocks(self) -> Blocks | None:
        stored = self.stored
        if stored.kind not in KINDS:
            return None
        return Blocks(stored.memory, stored.kind, stored.shape, stored.order)

    def _numbers(self) -> Tensor:
        stored = self.stored
        if (floats := stored.floats()) is not None:
            return floats
        dense = self.weights.dequantize(stored.memory, stored.kind, stored.shape)
        return dense if stored.order is None else dense[stored.order]

    def product(self, x: Tensor) -> Tensor | None:
        """See Source."""
        stored = self.stored
        return _product(self.library, stored.memory, stored.kind, stored.shape, stored.order, x)

    def rows(self, first: int, count: int) -> Tensor:
        """See Source."""
        if (blocks := self._blocks()) is not None:
            return blocks.rows(self.library, first, count)
        return self._numbers()[first : first + count]

    def gather(self, indices: Tensor) -> Tensor:
        """See Source."""
        if (blocks := self._blocks()) is not None:
            return blocks.gather(self.library, indices)
        return self._numbers()[indices]

    def release(self) -> None:
        """See Source."""
        self.stored.release()


@dataclass(frozen=True)
class RowSource:
    """Meets Source: a matrix that is read some rows at a time."""

    library: Library
    stored: StoredRows

    @property
    def shape(self) -> tuple[int, int]:
        """See Source."""
        return self.stored.shape

    @property
    def width(self) -> str | None:
        """See Source."""
        return self.stored.width

    @property
    def exact(self) -> str | None:
        """See Source."""
        if self.stored.width is not None:
            return None
        return "bfloat16" if self.stored.dtype == torch.bfloat16 else "float32"

    def matrix(self) -> Matrix:
        """See Source."""
        return Pieces(self.shape, self._piece, self._whole())

    def _whole(self) -> Tensor | None:
        if self.stored.kind is not None or (lying := self.stored.lying()) is None:
            return None
        return lying[0].view(self.stored.dtype).view(self.shape)

    def _piece(self, first: int, count: int) -> Tensor | Blocks:
        if self.stored.kind is None:
            return self.stored.rows(first, count)
        blocks = self.stored.blocks(first, count)
        return Blocks(blocks, self.stored.kind, (count, self.shape[1]))

    def product(self, x: Tensor) -> Tensor | None:
        """See Source."""
        if (lying := self.stored.lying()) is None:
            return None
        return _product(self.library, *lying, self.shape, None, x)

    def rows(self, first: int, count: int) -> Tensor:
        """See Source."""
        return self.stored.rows(first, count)

    def gather(self, indices: Tensor) -> Tensor:
        """See Source."""
        return self.stored.gather(indices)

    def release(self) -> None:
        """See Source."""
        self.stored.release()


def _product(
    library: Library,
    memory: Tensor,
    kind: str,
    shape: tuple[int, int],
    order: Tensor | None,
    x: Tensor,
) -> Tensor | None:
    """The product of ``x`` with a matrix in a file; None for types that the kernels do not read."""
    is_read = kind in KINDS or kind in PLAIN
    if not is_read or not library.with_gil.block_row_bytes(number_of(kind), shape[1]):
        return None
    return Blocks(memory, kind, shape, order).multiply(library, x)


def fill_streamed(library: Library, model: Any, stored: StoredWeights, dtype: torch.dtype) -> None:
    """Put layers that read their weights from the files in the place of the model's large ones.

    All else is filled with numbers.
    """
    if isinstance(stored, GgufWeights):
        stored.dequantize = by_kernels(library, stored)
    sources: dict[int, Source] = {}
    words = getattr(_word_table(model), "weight", None)
    tables = [m for m in model.modules() if is_embedding(m) and m.weight is words]
    for path, module in list(model.named_modules()):
        weight = getattr(module, "weight", None)
        name = f"{path}.weight"
        if name not in stored or not isinstance(weight, nn.Parameter):
            continue
        if type(module) in LAYERS or module in tables:
            matrix = stored.matrix(name, is_transposed=type(module) is Conv1D)
            if matrix is not None:
                sources[id(weight)] = _source(library, stored, matrix)
    for module in list(model.modules()):
        kind: Any = type(module)
        own = weights_read_by(kind)
        for leaf, child in list(module.named_children()):
            source = sources.get(id(getattr(child, "weight", None)))
            if (
                source is not None
                and leaf not in own
                and (type(child) in LAYERS or child in tables)
            ):
                setattr(module, leaf, _streamed(child, source, dtype))
    _fill_experts(library, model, stored)
    stored.fill(model, dtype)


@functools.cache
def weights_read_by(kind: type[nn.Module]) -> frozenset[str]:
    """The layers whose weights a module's own code reads, beside or instead of calling them."""
    names: set[str] = set()
    for function in vars(kind).values():
        code = getattr(inspect.unwrap(function) if callable(function) else None, "__code__", None)
        steps = list(dis.get_instructions(code)) if code else []
        for layer, weight, after in zip(steps, steps[1:], steps[2:], strict=False):
            if "ATTR" in layer.opname and "ATTR" in weight.opname and weight.argval == "weight":
                names |= set() if after.argval in ("dtype", "device") else {layer.argval}
    return frozenset(names)


def _source(library: Library, stored: StoredWeights, matrix: StoredMatrix | StoredRows) -> Source:
    if isinstance(matrix, StoredMatrix):
        assert isinstance(stored, GgufWeights)
        return GgufSource(library, matrix, stored)
    return RowSource(library, matrix)


def _fill_experts(library: Library, model: Any, stored: StoredWeights) -> None:
    paths = {id(module): path for path, module in model.named_modules()}

    def sources_of(name: str, layer: Any) -> Sources | None:
        experts = stored.experts(name, is_transposed=layer.is_transposed)
        if experts is None:
            return None
        return [[_source(library, stored, matrix) for matrix in parts] for parts in experts]

    stream_experts(model, sources_of, lambda layer: paths[id(layer)])


def packed_size(types: Mapping[str, int], float_bytes: int) -> int:
    """The bytes that so many weights take once they are packed, by ggml's types or by widths."""
    sizes = BYTES | {kind: BYTES[width] for kind, (_, width) in KINDS.items()} | CENTRED_BYTES
    plain = dict.fromkeys(FLOATS, float_bytes)
    return int(sum(n * (plain | sizes).get(kind, BYTES["int8"]) for kind, n in types.items()))


def by_kernels(library: Library, stored: GgufWeights) -> Any:
    """``dequantize`` by the kernels, where they read a type."""
    other = stored.dequantize

    def dequantize(memory: Tensor, kind: str, shape: tuple[int, int]) -> Tensor:
        if kind not in KINDS:
            return other(memory, kind, shape)
        return Blocks(memory, kind, shape).rows(library, 0, shape[0])

    return dequantize


def _word_table(model: Any) -> Any:
    """The embedding of words; None: of a model around a text's, which may look into it."""
    if model.config.get_text_config(decoder=True) is not model.config:
        return None
    with suppress(NotImplementedError):
        return model.get_input_embeddings()
    return None


def _streamed(layer: Any, source: Source, dtype: torch.dtype) -> nn.Module:
    if is_embedding(layer):
        made: nn.Module = StreamedEmbedding(source, dtype, getattr(layer, "embed_scale", None))
    else:
        made = StreamedLinear(source, layer.bias)
    return made.train(layer.training)
