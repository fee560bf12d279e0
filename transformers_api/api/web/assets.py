"""The page's files, read once: their digest, which is part of their URLs, and their bytes."""

from __future__ import annotations

import gzip
import hashlib
import mimetypes
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

FOLDER = Path(__file__).parent / "static"
PAGE = "index.html"
PREFIX = "/ui"
_BASE = b"%BASE%"  # in the page: where its files lie
_COMPRESSED = {".html", ".css", ".js", ".svg", ".txt", ".md"}  # fonts are already
_TYPES = {".js": "text/javascript", ".woff2": "font/woff2", ".md": "text/markdown"}


@dataclass(frozen=True)
class Asset:
    """One file: its bytes, and what a browser is told about them."""

    name: str
    raw: bytes

    @cached_property
    def gzipped(self) -> bytes | None:
        """The bytes compressed, made once; None where that would not help."""
        if Path(self.name).suffix not in _COMPRESSED:
            return None
        return gzip.compress(self.raw, 9, mtime=0)

    @cached_property
    def etag(self) -> str:
        """A digest of the bytes."""
        return _digest(self.raw)

    @property
    def content_type(self) -> str:
        """The media type, with a charset where it is text."""
        suffix = Path(self.name).suffix
        kind = _TYPES.get(suffix) or mimetypes.guess_type(self.name)[0] or "text/plain"
        return f"{kind}; charset=utf-8" if kind.startswith("text/") else kind


@dataclass(frozen=True)
class Assets:
    """All files of the page; one ``version`` for all, so that relative imports keep working."""

    version: str
    page: Asset
    files: Mapping[str, Asset]


def _digest(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()[:16]


@cache
def assets() -> Assets:
    """The files, read when somebody first asks for the page."""
    paths = sorted(path for path in FOLDER.rglob("*") if path.is_file())
    names = {path.relative_to(FOLDER).as_posix(): path.read_bytes() for path in paths}
    everything = b"".join(b"%s %d\n%s" % (n.encode(), len(raw), raw) for n, raw in names.items())
    version = _digest(everything)
    page = names.pop(PAGE).replace(_BASE, f"{PREFIX}/{version}".encode())
    files = {name: Asset(name, raw) for name, raw in names.items()}
    return Assets(version, Asset(PAGE, page), files)
