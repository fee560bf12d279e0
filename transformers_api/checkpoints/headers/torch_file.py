"""The numbers in a file of torch.save, read without torch and without running anything.

What its pickle may do is what ``pickled_file`` allows; the numbers lie beside it in the archive.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import NDArray

from transformers_api.checkpoints.headers.pickled_file import OF_PICKLES, Reader
from transformers_api.checkpoints.headers.tensor_file import (
    MOST_ARRAYS,
    MOST_HEADER,
    check_archive,
)
from transformers_api.errors import ModelLoadFailed

_KINDS = {
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "BFloat16Storage": "<u2",
    "DoubleStorage": "<f8",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
}


@dataclass(frozen=True, slots=True)
class _Storage:
    """The place of numbers in the archive."""

    kind: str
    key: str


@dataclass(frozen=True, slots=True)
class _View:
    """A tensor: numbers of a storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def is_of_torch(data: bytes) -> bool:
    """True for an archive as torch.save makes it."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return _pickle_name(archive) is not None
    except Exception:  # whatever zipfile makes of it: it is not one
        return False


def _pickle_name(archive: zipfile.ZipFile) -> str | None:
    names = (name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl")
    return next(names, None)


def read_torch(data: bytes, most_bytes: int) -> dict[str, NDArray[Any]]:
    """The arrays of the dict that the file holds; of a dict in it ``name.key``.

    Numbers and lists of whole numbers are arrays too. Raises ModelLoadFailed.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            check_archive(archive, most_bytes)
            name = _pickle_name(archive)
            if name is None or archive.getinfo(name).file_size > MOST_HEADER:
                raise ModelLoadFailed("it has no data.pkl, or a huge one")
            loaded = _TensorReader(io.BytesIO(archive.read(name))).load()
            if not isinstance(loaded, Mapping):
                raise ModelLoadFailed("it holds no dict of tensors")
            pairs = _flat(loaded)
            views = [value for _, value in pairs if isinstance(value, _View)]
            count = sum(math.prod(view.shape) for view in views)
            if len(views) > MOST_ARRAYS or 2 * count > most_bytes:
                raise ModelLoadFailed(f"its tensors have more than {most_bytes} bytes")
            root = name.removesuffix("data.pkl")
            return {
                name: _numbers(archive, root, value) if isinstance(value, _View) else value
                for name, value in pairs
            }
    except ModelLoadFailed:
        raise
    except (OSError, MemoryError, OverflowError, zipfile.BadZipFile, *OF_PICKLES) as error:
        raise ModelLoadFailed(f"not a sound file of torch: {error}") from None


def _flat(loaded: Mapping[Any, Any], prefix: str = "") -> list[tuple[str, _View | NDArray[Any]]]:
    """The tensors and whole numbers of a dict, and of the dicts in it."""
    arrays: list[tuple[str, _View | NDArray[Any]]] = []
    for key, value in loaded.items():
        name = f"{prefix}{key}"
        if isinstance(value, _View):
            arrays.append((name, value))
        elif isinstance(value, Mapping) and not prefix:
            arrays += _flat(value, f"{name}.")
        elif type(value) is int or (isinstance(value, list) and {*map(type, value)} == {int}):
            arrays.append((name, numpy.array(value, numpy.int64)))
    return arrays


def _numbers(archive: zipfile.ZipFile, root: str, view: _View) -> NDArray[Any]:
    kind = _KINDS.get(view.storage.kind)
    if kind is None:
        raise ModelLoadFailed(f"a tensor has the type {view.storage.kind}")
    raw = numpy.frombuffer(archive.read(f"{root}data/{view.storage.key}"), kind)
    pairs = list(zip(view.shape, view.strides, strict=True))
    last = view.offset + sum((size - 1) * stride for size, stride in pairs)
    if not math.prod(view.shape) or last >= len(raw):
        raise ModelLoadFailed(f"a tensor of the shape {list(view.shape)} has {len(raw)} numbers")
    strides = tuple(stride * raw.itemsize for stride in view.strides)
    own = numpy.lib.stride_tricks.as_strided(raw[view.offset :], view.shape, strides)
    if view.storage.kind != "BFloat16Storage":
        return numpy.ascontiguousarray(own)
    wide: NDArray[Any] = own.astype("<u4") << 16
    return wide.view("<f4")


def _view(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _View:
    whole = [offset, *shape, *strides]
    if not isinstance(storage, _Storage) or len(shape) != len(strides):
        raise ValueError("a tensor is described wrongly")
    if not all(type(number) is int and number >= 0 for number in whole):
        raise ValueError("a tensor is described wrongly")
    return _View(storage, offset, tuple(shape), tuple(strides))


class _TensorReader(Reader):
    """The reader of weights, with the places of their numbers."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (
            ("torch._utils", "_rebuild_tensor"),
            ("torch._utils", "_rebuild_tensor_v2"),
        ):
            return _view
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Any:
        if not isinstance(pid, tuple) or len(pid) < 3 or not isinstance(pid[2], str):
            raise ValueError("a storage is described wrongly")
        return _Storage(super().persistent_load(pid), pid[2])
