"""The identity of this program: what it has kept on the disk is of use to no other. Torch-free."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import sys
from pathlib import Path

LIBRARIES = ("torch", "transformers", "numpy", "safetensors")


@functools.cache
def program() -> str:
    """A digest of the sources that decide what a load makes, and the versions they stand on."""
    package = Path(__file__).parents[2]
    sources = sorted(
        path
        for folder in ("checkpoints", "engine", "families", "kernels")
        for kind in ("*.py", "*.cpp", "*.h")
        for path in (package / folder).rglob(kind)
    )
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources))
    versions = [importlib.metadata.version(name) for name in LIBRARIES]
    return repr((digest.hexdigest(), versions, sys.version))
