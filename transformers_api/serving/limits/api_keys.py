"""API keys, from a file that holds a hash of each.

A line of the file is ``name:scope:sha256$hash``; ``#`` begins a comment. A key is 256 random bits,
so that its SHA-256 tells nothing about it and a slow hash would only slow the requests down.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import os
import re
import secrets
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers_api.config.settings import SettingError

log = logging.getLogger(__name__)

SCOPES = ("infer", "admin")  # admin may also do what infer may
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MAX_BYTES = 16 << 20
_HASH = re.compile(r"sha256\$([0-9a-f]{64})")
_FORM = "name:infer:sha256$... or name:admin:sha256$..."


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One line of the file."""

    name: str
    scope: str
    digest: bytes

    def may(self, scope: str) -> bool:
        """True where this key has ``scope``."""
        return SCOPES.index(self.scope) >= SCOPES.index(scope)

    def line(self) -> str:
        """As it stands in the file."""
        return f"{self.name}:{self.scope}:sha256${self.digest.hex()}"


class ApiKeys:
    """The keys of a file. It is read again when it has changed. From any thread."""

    def __init__(self, path: Path) -> None:
        """Raises SettingError where the file cannot be read or has a wrong line."""
        self._path = path
        self._lock = threading.Lock()
        self._state = _state(path)
        try:
            self._keys = read(path)
        except (OSError, ValueError) as error:
            raise SettingError(f"API_KEYS_FILE={path} is not allowed: {_reason(error)}") from None
        if not self._keys:
            log.warning("API_KEYS_FILE %s has no keys: every request is refused", path)

    def find(self, secret: str) -> ApiKey | None:
        """The key whose secret was given; all are compared, each in the same time."""
        digest = _digest(secret)
        match = None
        for key in self._current():
            if hmac.compare_digest(key.digest, digest):
                match = key
        return match

    def _current(self) -> Sequence[ApiKey]:
        if _state(self._path) != self._state:
            with self._lock:
                self._read_again()
        return self._keys

    def _read_again(self) -> None:
        """A broken file is told once and changes nothing."""
        state = _state(self._path)
        if state == self._state:  # another thread was here
            return
        self._state = state
        try:
            self._keys = read(self._path)
        except (OSError, ValueError) as error:
            log.error("%s: the keys from before stay valid: %s", self._path, _reason(error))
        else:
            log.info("%s: %d keys are valid now", self._path, len(self._keys))


def read(path: Path) -> list[ApiKey]:
    """The keys of a file. Raises OSError, or ValueError with the number of a wrong line."""
    keys: dict[str, ApiKey] = {}
    with path.open(encoding="utf-8") as file:
        content = file.read(MAX_BYTES + 1)  # not all of it: a device has no end
    if len(content) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES >> 20} MiB are no file of keys")
    for number, line in enumerate(content.splitlines(), 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        name, _, rest = text.partition(":")
        scope, _, digest = rest.partition(":")
        match = _HASH.fullmatch(digest)
        # The line is not repeated: it may be a key itself.
        if not _NAME.fullmatch(name) or scope not in SCOPES or not match:
            raise ValueError(f"line {number} must be {_FORM}")
        if name in keys:
            raise ValueError(f"line {number} has the name of an earlier one: {name}")
        keys[name] = ApiKey(name, scope, bytes.fromhex(match[1]))
    return list(keys.values())


def add(path: Path, name: str, scope: str) -> str:
    """Make a key and write its hash; the key itself, which is nowhere else.

    Raises ValueError for a bad name or one that is taken, OSError, and what ``read`` raises.
    """
    if not _NAME.fullmatch(name):
        raise ValueError("a name has up to 64 letters, digits, dots, dashes and underscores")
    keys = read(path) if path.exists() else []
    if any(key.name == name for key in keys):
        raise ValueError(f"{path} has a key of the name {name}: remove it first, or take another")
    secret = f"sk-{secrets.token_urlsafe(32)}"
    text = path.read_text("utf-8") if path.exists() else ""
    line = ApiKey(name, scope, _digest(secret)).line()
    _replace(path, text + ("" if text.endswith("\n") or not text else "\n") + f"{line}\n")
    return secret


def remove(path: Path, name: str) -> None:
    """Take a key out of the file, comments stay. Raises ValueError, OSError, as ``read``."""
    if all(key.name != name for key in read(path)):
        raise ValueError(f"{path} has no key of the name {name}")
    lines = path.read_text("utf-8").splitlines(keepends=True)
    _replace(path, "".join(line for line in lines if line.partition(":")[0].strip() != name))


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


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()


def _state(path: Path) -> tuple[int, int, int] | None:
    """The identity of the file's content; None where there is no file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size


def _reason(error: OSError | ValueError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8"
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
