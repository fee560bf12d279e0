"""The identity of this program: what it has kept on the disk is of use to no other. Torch-free."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import sys
from pathlib import Path

RUNNING = "checkpoints", "engine", "families", "kernels"
LIBRARIES = ("torch", "transformers", "numpy", "safetensors")


@functools.cache
def program() -> str:
    """A digest of the sources that decide what a load makes, and the versions they stand on."""
    versions = [importlib.metadata.version(name) for name in LIBRARIES]
    return repr((sources(*RUNNING), versions, sys.version))


@functools.cache
def sources(*folders: str) -> str:
    """A digest of the sources in these folders of the package."""
    package = Path(__file__).parents[2]
    paths = sorted(
        path
        for folder in folders
        for kind in ("*.py", "*.cpp", "*.h")
        for path in (package / folder).rglob(kind)
    )
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()
