"""Folders of the store that appear by one rename, whole or not at all.

``conversion.json`` of such a folder has the checksums of its files and the version of this program:
what an earlier one has made is made anew. A killed process leaves only a hidden ``.*.partial``
folder, which the next one removes. Processes that want the same folder wait for each other.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

MANIFEST = "conversion.json"
VERSION = 3  # one more whenever the result for some source is another; serving's store has it too

Report = Callable[[float, str], None]


@contextmanager
def publishing(
    folder: Path, source: Path, report: Report, notes: Mapping[str, Any] | None = None
) -> Iterator[Path | None]:
    """A folder to fill, which becomes ``folder`` afterwards; None where that is there and intact.

    ``notes`` are more fields of the manifest, and belong to what makes a folder intact.
    """
    folder, notes = folder.absolute(), notes or {}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder, report):
        if is_intact(folder, notes):
            yield None
            return
        _sweep(folder.parent)
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
            _seal(source, partial, report, notes)
            shutil.rmtree(folder, ignore_errors=True)  # a damaged or an earlier one
            partial.rename(folder)
            _sync(folder.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def is_intact(folder: Path, notes: Mapping[str, Any] | None = None) -> bool:
    """True where every file of a folder has the checksum of its making, and the manifest ``notes``.

    False for what an earlier version has made.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = manifest["files"]
        return (
            manifest.get("version") == VERSION
            and all(manifest.get(name) == value for name, value in (notes or {}).items())
            and all(_sha256(folder / name) == digest for name, digest in files.items())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


@contextmanager
def _locked(folder: Path, report: Report) -> Iterator[None]:
    """Hold ``folder``'s lock. The kernel gives it back when the process dies."""
    with folder.with_name(f".{folder.name}.lock").open("w") as lock:
        if not _try_lock(lock):
            report(0.0, "waiting for another process that prepares this model")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _try_lock(lock: TextIO) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _sweep(store: Path) -> None:
    """Remove what killed conversions of other models left behind."""
    for partial in store.glob(".*.partial"):
        with partial.with_suffix(".lock").open("w") as lock:
            if _try_lock(lock):
                shutil.rmtree(partial, ignore_errors=True)


def _seal(source: Path, folder: Path, report: Report, notes: Mapping[str, Any]) -> None:
    """Add the manifest and force everything to the disk, so that the rename publishes it whole."""
    report(0.9, "checking sums")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = {
        "version": VERSION,
        "source": source.name,
        "source_bytes": source.stat().st_size,
        "files": {str(path.relative_to(folder)): _sha256(path) for path in files},
        **notes,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    for path in (*files, folder / MANIFEST):
        path.chmod(0o644)  # safetensors writes for the owner only; a service may run as another
        _sync(path)
    _sync(folder)
    report(1.0, "converted")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
