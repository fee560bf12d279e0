"""API keys in a file: a line for each."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from transformers_api.serving.limits.api_keys import ApiKey, make, parse, taken

MAX_BYTES = 16 << 20


class KeyFile:
    """A KeyStore; comments and other lines of the file stay as they are."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def version(self) -> tuple[int, int, int] | None:
        """The identity of the file's content; None where there is no file."""
        try:
            status = self.path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_ino, status.st_size

    def read(self) -> list[ApiKey]:
        """See KeyStore."""
        with self.path.open(encoding="utf-8") as file:
            content = file.read(MAX_BYTES + 1)  # not all of it: a device has no end
        if len(content) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES >> 20} MiB are no file of keys")
        return parse(content.splitlines())

    def add(self, name: str, scope: str) -> str:
        """See KeyStore."""
        secret, key = make(name, scope)
        is_there = self.path.exists()
        if is_there and any(other.name == name for other in self.read()):
            raise taken(self, name)
        text = self.path.read_text("utf-8") if is_there else ""
        end = "" if text.endswith("\n") or not text else "\n"
        _replace(self.path, f"{text}{end}{key.line()}\n")
        return secret

    def remove(self, name: str) -> None:
        """See KeyStore."""
        if all(key.name != name for key in self.read()):
            raise ValueError(f"{self} has no key of the name {name}")
        lines = self.path.read_text("utf-8").splitlines(keepends=True)
        rest = (line for line in lines if line.partition(":")[0].strip() != name)
        _replace(self.path, "".join(rest))


def _replace(path: Path, text: str) -> None:
    """Write a whole file at once, with the owner and the mode of the one before."""
    old = path.stat() if path.exists() else None
    descriptor, name = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            if old is not None:  # else nobody but its owner may read it
                os.fchmod(file.fileno(), old.st_mode & 0o777)
                with contextlib.suppress(PermissionError):
                    os.fchown(file.fileno(), old.st_uid, old.st_gid)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
