"""The numbers in files of numpy, safetensors and torch, read without running anything of them.

Every size is compared with the bytes that are there before anything is reserved by it.
"""

from __future__ import annotations

import io
import math
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy
from numpy.typing import NDArray

from transformers_api.checkpoints.headers.safetensors_file import read_header
from transformers_api.errors import ModelLoadFailed

MOST_ARRAYS = 1024
MOST_HEADER = 1 << 20  # bytes of what names and describes them
WHOLE = frozenset(["layers", "source_layers", "d_model"])  # whole numbers may stand here
_SAFETENSORS_KINDS = {"F32": "<f4", "F16": "<f2", "BF16": "bf16", "F64": "<f8"}
_WHOLE_KINDS = {"I64": "<i8", "I32": "<i4"}
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # LZMA reserves what its file says
_HEADERS = {
    (1, 0): numpy.lib.format.read_array_header_1_0,
    (2, 0): numpy.lib.format.read_array_header_2_0,
}


def read_tensors(data: bytes, most_bytes: int) -> tuple[dict[str, NDArray[Any]], str]:
    """(the arrays of a file, its kind), which is known by its first bytes.

    ``most_bytes``: of the numbers, once they are unpacked. Raises ModelLoadFailed.
    """
    if data.startswith(b"PK"):
        from transformers_api.checkpoints.headers.torch_file import is_of_torch, read_torch

        if is_of_torch(data):
            return read_torch(data, most_bytes), "pt"
        return read_archive(data, most_bytes), "npz"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        path.write_bytes(data)
        try:
            return read_safetensors(path, data), "safetensors"
        except ModelLoadFailed as error:
            raise ModelLoadFailed(str(error).replace(str(path), "the file")) from None


def read_safetensors(path: Path, data: bytes) -> dict[str, NDArray[Any]]:
    """The tensors of a file, whose bytes are ``data``. Raises ModelLoadFailed."""
    if len(data) >= 8 and MOST_HEADER < int.from_bytes(data[:8], "little") <= len(data):
        raise ModelLoadFailed(f"its header has more than {MOST_HEADER} bytes")
    tensors = {}
    for tensor in read_header(path):
        kinds: Mapping[str, str] = _SAFETENSORS_KINDS
        if tensor.name in WHOLE:
            kinds = _WHOLE_KINDS
        kind = kinds.get(tensor.dtype)
        if kind is None:
            raise ModelLoadFailed(f"{tensor.name} has the type {tensor.dtype}: {_expected(kinds)}")
        tensors[tensor.name] = numbers(data, tensor.offset, tensor.bytes, kind, tensor.shape)
    return tensors


def _expected(kinds: Iterable[str]) -> str:
    return f"it must be one of {', '.join(kinds)}"


def numbers(data: bytes, offset: int, size: int, kind: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """Numbers that lie in ``data``; ``kind`` is numpy's name of their type, or bf16."""
    raw = data[offset : offset + size]
    if kind != "bf16":
        return numpy.frombuffer(raw, kind).reshape(shape)
    wide = numpy.frombuffer(raw, "<u2").astype("<u4") << 16
    return wide.view("<f4").reshape(shape)


def check_archive(archive: zipfile.ZipFile, most_bytes: int) -> None:
    """Raise ModelLoadFailed for one that unpacks to too much, or is packed as nobody packs it."""
    entries = archive.infolist()
    size = sum(entry.file_size for entry in entries)
    if size > most_bytes or len(entries) > MOST_ARRAYS:
        raise ModelLoadFailed(
            f"{len(entries)} arrays of {size} bytes unpacked (max {MOST_ARRAYS} of "
            f"{most_bytes} in all)"
        )
    for entry in entries:
        if entry.compress_type not in _COMPRESSIONS:
            name = entry.filename.removesuffix(".npy")
            raise ModelLoadFailed(f"{name} is packed in a way that numpy never uses")


def read_archive(data: bytes, most_bytes: int) -> dict[str, NDArray[Any]]:
    """The arrays of a file of ``numpy.savez``; nothing in it is ever unpickled."""
    tensors: dict[str, NDArray[Any]] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            check_archive(archive, most_bytes)
            for entry in archive.infolist():
                name = entry.filename.removesuffix(".npy")
                if not entry.filename.endswith(".npy") or name == "meta":
                    continue
                with archive.open(entry) as file:
                    tensors[name] = _array(file, name, entry.file_size)
    except ModelLoadFailed:
        raise
    except Exception as error:  # zipfile, zlib and numpy's header each raise what they like
        raise ModelLoadFailed(f"not a sound archive of numpy: {error}") from None
    return tensors


def _array(file: IO[bytes], name: str, size: int) -> NDArray[Any]:
    """One array of an archive. Raises ModelLoadFailed, ValueError."""
    version = numpy.lib.format.read_magic(file)
    if version not in _HEADERS:
        raise ModelLoadFailed(f"{name} is of the version {version} of numpy's format")
    shape, is_fortran, dtype = _HEADERS[version](file)
    if dtype.kind not in ("iu" if name in WHOLE else "f"):
        raise ModelLoadFailed(f"{name} has the type {dtype}")
    if math.prod(shape) * dtype.itemsize > size:
        raise ModelLoadFailed(f"{name} has the shape {list(shape)}, its bytes are {size}")
    return numpy.frombuffer(file.read(), dtype).reshape(shape, order="F" if is_fortran else "C")
