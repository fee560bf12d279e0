"""The parts of a quantised weight: whether they are of the formats and shapes that it is read by.

What passes here is read without a further look, so that a file that cannot be is refused before
anything is evicted for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from transformers_api.checkpoints.headers.safetensors_file import Tensor
from transformers_api.errors import ModelLoadFailed

Shape = tuple[int, ...]
FLOATS = ("F16", "BF16", "F32", "F64")
FLOAT8 = ("F8_E4M3", "F8_E5M2")
PLACES: Mapping[str, Literal["i", "q"]] = {"I32": "i", "I64": "q"}  # formats of groups of inputs
WORD = 32  # bits of an int32
MXFP4_BYTES = 16  # of a block's codes
INT4_BITS = 4


@dataclass(frozen=True)
class QuantizedTensor:
    """A parameter that tensors of the files make together.

    ``layout``: "gptq", "awq", "packed" (compressed-tensors'), "int8", "float8", "mxfp4", "bnb4".
    ``parts``: the tensors by what they are. ``facts``: what else their names do not say.
    """

    name: str
    shape: tuple[int, ...]
    layout: str
    bits: int
    parts: Mapping[str, str]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def width(self) -> str:
        """The width of packed weights that is near to it, as far as headers tell."""
        is_narrow = self.layout in ("gptq", "awq", "packed") and self.bits <= INT4_BITS
        return "int4" if is_narrow and not self.facts.get("is_reordered") else "int8"


class Files(NamedTuple):
    """The tensors of a checkpoint by their names. ``read`` gives the bytes of a small one."""

    tensors: Mapping[str, Tensor]
    read: Callable[[str], bytes]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor that has to be there."""
        if name not in self.tensors:
            raise ModelLoadFailed(f"tensor {name} is missing beside other parts of its weight")
        shape = self.tensors[name].shape
        if 0 in shape:
            raise ModelLoadFailed(f"tensor {name} has the shape {list(shape)}, which holds nothing")
        return shape

    def parts(self, stem: str, *names: str, optional: tuple[str, ...] = ()) -> dict[str, str]:
        """Tensors by the ends of their names after ``stem``."""
        for name in names:
            self.shape(stem + name)
        there = [name for name in optional if stem + name in self.tensors]
        return {name.strip("._"): stem + name for name in (*names, *there)}


def check_parts(spec: QuantizedTensor, files: Files) -> None:
    """Raise ModelLoadFailed for a part of ``spec`` that its layout cannot have, naming it."""
    _CHECKS[spec.layout](_Parts(spec, files))


class _Parts:
    """The parts of one weight, to be asked one after the other."""

    def __init__(self, spec: QuantizedTensor, files: Files) -> None:
        self.spec = spec
        self.facts: Mapping[str, Any] = spec.facts
        self._files = files

    @property
    def groups(self) -> int:
        """The number of groups along the inputs."""
        size: int = self.facts["group"]
        return -(-self.spec.shape[-1] // size)

    def words(self, codes: int) -> int:
        """The words of so many codes."""
        return -(-codes * self.spec.bits // WORD)

    def __contains__(self, role: str) -> bool:
        return role in self.spec.parts

    def dtype(self, role: str) -> str:
        """The format of a part."""
        return self._files.tensors[self.spec.parts[role]].dtype

    def size(self, role: str) -> int:
        """The bytes of a part."""
        return self._files.tensors[self.spec.parts[role]].bytes

    def needs(self, role: str, dtypes: tuple[str, ...], *shapes: Shape) -> None:
        """Refuse a part of another format, or of none of ``shapes``."""
        tensor = self._files.tensors[self.spec.parts[role]]
        if tensor.dtype not in dtypes:
            raise ModelLoadFailed(
                f"tensor {tensor.name} is {tensor.dtype}, and {' or '.join(dtypes)} is read here"
            )
        if shapes and tensor.shape not in shapes:
            allowed = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
            raise ModelLoadFailed(
                f"tensor {tensor.name} has the shape {list(tensor.shape)}, and that of a weight "
                f"{list(self.spec.shape)} is {allowed}"
            )

    def read(self, role: str) -> bytes:
        """The contents of a small part."""
        return self._files.read(self.spec.parts[role])

    def needs_order(self, role: str) -> None:
        """Refuse groups of inputs that there are no scales of; -1: they were never set."""
        if role not in self:
            return
        self.needs(role, tuple(PLACES), (self.spec.shape[-1],))
        order = memoryview(self.read(role)).cast(PLACES[self.dtype(role)])
        if min(order) >= 0 and max(order) >= self.groups:
            raise self.wrong(role, f"names group {max(order)} of {self.groups}")

    def wrong(self, role: str, reason: str) -> ModelLoadFailed:
        """The error for a part."""
        return ModelLoadFailed(f"tensor {self.spec.parts[role]} {reason}")


def _gptq(parts: _Parts) -> None:
    out, width = parts.spec.shape
    groups = parts.groups
    parts.needs("scales", FLOATS, (groups, out))
    parts.needs("qweight", ("I32",), (parts.words(width), out))
    parts.needs("qzeros", ("I32",), (groups, parts.words(out)))
    parts.needs_order("g_idx")


def _awq(parts: _Parts) -> None:
    out, width = parts.spec.shape
    parts.needs("scales", FLOATS, (parts.groups, out))
    if out * parts.spec.bits % WORD:
        raise parts.wrong("scales", f"are of {out} outputs, which fill no whole words")
    parts.needs("qweight", ("I32",), (width, parts.words(out)))
    parts.needs("qzeros", ("I32",), (parts.groups, parts.words(out)))


def _packed(parts: _Parts) -> None:
    out, width = parts.spec.shape
    parts.needs("weight_packed", ("I32",), (out, parts.words(width)))
    groups = _needs_levels(parts, "weight_scale", FLOATS)
    if "weight_zero_point" in parts:
        if parts.dtype("weight_zero_point") == "I32":
            rows = parts.words(out)
            parts.needs("weight_zero_point", ("I32",), (rows, groups), (rows, 1))
        else:
            _needs_levels(parts, "weight_zero_point", ("I8", *FLOATS), groups)
    parts.needs_order("weight_g_idx")


def _int8(parts: _Parts) -> None:
    parts.needs("weight", ("I8",), parts.spec.shape)
    groups = _needs_levels(parts, "weight_scale", FLOATS)
    if "weight_zero_point" in parts:
        _needs_levels(parts, "weight_zero_point", ("I8", "I32", *FLOATS), groups)


def _needs_levels(parts: _Parts, role: str, dtypes: tuple[str, ...], groups: int = 0) -> int:
    """The groups of numbers of all, of each row, or of each group of each row."""
    out = parts.spec.shape[0]
    many = groups or parts.groups
    one = [(), (1,), (out,), (1, 1), (out, 1)]
    parts.needs(role, dtypes, *(one if many == 1 or groups else []), (out, many), (1, many))
    return many


def _bnb8(parts: _Parts) -> None:
    parts.needs("weight", ("I8",), parts.spec.shape)
    parts.needs("SCB", FLOATS, (parts.spec.shape[0],))
    if "weight_format" in parts and any(parts.read("weight_format")):
        raise parts.wrong("weight_format", "is not 0: the weight lies as a GPU's product wants it")


def _float8(parts: _Parts) -> None:
    parts.needs("weight", FLOAT8)
    shape = parts.spec.shape
    height, width = parts.facts["block"]
    scales = -(-shape[-2] // height), -(-shape[-1] // width)
    shapes: list[Shape] = [scales]
    if scales[1] == 1:
        shapes += [(scales[0],), ()] if scales[0] == 1 else [(scales[0],)]
    if len(shape) != 2:
        shapes = [(*shape[:-2], *scales)]
    if len(shape) > 3:
        raise parts.wrong("weight", f"has the shape {list(shape)}: neither matrix nor stack")
    parts.needs("weight_scale", (*FLOATS, "F8_E8M0"), *shapes)


def _mxfp4(parts: _Parts) -> None:
    experts, width, out = parts.spec.shape
    groups = width // (2 * MXFP4_BYTES)
    parts.needs("blocks", ("U8",), (experts, out, groups, MXFP4_BYTES))
    parts.needs("scales", ("U8",), (experts, out, groups))


def _bnb4(parts: _Parts) -> None:
    numbers, facts = math.prod(parts.spec.shape), parts.facts
    if parts.size("weight") != -(-numbers // 2):
        raise parts.wrong("weight", f"has no four bits for each of {list(parts.spec.shape)}")
    parts.needs("quant_map", FLOATS, (16,))
    scales = -(-numbers // facts["blocksize"])
    if "nested_absmax" not in parts and "nested_quant_map" not in parts:
        parts.needs("absmax", FLOATS, (scales,))
        return
    for role in ("nested_absmax", "nested_quant_map"):
        if role not in parts:
            raise parts.wrong("absmax", f"needs its {role}, which is missing")
    size, offset = facts["nested_blocksize"], facts["nested_offset"]
    if type(size) is not int or size < 1:
        raise parts.wrong("state", f"has nested_blocksize {size!r}, which is no size")
    if type(offset) not in (int, float) or not math.isfinite(offset):
        raise parts.wrong("state", f"has nested_offset {offset!r}, which is no finite number")
    parts.needs("absmax", ("U8",), (scales,))
    parts.needs("nested_absmax", FLOATS, (-(-scales // size),))
    parts.needs("nested_quant_map", FLOATS, (256,))


_CHECKS: Mapping[str, Callable[[_Parts], None]] = {
    "gptq": _gptq,
    "awq": _awq,
    "packed": _packed,
    "int8": _int8,
    "bnb8": _bnb8,
    "float8": _float8,
    "mxfp4": _mxfp4,
    "bnb4": _bnb4,
}
