"""The header of a GGUF file: its metadata and its tensors' places, never a tensor.

Every length that a file declares (strings, arrays, counts, shapes, offsets) is compared with the
bytes that are there before anything is read, reserved or repeated by it.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
MAX_PARTS = 1000
_PART = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.gguf")
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

    @property
    def elements(self) -> int:
        """The number of weights."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """All that a file says of itself."""

    metadata: Mapping[str, Any]
    tensors: tuple[GgufTensor, ...]


@dataclass(frozen=True, slots=True)
class GgufFiles:
    """A model in one file or in several: what the first says, and the tensors of each."""

    metadata: Mapping[str, Any]
    files: tuple[tuple[Path, tuple[GgufTensor, ...]], ...]

    @property
    def tensors(self) -> list[GgufTensor]:
        """Those of all files."""
        return [tensor for _, tensors in self.files for tensor in tensors]


def read_gguf_files(path: Path) -> GgufFiles:
    """The headers of a model's files, any of which is ``path``. Raises ModelLoadFailed."""
    paths = part_paths(path)
    headers = [_read(each) for each in paths]
    for number, (each, header) in enumerate(zip(paths, headers, strict=True)):
        _check_part(each, header, number, len(paths))
    whole = GgufHeader(headers[0].metadata, tuple(t for each in headers for t in each.tensors))
    try:
        _check_sizes(whole)
    except _Unsound as error:
        raise ModelLoadFailed(f"{paths[0].name} is not a sound GGUF file: {error}") from None
    tensors = tuple(header.tensors for header in headers)
    return GgufFiles(whole.metadata, tuple(zip(paths, tensors, strict=True)))


def part_paths(path: Path) -> list[Path]:
    """The files that a model was split into, of which ``path`` is one. Raises ModelLoadFailed."""
    if (match := _PART.fullmatch(path.name)) is None:
        return [path]
    count = int(match["count"])
    if not 1 <= count <= MAX_PARTS:
        raise ModelLoadFailed(f"{path.name} names {count} parts")
    names = [f"{match['stem']}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]
    paths = [path.with_name(name) for name in names]
    if missing := [each.name for each in paths if not each.is_file()]:
        raise ModelLoadFailed(f"{path.name} is one of {count} parts; {missing[0]} is missing")
    return paths


def _check_part(path: Path, header: GgufHeader, number: int, count: int) -> None:
    declared = header.metadata.get("split.count", 1), header.metadata.get("split.no", 0)
    if declared[0] != count and not (count == 1 and declared[0] == 0):
        raise ModelLoadFailed(
            f"{path.name} is one of {declared[0]} parts (split.count) and should be named "
            f"{path.stem}-{number + 1:05d}-of-{declared[0]:05d}.gguf beside the others, or joined "
            "with them by llama-gguf-split --merge"
        )
    if declared[1] != number:
        raise ModelLoadFailed(f"{path.name} says that it is part {declared[1] + 1} (split.no)")


def read_gguf_header(path: Path) -> GgufHeader:
    """The header of a model, all parts of it. Raises ModelLoadFailed."""
    files = read_gguf_files(path)
    return GgufHeader(files.metadata, tuple(files.tensors))


def _read(path: Path) -> GgufHeader:
    """The header of a sound file. Raises ModelLoadFailed with the field, what it says, what is."""
    if path.stat().st_size < 24:
        raise ModelLoadFailed(f"{path.name} is not a sound GGUF file: it is too short")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            header = _Reader(data).header()
        except _Unsound as error:
            raise ModelLoadFailed(f"{path.name} is not a sound GGUF file: {error}") from None
    return header


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

    def _strings(self, count: int, what: str) -> list[str]:
        """``count`` strings in one pass: a vocabulary has some hundred thousand."""
        data, position, end = self._data, self._position, len(self._data)
        length, strings = struct.Struct("<Q").unpack_from, []
        try:
            for _ in range(count):
                start = position + 8
                position = start + length(data, position)[0]
                if position > end:
                    raise _Unsound(f"{what} takes {position - start} bytes, {end - start} follow")
                strings.append(data[start:position].decode())
        except UnicodeDecodeError as error:
            raise _Unsound(f"{what} is not UTF-8: {error.object[:40]!r}") from None
        except struct.error:
            raise _Unsound(f"{what} takes 8 bytes, {end - position} follow") from None
        self._position = position
        return strings

    def _value(self, kind: int, key: str, depth: int = 0) -> Any:
        if kind in SCALARS:
            return self._number(SCALARS[kind], key)
        if kind == STRING:
            return self._string(key)
        if kind != ARRAY or depth == MAX_NESTING:
            raise _Unsound(f"{key} has a value of the type {kind}, which cannot be")
        kind, count = self._number("I", key), self._number("Q", key)
        if kind not in SCALARS:
            self._expect(count, 8 if kind == STRING else 12, f"values of {key}")
            if kind == STRING:
                return self._strings(count, key)
            return [self._value(kind, key, depth + 1) for _ in range(count)]
        form = SCALARS[kind]
        values = self._take(count * struct.calcsize(f"<{form}"), key)
        return list(struct.unpack(f"<{count}{form}", values))

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


def _check_sizes(header: GgufHeader) -> None:
    """Refuse metadata that promises more than the tensors hold: a model is built by it."""
    architecture = header.metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise _Unsound("general.architecture is missing")
    blocks = {match[1] for tensor in header.tensors if (match := _BLOCK.match(tensor.name))}
    largest = max((size for tensor in header.tensors for size in tensor.shape), default=0)
    for name in _SIZES:
        value = header.metadata.get(f"{architecture}.{name}", 0)
        limit = len(blocks) if name == "block_count" else largest
        for number in value if isinstance(value, list) else [value]:
            if not isinstance(number, int) or not 0 <= number <= limit:
                held = f"{limit} blocks" if name == "block_count" else f"no dimension over {limit}"
                raise _Unsound(f"{architecture}.{name} is {number}, the tensors have {held}")
