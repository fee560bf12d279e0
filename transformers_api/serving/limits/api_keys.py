"""API keys, of which a store holds a hash each.

An entry is ``name:scope:sha256$hash``. A key is 256 random bits, so that its SHA-256 tells nothing
about it and a slow hash would only slow the requests down.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from transformers_api.errors import Unavailable

log = logging.getLogger(__name__)

SCOPES = ("infer", "admin")  # admin may also do what infer may
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HASH = re.compile(r"sha256\$([0-9a-f]{64})")
_FORM = "name:infer:sha256$... or name:admin:sha256$..."


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One entry of a store."""

    name: str
    scope: str
    digest: bytes

    def may(self, scope: str) -> bool:
        """True where this key has ``scope``."""
        return SCOPES.index(self.scope) >= SCOPES.index(scope)

    def line(self) -> str:
        """As it stands in a store."""
        return f"{self.name}:{self.scope}:sha256${self.digest.hex()}"


class KeyStore(Protocol):
    """A place that has the keys of one or several servers: key_file.py, key_redis.py."""

    def version(self) -> object:
        """Another value whenever the keys may have changed; costs a request next to nothing."""
        ...

    def read(self) -> list[ApiKey]:
        """All keys. Raises OSError, or ValueError for a wrong entry, which it does not repeat."""
        ...

    def add(self, name: str, scope: str) -> str:
        """Make a key and keep its hash; the key itself, which is nowhere else.

        Raises ValueError for a bad name or one that is taken, OSError, and what ``read`` raises.
        """
        ...

    def remove(self, name: str) -> None:
        """Take a key away. Raises ValueError where there is none of the name, OSError."""
        ...


class ApiKeys:
    """The keys of a store, read again when they have changed. From any thread."""

    def __init__(self, store: KeyStore) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._keys: Sequence[ApiKey] | None = None  # not read yet
        self._version: object = None

    def read(self) -> int:
        """Read them now; how many there are. Raises what ``KeyStore.read`` raises."""
        with self._lock:
            self._version = self._store.version()
            self._keys = self._store.read()
            return len(self._keys)

    def find(self, secret: str) -> ApiKey | None:
        """The key whose secret was given; all are compared, each in the same time.

        Raises Unavailable where the store could not be read since the start.
        """
        digest = _digest(secret)
        match = None
        for key in self._current():
            if hmac.compare_digest(key.digest, digest):
                match = key
        return match

    def _current(self) -> Sequence[ApiKey]:
        if self._keys is None or self._store.version() != self._version:
            with self._lock:
                self._read_again()
        if self._keys is None:
            raise Unavailable("The API keys cannot be read now", retry_after=5)
        return self._keys

    def _read_again(self) -> None:
        """A store that is broken or gone is told once and changes nothing."""
        version = self._store.version()
        if self._keys is not None and version == self._version:  # another thread was here
            return
        self._version = version
        try:
            self._keys = self._store.read()
        except (OSError, ValueError) as error:
            if self._keys is not None:
                log.error("%s: the keys from before stay valid: %s", self._store, reason(error))
        else:
            log.info("%s: %d keys are valid now", self._store, len(self._keys))


def parse(lines: Iterable[str]) -> list[ApiKey]:
    """The keys of entries; ``#`` begins a comment. ValueError has the number of a wrong line."""
    keys: dict[str, ApiKey] = {}
    for number, line in enumerate(lines, 1):
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


def check_name(name: str) -> None:
    """Raise ValueError for what cannot be the name of a key."""
    if not _NAME.fullmatch(name):
        raise ValueError("a name has up to 64 letters, digits, dots, dashes and underscores")


def make(name: str, scope: str) -> tuple[str, ApiKey]:
    """A new key and what is kept of it. Raises ValueError for a bad name."""
    check_name(name)
    secret = f"sk-{secrets.token_urlsafe(32)}"
    return secret, ApiKey(name, scope, _digest(secret))


def taken(store: KeyStore, name: str) -> ValueError:
    """The error of a new key whose name another one has."""
    return ValueError(f"{store} has a key of the name {name}: remove it first, or take another")


def reason(error: OSError | ValueError) -> str:
    """The fault of a store, in one line and without a path."""
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8"
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()
