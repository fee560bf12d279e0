"""Files of tensors by name, each owner's own, on the disk: what models are read through.

Each is a safetensors file of float32 whose header says what it is. Its numbers are mapped into
memory when they are needed, so that they are pages of the disk's cache and nobody's memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import struct
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from transformers_api.checkpoints.headers.safetensors_file import read_header
from transformers_api.errors import InsufficientStorage, NotFound, PayloadTooLarge

log = logging.getLogger(__name__)
Array = NDArray[numpy.float32]
MOST_NAMES = 32  # of one owner
OWN_SHARE, ALL_SHARE = 2, 8  # times the largest file: bytes of one owner, and of all
_PIECE = 1 << 20  # numbers that are written together
_SUFFIX = ".safetensors"
_UNFINISHED_S = 3600.0  # no file takes so long to be written


@dataclass(frozen=True, slots=True)
class StoredTensors:
    """One file: what it is, and its numbers. ``digest`` tells it from every other one."""

    meta: Mapping[str, Any]
    tensors: Mapping[str, Array]
    digest: str


class TensorStore:
    """The files of a kind below ``root``. ``most_bytes``: of one; see the shares for all.

    An owner's own are never dropped for another one of theirs. Where those of all have too many
    bytes, the least recently used of the owner with the most of them goes. Thread-safe.
    """

    def __init__(self, root: Path, kind: str, most_bytes: int, most: int = MOST_NAMES) -> None:
        self.kind = kind
        self.most_bytes = most_bytes
        self._root = root / kind
        self._most = most
        self._lock = threading.Lock()

    def put(
        self, owner: str, name: str, meta: Mapping[str, Any], tensors: Mapping[str, Array]
    ) -> bool:
        """Keep tensors under a name; False where they take others' place.

        Raises PayloadTooLarge where this owner has too many, or too many bytes, and
        InsufficientStorage where the disk takes no more.
        """
        folder = self._folder(owner)
        path = folder / f"{name}{_SUFFIX}"
        size = sum(tensor.nbytes for tensor in tensors.values())
        with self._lock:
            sizes = {each: each.stat().st_size for each in _files(folder)}
            old = sizes.pop(path, None)
            if old is None and len(sizes) >= self._most:
                raise PayloadTooLarge(
                    f"The store has {len(sizes)} of the kind {self.kind} (max {self._most}); "
                    "delete one"
                )
            whole, most = sum(sizes.values()) + size, OWN_SHARE * self.most_bytes
            if whole > most:
                raise PayloadTooLarge(
                    f"Those of the kind {self.kind} would take {whole} bytes (max {most}); "
                    "delete one"
                )
            self._make_room(folder, size)
            try:
                folder.mkdir(parents=True, exist_ok=True)
                part = folder / f".{uuid.uuid4().hex}"
                try:
                    _write(part, meta, tensors)
                    part.replace(path)
                finally:
                    part.unlink(missing_ok=True)
            except OSError as error:
                raise InsufficientStorage(
                    f"The {self.kind} cannot be stored: {error.strerror}"
                ) from error
        return old is None

    def get(self, owner: str, name: str) -> StoredTensors:
        """The file of ``owner`` under a name. Raises NotFound, which names what is there."""
        folder = self._folder(owner)
        path = folder / f"{name}{_SUFFIX}"
        with self._lock:
            if path in _files(folder):
                with _readable(path, self.kind):
                    os.utime(path)
                    return _read(path)
        raise self._missing(folder, name)

    def delete(self, owner: str, name: str) -> None:
        """Forget what is under a name. Raises NotFound."""
        folder = self._folder(owner)
        path = folder / f"{name}{_SUFFIX}"
        with self._lock:
            if path not in _files(folder):
                raise self._missing(folder, name)
            path.unlink(missing_ok=True)

    def _missing(self, folder: Path, name: str) -> NotFound:
        names = sorted(each.stem for each in _files(folder))
        there = f"there are: {', '.join(names)}" if names else "there is none"
        return NotFound(f"No {self.kind} '{name}' in the store; {there}", param=self.kind)

    def of(self, owner: str) -> dict[str, Mapping[str, Any]]:
        """The files of ``owner`` by name, without the numbers."""
        described = {}
        with self._lock:
            for path in sorted(_files(self._folder(owner))):
                with contextlib.suppress(NotFound), _readable(path, self.kind):
                    described[path.stem] = _meta(path)
        return described

    def _folder(self, owner: str) -> Path:
        return self._root / hashlib.sha256(owner.encode()).hexdigest()[:32]

    def _make_room(self, own: Path, size: int) -> None:
        """Drop files of those who have the most, as long as all take too much."""
        by_folder = {
            folder: {path: path.stat() for path in _files(folder)}
            for folder in (self._root.iterdir() if self._root.is_dir() else ())
        }
        for folder in by_folder:
            _forget_unfinished(folder)
        most = ALL_SHARE * self.most_bytes
        while size + sum(_bytes(files) for files in by_folder.values()) > most:
            others = [folder for folder in by_folder if folder != own and by_folder[folder]]
            if not others:
                return
            largest = by_folder[max(others, key=lambda folder: _bytes(by_folder[folder]))]
            oldest = min(largest, key=lambda path: largest[path].st_mtime)
            del largest[oldest]
            oldest.unlink(missing_ok=True)


def _forget_unfinished(folder: Path) -> None:
    """Delete what a server was writing when it was killed."""
    for path in folder.glob(".*"):
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < time.time() - _UNFINISHED_S:
                path.unlink()


@contextlib.contextmanager
def _readable(path: Path, kind: str) -> Iterator[None]:
    """Raise NotFound where the file is damaged: whatever is made of that."""
    try:
        yield
    except Exception as error:
        log.warning("The %s %s cannot be read: %s", kind, path.stem, error)
        raise NotFound(f"The {kind} '{path.stem}' in the store is damaged", param=kind) from None


def _bytes(files: Mapping[Path, os.stat_result]) -> int:
    return sum(stat.st_size for stat in files.values())


def _files(folder: Path) -> list[Path]:
    """The files that are complete."""
    if not folder.is_dir():
        return []
    return [path for path in folder.glob(f"*{_SUFFIX}") if not path.name.startswith(".")]


def _write(path: Path, meta: Mapping[str, Any], tensors: Mapping[str, Array]) -> None:
    header: dict[str, Any] = {}
    digest, end = hashlib.sha256(), 0
    for name, tensor in tensors.items():
        first, end = end, end + tensor.nbytes
        shape = list(tensor.shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [first, end]}
        digest.update(repr((name, shape)).encode())
        for piece in _pieces(tensor):
            digest.update(piece)
    header["__metadata__"] = {"meta": json.dumps(meta), "digest": digest.hexdigest()}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            for piece in _pieces(tensor):
                file.write(piece)
        file.flush()
        os.fsync(file.fileno())


def _pieces(tensor: Array) -> Iterator[bytes]:
    """The bytes of a tensor, some numbers at a time."""
    flat = tensor.reshape(-1)
    for start in range(0, flat.size, _PIECE):
        yield flat[start : start + _PIECE].astype("<f4").tobytes()


def _header(path: Path) -> Mapping[str, str]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        metadata: Mapping[str, str] = json.loads(file.read(length))["__metadata__"]
    return metadata


def _meta(path: Path) -> Mapping[str, Any]:
    meta: Mapping[str, Any] = json.loads(_header(path)["meta"])
    return {**meta, "bytes": path.stat().st_size}


def _read(path: Path) -> StoredTensors:
    tensors: dict[str, Array] = {}
    for tensor in read_header(path):
        mapped = numpy.memmap(path, "<f4", mode="c", offset=tensor.offset, shape=tensor.shape)
        tensors[tensor.name] = numpy.asarray(mapped)
    return StoredTensors(_meta(path), tensors, _header(path)["digest"])
