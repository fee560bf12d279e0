"""Sidecars of GGUF models: folders in the store that say where a model's weights lie.

``checkpoints/sidecar.py`` makes them. ``conversion.json`` names the files as they were then, and
``weights.json`` the tensors in them.
"""

from __future__ import annotations

import math
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers_api.checkpoints.headers.safetensors_file import read_header
from transformers_api.checkpoints.headers.weight_table import TABLE, read_table
from transformers_api.errors import ModelLoadFailed
from transformers_api.serving.models.headers import read_object

CONVERSION = "conversion.json"  # the record in a folder of the store that is finished
FLOATS = ("F64", "F32", "F16", "BF16")  # as a safetensors header has them
WEIGHTS = "weights"  # the field of the record that lists the files


@dataclass(frozen=True, slots=True)
class StoredTensors:
    """The tensors of a model in GGUF files."""

    weight_bytes: int
    types: dict[str, int]  # weights by ggml's name of their type

    @property
    def parameters(self) -> int:
        """The number of weights."""
        return sum(self.types.values())


def is_sidecar(folder: Path) -> bool:
    """True for a folder whose weights lie in GGUF files elsewhere."""
    return (folder / TABLE).is_file()


def stored_files(folder: Path) -> list[Path]:
    """The GGUF files of a sidecar. Raises ModelLoadFailed for one that has changed or is gone."""
    listed = read_object(folder / CONVERSION).get(WEIGHTS)
    try:
        files = [(Path(file["path"]), file["bytes"], file["mtime_ns"]) for file in listed or ()]
    except (TypeError, KeyError):
        files = []
    if not files:
        raise ModelLoadFailed(f"{folder / CONVERSION} names no file of weights")
    for path, size, changed in files:
        try:
            stat = path.stat()
        except OSError as error:
            raise ModelLoadFailed(f"{path} cannot be read: {error.strerror}") from None
        if (stat.st_size, stat.st_mtime_ns) != (size, changed):
            raise ModelLoadFailed(f"{path} has changed since {folder} was made of it")
    return [path for path, _, _ in files]


def read_stored_tensors(folder: Path) -> StoredTensors:
    """The tensors of a sidecar. Raises ModelLoadFailed for a table that cannot be read."""
    types, size = Counter[str](), 0
    for tensor in _table(folder)["tensors"].values():
        for part in tensor["parts"]:
            types[part["type"]] += math.prod(part["shape"])
            size += part["bytes"]
    return StoredTensors(size, dict(types.most_common()))


def _table(folder: Path) -> dict[str, Any]:
    try:
        return read_table(folder)
    except OSError as error:
        raise ModelLoadFailed(f"{folder / TABLE} cannot be read: {error.strerror}") from None


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a prepared model's tensors by their names, as its table or its files say.

    () for numbers of a quantised format, which may lie in any way.
    """
    if not is_sidecar(folder):
        tensors = (t for path in folder.glob("*.safetensors") for t in read_header(path))
        return {t.name: t.shape if t.dtype in FLOATS else () for t in tensors}
    table = _table(folder)
    return {name: tuple(tensor["shape"]) for name, tensor in table["tensors"].items()}


def remove_stale(store: Path) -> None:
    """Remove sidecars of files that have changed or are gone: what they say is of no use."""
    for table in store.glob(f"*/{TABLE}"):
        try:
            stored_files(table.parent)
        except ModelLoadFailed:
            shutil.rmtree(table.parent, ignore_errors=True)
