"""The header of a GGUF file: its metadata and its tensors' places, never a tensor.

Every length that a file declares (strings, arrays, counts, shapes, offsets) is compared with the
bytes that are there before anything is read, reserved or repeated by it.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers_api.checkpoints.headers.gguf_split import split_parts
from transformers_api.errors import ModelLoadFailed

MAGIC, VERSIONS = b"GGUF", (2, 3)
STRING, ARRAY = 8, 9
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
MAX_DIMENSIONS, MAX_NESTING = 4, 4
DEFAULT_ALIGNMENT = 32
# The fewest bytes of an entry (key, type, value) and of a tensor (name, rank, type, offset).
LEAST_ENTRY, LEAST_TENSOR = 8 + 4 + 1, 8 + 4 + 4 + 8
_BLOCK = re.compile(r"blk\.(\d+)\.")
# Metadata that the weights bound, after the name of the architecture; a window of text is not.
_SIZES = ("block_count", "embedding_length", "feed_forward_length", "vocab_size", "expert_count")


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor's place. ``shape`` is in the order of torch."""

    name: str
    kind: int  # ggml's number of the type
    shape: tuple[int, ...]
    offset: int  # from the start of the file
    bytes: int
    file: int = 0  # of the header's files

    @property
    def elements(self) -> int:
        """The number of weights."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """All that a model says of itself, in one file or in several."""

    metadata: Mapping[str, Any]
    tensors: tuple[GgufTensor, ...]
    files: tuple[Path, ...] = ()


def read_gguf_header(path: Path) -> GgufHeader:
    """The header of a sound model, by its file or by one of its parts.

    Raises ModelLoadFailed with the field, what it says, what is; for a missing part with its name.
    """
    paths = split_parts(path)
    parts = [_read_file(part) for part in paths]
    tensors = tuple(
        replace(tensor, file=number) if number else tensor
        for number, part in enumerate(parts)
        for tensor in part.tensors
    )
    header = GgufHeader(parts[0].metadata, tensors, tuple(paths))
    for number, part in enumerate(parts):
        with _named(paths[number]):
            _check_split(part.metadata, number, len(paths))
    with _named(paths[0]):
        _check_count(header)
        _check_sizes(header)
    return header


def file_type(header: GgufHeader) -> str:
    """The name of a file's quantisation, such as Q4_K_M; by most of its weights where none is told.

    "F32" for one without weights.
    """
    import gguf

    with suppress(ValueError):
        named = gguf.LlamaFileType(header.metadata.get("general.file_type", -1)).name
        if named.startswith(("MOSTLY_", "ALL_")):
            return named.partition("_")[2]
    counts = Counter[int]()
    for tensor in header.tensors:
        counts[tensor.kind] += tensor.elements
    return gguf.GGMLQuantizationType(max(counts, key=lambda kind: counts[kind], default=0)).name


def _read_file(path: Path) -> GgufHeader:
    if path.stat().st_size < 24:
        raise ModelLoadFailed(f"{path.name} is not a sound GGUF file: it is too short")
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        _named(path),
    ):
        return _Reader(data).header()


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except _Unsound as error:
        raise ModelLoadFailed(f"{path.name} is not a sound GGUF file: {error}") from None


class _Unsound(Exception):
    """A field that cannot be."""


class _Reader:
    """A cursor over the bytes of a file, which takes only what is there."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._position = 0

    def header(self) -> GgufHeader:
        if (magic := self._take(4, "the magic")) != MAGIC:
            kind = (
                "a Git LFS pointer, not the file itself" if magic == b"vers" else "no GGUF at all"
            )
            raise _Unsound(f"it begins with {magic!r}: {kind}")
        version = self._number("I", "the version")
        if version not in VERSIONS:
            order = " (of a big-endian machine)" if version & 0xFFFF == 0 else ""
            raise _Unsound(f"version {version}{order} cannot be read, only 2 and 3")
        tensor_count = self._number("Q", "the number of tensors")
        entry_count = self._number("Q", "the number of entries")
        self._expect(entry_count, LEAST_ENTRY, "metadata entries")
        metadata: dict[str, Any] = {}
        for _ in range(entry_count):
            key = self._string("a key")
            if key in metadata:
                raise _Unsound(f"{key} is there twice")
            metadata[key] = self._value(self._number("I", key), key)
        self._expect(tensor_count, LEAST_TENSOR, "tensors")
        infos = [self._tensor() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise _Unsound(f"general.alignment is {alignment!r}, which is no power of two")
        start = -(-self._position // alignment) * alignment
        return GgufHeader(metadata, self._placed(infos, start))

    def _left(self) -> int:
        return len(self._data) - self._position

    def _expect(self, count: int, least: int, what: str) -> None:
        if count * least > self._left():
            raise _Unsound(
                f"{count} {what} are declared, the {self._left()} bytes that follow cannot hold "
                "them"
            )

    def _take(self, size: int, what: str) -> bytes:
        if size > self._left():
            raise _Unsound(f"{what} takes {size} bytes, {self._left()} follow")
        self._position += size
        return self._data[self._position - size : self._position]

    def _number(self, form: str, what: str) -> Any:
        return struct.unpack(f"<{form}", self._take(struct.calcsize(f"<{form}"), what))[0]

    def _string(self, what: str) -> str:
        text = self._take(self._number("Q", what), what)
        try:
            return text.decode()
        except UnicodeDecodeError:
            raise _Unsound(f"{what} is not UTF-8: {text[:40]!r}") from None

    def _value(self, kind: int, key: str, depth: int = 0) -> Any:
        if kind in SCALARS:
            return self._number(SCALARS[kind], key)
        if kind == STRING:
            return self._string(key)
        if kind != ARRAY or depth == MAX_NESTING:
            raise _Unsound(f"{key} has a value of the type {kind}, which cannot be")
        kind, count = self._number("I", key), self._number("Q", key)
        if kind == STRING:
            return self._strings(count, key)
        if kind not in SCALARS:
            self._expect(count, 12, f"values of {key}")
            return [self._value(kind, key, depth + 1) for _ in range(count)]
        form = SCALARS[kind]
        values = self._take(count * struct.calcsize(f"<{form}"), key)
        return list(struct.unpack(f"<{count}{form}", values))

    def _strings(self, count: int, key: str) -> list[str]:
        """An array of strings, which a vocabulary makes long: one pass without calls of ours."""
        self._expect(count, 8, f"values of {key}")
        data, position, end = self._data, self._position, len(self._data)
        size_at, texts = struct.Struct("<Q").unpack_from, list[bytes]()
        for _ in range(count):
            if position + 8 > end:
                raise _Unsound(f"{key} takes 8 bytes, {end - position} follow")
            start = position + 8
            position = start + size_at(data, position)[0]
            if position > end:
                raise _Unsound(f"{key} takes {position - start} bytes, {end - start} follow")
            texts.append(data[start:position])
        self._position = position
        try:
            return [text.decode() for text in texts]
        except UnicodeDecodeError as error:
            raise _Unsound(f"{key} is not UTF-8: {error.object[:40]!r}") from None

    def _tensor(self) -> tuple[str, int, tuple[int, ...], int]:
        name = self._string("a tensor's name")
        rank = self._number("I", name)
        if rank > MAX_DIMENSIONS:
            raise _Unsound(f"tensor {name} has {rank} dimensions, {MAX_DIMENSIONS} are possible")
        shape = tuple(self._number("Q", name) for _ in range(rank))[::-1]
        return name, self._number("I", name), shape, self._number("Q", name)

    def _placed(
        self, infos: list[tuple[str, int, tuple[int, ...], int]], start: int
    ) -> tuple[GgufTensor, ...]:
        tensors = tuple(
            GgufTensor(name, kind, shape, start + offset, _bytes(name, kind, shape))
            for name, kind, shape, offset in infos
        )
        end, names = start, set[str]()
        for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
            if tensor.name in names:
                raise _Unsound(f"tensor {tensor.name} is there twice")
            if tensor.offset < end:
                raise _Unsound(f"tensor {tensor.name} begins inside another one")
            end = tensor.offset + tensor.bytes
            if end > len(self._data):
                raise _Unsound(
                    f"tensor {tensor.name} {list(tensor.shape)} ends at byte {end} of "
                    f"{len(self._data)}: the file is cut off"
                )
            names.add(tensor.name)
        return tensors


def _bytes(name: str, kind: int, shape: tuple[int, ...]) -> int:
    import gguf

    try:
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    except (ValueError, KeyError):
        raise _Unsound(f"tensor {name} is of the type {kind}, which is unknown") from None
    if not shape or 0 in shape or shape[-1] % block:
        raise _Unsound(f"tensor {name} has the shape {list(shape)}, which cannot be")
    return math.prod(shape) // block * size


def _check_split(metadata: Mapping[str, Any], number: int, count: int) -> None:
    """Refuse a part that says of itself that it is another one."""
    if (parts := metadata.get("split.count", 1)) != count:
        raise _Unsound(
            f"it is one of {parts} parts by split.count, one of {count} by its name, which has to "
            "end in -00001-of-00003.gguf or the like"
        )
    if count > 1 and (own := metadata.get("split.no")) != number:
        raise _Unsound(f"split.no is {own}, by its name it is {number}")


def _check_count(header: GgufHeader) -> None:
    """Refuse parts of different models."""
    declared = header.metadata.get("split.tensors.count", len(header.tensors))
    if len(header.files) > 1 and declared != len(header.tensors):
        raise _Unsound(
            f"split.tensors.count is {declared}, the parts together have {len(header.tensors)}"
        )


def _check_sizes(header: GgufHeader) -> None:
    """Refuse metadata that promises more than the tensors hold: a model is built by it."""
    architecture = header.metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise _Unsound("general.architecture is missing")
    names = [tensor.name for tensor in header.tensors]
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise _Unsound(f"tensor {twice} is there twice")
    blocks = {match[1] for tensor in header.tensors if (match := _BLOCK.match(tensor.name))}
    largest = max((size for tensor in header.tensors for size in tensor.shape), default=0)
    for name in _SIZES:
        value = header.metadata.get(f"{architecture}.{name}", 0)
        limit = len(blocks) if name == "block_count" else largest
        for number in value if isinstance(value, list) else [value]:
            if not isinstance(number, int) or not 0 <= number <= limit:
                held = f"{limit} blocks" if name == "block_count" else f"no dimension over {limit}"
                raise _Unsound(f"{architecture}.{name} is {number}, the tensors have {held}")
