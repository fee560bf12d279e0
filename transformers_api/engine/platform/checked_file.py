"""Small files of what was found out, each with a digest of its content before it. Torch-free."""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

log = logging.getLogger(__name__)
DIGEST_BYTES = 32


def read_checked(path: Path) -> bytes | None:
    """The content; None where there is none, none whole, or one that others can have written.

    The digest says that it is whole, not who wrote it: kernels run the steps that it states.
    """
    try:
        # A pipe of this name would keep the start waiting.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            is_own = stat.S_ISREG(status.st_mode) and status.st_uid in (0, os.geteuid())
            is_own = is_own and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
            data = file.read() if is_own else b""
    except OSError:
        return None
    if not is_own:
        log.warning("A file that others can write, or no file at all, is not used: %s", path)
        return None
    digest, content = data[:DIGEST_BYTES], data[DIGEST_BYTES:]
    if hashlib.sha256(content).digest() != digest:
        log.warning("A damaged file is not used: %s", path)
        return None
    return content


def read_used(path: Path) -> bytes | None:
    """``read_checked``, and a use of the file: ``keep_newest`` goes by these."""
    content = read_checked(path)
    if content is not None:
        with suppress(OSError):  # where it may only be read
            os.utime(path)
    return content


def write_checked(path: Path, content: bytes) -> None:
    """Store the content; nobody meets a part of it. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as own:
        complete = Path(own) / path.name
        complete.write_bytes(hashlib.sha256(content).digest() + content)
        complete.chmod(0o644)  # whatever the umask lets others do
        complete.replace(path)


def keep_newest(folder: Path, pattern: str, count: int) -> None:
    """Remove the files of a pattern that were used longest ago, until ``count`` are left."""
    files = sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime)
    for path in files[:-count]:
        path.unlink(missing_ok=True)
