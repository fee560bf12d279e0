"""Runs on the disk, each owner's own, bounded by number, bytes and age; they survive a restart.

A run is one file below a folder that nobody names but the settings. Its name says whose it is (a
digest of the owner), when it was made and its id; when it was last used is the file's own time.
What cannot be read is passed over.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from transformers_api.errors import InsufficientStorage, InvalidRequest, NotFound, PayloadTooLarge
from transformers_api.inspection.activations import ActivationPart
from transformers_api.serving.inspect import run_file
from transformers_api.serving.inspect.run_file import Damaged, Json, Run

log = logging.getLogger(__name__)
MOST_RUNS = 200
MAX_AGE_S = 24 * 3600.0
SHARE = 4  # a run may take this part of what all may
MOST_UNPACKED = 4  # times its file's size: text shrinks
_NAME = re.compile(r"([0-9a-f]{32})-([0-9]{1,12})-(run-[0-9a-f]{16}(?:-[0-9]{1,6})?)\.npz")
_ID = re.compile(r"run-[0-9a-f]{16}(-[0-9]{1,6})?")


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    owner: str  # a digest
    created: int
    id: str
    bytes: int
    used: float


class RunStore:
    """Runs in ``folder``, of ``most_bytes`` together; 0: none are kept. From any thread.

    Where there are too many, the least recently used of the owner with the most of them goes.
    """

    def __init__(
        self,
        folder: Path,
        most_bytes: int,
        most: int = MOST_RUNS,
        max_age_s: float = MAX_AGE_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._folder = folder
        self._most_bytes = most_bytes
        self._most = most
        self._max_age_s = max_age_s
        self._clock = clock
        self._lock = threading.Lock()

    @property
    def most_run_bytes(self) -> int:
        """Bytes that one run may take; 0: none are kept."""
        return self._most_bytes // SHARE

    def check(self, size: int, param: str) -> None:
        """Raise InvalidRequest where runs are not kept, PayloadTooLarge for one of ``size``."""
        if not self._most_bytes:
            raise InvalidRequest("Runs are not kept on this server (RUNS_MAX_MB is 0)", param=param)
        if size > self.most_run_bytes:
            raise PayloadTooLarge(
                f"A run of up to {size / 1e6:.1f} MB would be too large (max "
                f"{self.most_run_bytes / 1e6:.1f} MB); ask for fewer activations or tokens",
                param=param,
            )

    def put(self, owner: str, run: Run) -> int:
        """Keep a run; gives the bytes of its file.

        Raises InvalidRequest, PayloadTooLarge, InsufficientStorage where the disk takes no more.
        """
        content = run_file.write(run)
        self.check(len(content), "store")
        name = f"{_digest(owner)}-{run.created}-{run.id}.npz"
        with self._lock:
            try:
                self._write(name, content)
            except OSError as error:
                raise InsufficientStorage(f"The run cannot be stored: {error.strerror}") from error
            self._make_room(_digest(owner))
        return len(content)

    def _write(self, name: str, content: bytes) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # In the same folder, so that it appears as a whole or not at all.
        beside = self._folder / f".{name}.{secrets.token_hex(4)}"
        try:
            beside.write_bytes(content)
            now = self._clock()
            os.utime(beside, (now, now))
            beside.replace(self._folder / name)
        finally:
            beside.unlink(missing_ok=True)

    def get(self, owner: str, run_id: str) -> Run:
        """A run of ``owner``. Raises NotFound, which names those that are there."""
        file = self._file(owner, run_id)
        try:
            run = run_file.read(file.path, self._most_unpacked(file))
        except (Damaged, OSError) as error:
            log.warning("Run %s cannot be read: %s", file.id, error)
            raise NotFound(f"Run '{run_id}' is damaged", param="run") from None
        now = self._clock()
        with suppress(OSError):
            os.utime(file.path, (now, now))
        return run

    def numbers(
        self, owner: str, run_id: str, layer: int, part: ActivationPart
    ) -> NDArray[numpy.floating[Any]]:
        """See ``Run.numbers``; raises as that and ``get``."""
        return self.get(owner, run_id).numbers(layer, part)

    def of(self, owner: str) -> list[tuple[Json, int]]:
        """(the document, the bytes) of each run of ``owner`` that can be read, the newest first."""
        runs = []
        for file in sorted(self._of(owner), key=lambda file: (file.created, file.used)):
            try:
                meta = run_file.read_meta(file.path, self._most_unpacked(file))
            except (Damaged, OSError) as error:
                log.warning("Run %s is passed over: %s", file.id, error)
                continue
            runs.append((meta, file.bytes))
        return runs[::-1]

    def delete(self, owner: str, run_id: str) -> None:
        """Forget a run. Raises NotFound."""
        self._file(owner, run_id).path.unlink(missing_ok=True)

    def _most_unpacked(self, file: _File) -> int:
        return max(MOST_UNPACKED * file.bytes, self.most_run_bytes)

    def _file(self, owner: str, run_id: str) -> _File:
        files = {file.id: file for file in self._of(owner)}
        if _ID.fullmatch(run_id) and run_id in files:
            return files[run_id]
        names = ", ".join(sorted(files))
        there = f"there are: {names}" if names else "you have none"
        raise NotFound(f"No run '{run_id[:64]}'; {there}", param="run")

    def _of(self, owner: str) -> list[_File]:
        digest = _digest(owner)
        with self._lock:
            return [file for file in self._files() if file.owner == digest]

    def _files(self) -> list[_File]:
        """Those that are not too old; the others go."""
        files = []
        limit = self._clock() - self._max_age_s
        with suppress(FileNotFoundError):
            for entry in os.scandir(self._folder):
                match = _NAME.fullmatch(entry.name)
                with suppress(OSError):
                    state = entry.stat()
                    is_old = (int(match[2]) if match else state.st_mtime) < limit
                    if is_old and (match or entry.name.startswith(".")):
                        Path(entry.path).unlink(missing_ok=True)
                    elif match:
                        path, created = Path(entry.path), int(match[2])
                        size, used = state.st_size, state.st_mtime
                        files.append(_File(path, match[1], created, match[3], size, used))
        return files

    def _make_room(self, newest: str) -> None:
        """Drop runs of those who have the most, as long as all take too much."""
        files = sorted(self._files(), key=lambda file: (file.used, file.created, file.id))
        while len(files) > self._most or sum(file.bytes for file in files) > self._most_bytes:
            sizes = Counter[str]()
            for file in files:
                sizes[file.owner] += file.bytes if len(files) <= self._most else 1
            largest = max(sizes, key=lambda owner: (sizes[owner], owner == newest))
            oldest = next(file for file in files if file.owner == largest)
            files.remove(oldest)
            with suppress(OSError):
                oldest.path.unlink(missing_ok=True)


def new_id() -> str:
    """The id of a run that nobody can guess."""
    return f"run-{secrets.token_hex(8)}"


def _digest(owner: str) -> str:
    return hashlib.sha256(owner.encode()).hexdigest()[:32]
