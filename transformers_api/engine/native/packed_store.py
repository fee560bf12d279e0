"""Packed weights on the disk: files of a folder, within a bound, read into memory. Torch-free.

A file's name is a digest of all that its content depends on: the model's files, how it is loaded,
the instruction set, this program (``program.py``). It is written under another name first, so that
nobody meets a part of one, and states the sizes and checksums of what it holds. What does not fit
its statements is removed, and made anew. Files that were used longest ago go first.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import mmap
import os
import secrets
import shutil
import struct
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from transformers_api.engine.load_options import LoadOptions
from transformers_api.engine.native import installation
from transformers_api.engine.native.program import program
from transformers_api.memory import free_bytes

log = logging.getLogger(__name__)
MAGIC = b"packed 1"
PREFIX = struct.Struct("<8sQ32s")  # magic, bytes of the header, their SHA-256
LARGEST_HEADER = 1 << 26
ALIGNMENT = 64  # of each weight
PAGE = 4096  # where the weights begin
HUGE_PAGE = 2 << 20
AT_ONCE = 8 << 20  # bytes of a write, or the least of a read
# Bytes of a read at most. Whoever comes back from one waits for the interpreter's lock, which is
# hard to get while modules are imported.
READ_AT_ONCE = 64 << 20
PIECES = 32  # of a file, so that all threads end at about the same time
SMALLEST = 16 << 20  # bytes of packed weights: less is packed as fast as it is read
SPARE = 1.2  # of the memory that reading ahead takes
STALE_S = 3600.0  # a file that was begun so long ago is not going to be finished
SUFFIX, PARTIAL = ".packed", ".partial"


class StoredWeight(NamedTuple):
    """A weight (out, in) in a file: its kind's number, its size, where it lies, its checksum.

    ``error``: see PackedWeight.
    """

    type: int
    out_features: int
    in_features: int
    error: float
    offset: int
    bytes: int
    checksum: int


@dataclass(frozen=True)
class PackedContent:
    """The content of a file, in memory: the weights begin at byte ``start`` of ``memory``."""

    weights: Sequence[StoredWeight]
    memory: mmap.mmap
    start: int


@dataclass(frozen=True)
class PackedEntry:
    """A file of the store. ``used_at``: seconds since the epoch."""

    path: Path
    model: str
    bytes: int
    used_at: float


def packed_key(options: LoadOptions, folder: Path) -> str | None:
    """The digest that names the packed weights of the model in ``folder``.

    None where they are not kept: without kernels, or with code of the model's own, which may change
    where nobody looks.
    """
    if options.native is None or not options.stamp or options.trust_remote_code:
        return None
    if options.device not in ("auto", "cpu") or installation.unusable(options.native_isa):
        return None
    isa = installation.instruction_set(options.native_isa)
    identity = (program(), isa, str(folder), options.stamp, options.dtype, options.quantization)
    return hashlib.sha256(repr(identity).encode()).hexdigest()[:32]


class PackedStore:
    """The folder of packed weights, of at most ``most_bytes``. Safe from any thread."""

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self.folder = folder
        self.most_bytes = most_bytes
        self._lock = threading.Lock()
        self._ahead: tuple[str, _Reading] | None = None

    @classmethod
    def of(cls, model_store: Path, most_mb: int) -> PackedStore:
        """That of a MODEL_STORE, of at most so many MiB."""
        return cls(model_store.absolute() / "packed", most_mb << 20)

    def path(self, key: str) -> Path:
        """The file of a key, there or not."""
        return self.folder / f"{key}{SUFFIX}"

    def size(self, key: str | None) -> int:
        """Bytes of memory that the weights of ``key`` take; 0 where they are not here."""
        if key is not None:
            with suppress(OSError, ValueError), self.path(key).open("rb") as file:
                return _size(_read_header(file.fileno(), key)["weights"])
        return 0

    def read_ahead(self, key: str | None) -> None:
        """Begin to read the weights of ``key``, if they are here and memory is free for them."""
        size = self.size(key)
        if key is None or not size or size * SPARE > free_bytes():
            return
        with self._lock, suppress(OSError, ValueError):
            if self._ahead is None or self._ahead[0] != key:
                reading = _Reading(self.path(key), key)
                reading.start(1)
                self._ahead = key, reading

    def ahead_bytes(self, key: str | None) -> int:
        """Bytes of memory that what was read ahead for ``key`` takes already."""
        with self._lock:
            is_own = self._ahead is not None and self._ahead[0] == key
        return self.size(key) if is_own else 0

    def forget_ahead(self) -> None:
        """Give up the reading ahead."""
        with self._lock:
            self._ahead = None

    def read(self, key: str, threads: int) -> PackedContent | None:
        """The weights of ``key``, once each; None where there are none, or none whole."""
        with self._lock:
            ahead, self._ahead = self._ahead, None
        path = self.path(key)
        try:
            reading = ahead[1] if ahead and ahead[0] == key else _Reading(path, key)
            content = reading.result(threads)
        except (OSError, ValueError):
            if path.is_file():
                log.warning("Damaged packed weights are not used: %s", path)
                self.remove(key)
            return None
        with suppress(OSError):  # where it may only be read
            os.utime(path)  # those that were used last stay
        return content

    def remove(self, key: str) -> None:
        """Forget the weights of ``key``, where that is possible."""
        with suppress(OSError):
            self.path(key).unlink(missing_ok=True)

    def make_room(self, size: int) -> bool:
        """Remove what was used longest ago until a file of ``size`` fits; False: it never does.

        As much of the disk as the file takes is left free beside it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_begun()
        if size > self.most_bytes:
            return False
        self._shrink(self.most_bytes - size)
        return shutil.disk_usage(self.folder).free >= 2 * size

    def keep_within_bound(self) -> None:
        """Remove what is beyond ``most_bytes``, which may have been more when it was written."""
        with suppress(OSError):  # where it may only be read
            self._remove_begun()
            self._shrink(self.most_bytes)

    def _shrink(self, most: int) -> None:
        """Remove what was used longest ago until ``most`` bytes are left."""
        entries = sorted(self.entries(), key=lambda entry: entry.used_at)
        total = sum(entry.bytes for entry in entries)
        while entries and total > most:
            oldest = entries.pop(0)
            oldest.path.unlink(missing_ok=True)
            total -= oldest.bytes

    def _remove_begun(self) -> None:
        """Remove files that nobody is going to finish."""
        for path in self.folder.glob(f".*{PARTIAL}"):
            with suppress(OSError):
                if path.stat().st_mtime < time.time() - STALE_S:
                    path.unlink()

    def file_bytes(self, key: str, model: str, weights: Sequence[StoredWeight]) -> int:
        """The size of the file that ``write`` makes of these."""
        return _data_offset(len(_header(key, model, weights))) + _size(weights)

    def write(
        self, key: str, model: str, weights: Sequence[StoredWeight], parts: Iterable[Any]
    ) -> None:
        """Store ``weights``, whose bytes are ``parts``, one or several of each. Raises OSError.

        No part is held while the next one is waited for.
        """
        header = _header(key, model, weights)
        prefix = PREFIX.pack(MAGIC, len(header), hashlib.sha256(header).digest())
        # Processes in several containers may have the same number.
        partial = self.folder / f".{key}.{secrets.token_hex(8)}{PARTIAL}"
        try:
            with partial.open("wb", buffering=0) as file:
                _write_at(file.fileno(), prefix + header, 0)
                first = _data_offset(len(header))
                pieces = iter(parts)
                for weight in weights:
                    done = 0
                    while done < weight.bytes:
                        at = first + weight.offset + done
                        done += _write_at(file.fileno(), next(pieces), at)
                file.truncate(first + _size(weights))
            partial.replace(self.path(key))
        finally:
            partial.unlink(missing_ok=True)

    def entries(self) -> list[PackedEntry]:
        """All files; those that state nothing right have no model's name."""
        made = []
        for path in self.folder.glob(f"*{SUFFIX}"):
            with suppress(OSError):
                stat, model = path.stat(), ""
                with suppress(ValueError), path.open("rb") as file:
                    model = str(_read_header(file.fileno(), path.stem)["model"])
                made.append(PackedEntry(path, model, stat.st_size, stat.st_mtime))
        return made


class _Reading:
    """A file that is read into memory by all who ``help``. Raises OSError, ValueError at once."""

    def __init__(self, path: Path, key: str) -> None:
        with path.open("rb") as file:
            header = _read_header(file.fileno(), key)
            self._weights, self._first = header["weights"], header["first"]
            size = _size(self._weights)
            if os.fstat(file.fileno()).st_size != self._first + size or not size:
                raise ValueError("it is cut off")
            self._file = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._file)
        self._memory, self._start = _pages(size)
        self._view = memoryview(self._memory)[self._start : self._start + size]
        self._at_once = min(max(size // PIECES, AT_ONCE), READ_AT_ONCE)
        self._pieces = iter(range(0, size, self._at_once))  # those that nobody has taken
        self._helpers: list[threading.Thread] = []

    def start(self, threads: int) -> None:
        """Let so many threads more read, while others do something else."""
        for _ in range(threads):
            helper = threading.Thread(target=self._help, name="reader", daemon=True)
            self._helpers.append(helper)
            helper.start()

    def result(self, threads: int) -> PackedContent:
        """Read what is left by so many threads, this one among them."""
        self.start(threads - 1 - len(self._helpers))
        self._help()
        for helper in self._helpers:
            helper.join()
        return PackedContent(self._weights, self._memory, self._start)

    def _help(self) -> None:
        """Read pieces until none is left. What cannot be read stays zero: its checksum tells."""
        with suppress(OSError):
            for at in self._pieces:
                end = min(at + self._at_once, len(self._view))
                while at < end and (
                    count := os.preadv(self._file, [self._view[at:end]], self._first + at)
                ):
                    at += count


def lay_out(sizes: Iterable[int]) -> Iterator[int]:
    """The offset of each of these sizes, one after the other; the last one is where they end."""
    offset = 0
    for size in sizes:
        yield offset
        offset += -(-size // ALIGNMENT) * ALIGNMENT
    yield offset


def _size(weights: Sequence[StoredWeight]) -> int:
    (*_, end) = lay_out(weight.bytes for weight in weights)
    return end


def _header(key: str, model: str, weights: Sequence[StoredWeight]) -> bytes:
    return json.dumps({"key": key, "model": model, "weights": weights}).encode()


def _data_offset(header_bytes: int) -> int:
    return -(-(PREFIX.size + header_bytes) // PAGE) * PAGE


def _read_header(file: int, key: str) -> dict[str, Any]:
    """The header of an open file. Raises OSError, ValueError for one that is not of ``key``."""
    prefix = os.pread(file, PREFIX.size, 0)
    if len(prefix) < PREFIX.size:
        raise ValueError("it is cut off")
    magic, size, digest = PREFIX.unpack(prefix)
    if magic != MAGIC or size > LARGEST_HEADER:
        raise ValueError("it has another format")
    text = os.pread(file, size, PREFIX.size)
    if hashlib.sha256(text).digest() != digest:
        raise ValueError("its header is damaged")
    header: dict[str, Any] = json.loads(text)
    if header["key"] != key:
        raise ValueError("it is another's")
    header["weights"] = [StoredWeight(*weight) for weight in header["weights"]]
    header["first"] = _data_offset(size)
    return header


def _write_at(file: int, data: Any, offset: int) -> int:
    """The bytes of ``data``, which are written."""
    view = memoryview(data)
    for at in range(0, len(view), AT_ONCE):
        piece = view[at : at + AT_ONCE]
        done = 0
        while done < len(piece):
            done += os.pwrite(file, piece[done:], offset + at + done)
    return len(view)


def _pages(size: int) -> tuple[mmap.mmap, int]:
    """Memory for so many bytes, in huge pages where the system has them; where it begins."""
    pages = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages, -ctypes.addressof(ctypes.c_char.from_buffer(pages)) % HUGE_PAGE
