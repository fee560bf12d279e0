"""The names and shapes in a file of torch.save, read without torch and without running anything.

A pickle is a program. Here it may build dicts, lists and short tuples, and call stand-ins for the
three functions that rebuild a tensor; whatever else it names is an error.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from transformers_api.errors import ModelLoadFailed

MAX_PICKLE_BYTES = 16 << 20  # without the numbers, which lie apart
MAX_DEPTH = 4  # of tuples in tuples: hashing one takes time that doubles with each
PREAMBLE = 3  # objects before the weights in the format of torch before 1.6
_PLAIN = (int, float, str, bool, type(None))


@dataclass(frozen=True, slots=True)
class Shape:
    """A tensor that was not read."""

    size: tuple[int, ...]
    kind: str  # of the storage, such as "FloatStorage"


def read_pickled(path: Path) -> Mapping[str, Any]:
    """The dict that ``path`` holds, with a Shape for each tensor. Raises ModelLoadFailed."""
    try:
        loaded = _read_zip(path) if zipfile.is_zipfile(path) else _read_old(path)
    except (OSError, MemoryError, zipfile.BadZipFile, *OF_PICKLES) as error:
        raise ModelLoadFailed(f"{path.name} cannot be read as plain weights: {error}") from None
    if not isinstance(loaded, dict):
        raise ModelLoadFailed(f"{path.name} holds no dict of weights")
    return loaded


# What a pickle that is damaged, or not one at all, makes of the stack machine.
OF_PICKLES = (
    pickle.UnpicklingError,
    AttributeError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    ValueError,
    RecursionError,
    struct.error,
)


def _read_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        member = next(
            (info for info in archive.infolist() if info.filename.endswith("data.pkl")), None
        )
        if member is None or member.file_size > MAX_PICKLE_BYTES:
            raise pickle.UnpicklingError("it has no data.pkl, or a huge one")
        return Reader(io.BytesIO(archive.read(member))).load()


def _read_old(path: Path) -> Any:
    with path.open("rb") as file:
        data = io.BytesIO(file.read(MAX_PICKLE_BYTES))
    for _ in range(PREAMBLE):
        Reader(data).load()
    return Reader(data).load()


def _tensor(kind: Any, offset: Any, size: Any, *rest: Any) -> Shape:
    if not isinstance(kind, str) or not all(type(number) is int and number >= 0 for number in size):
        raise pickle.UnpicklingError("a tensor is described wrongly")
    return Shape(tuple(size), kind)


def _parameter(tensor: Any, *rest: Any) -> Any:
    return tensor


def _values(*values: Any) -> tuple[Any, ...]:
    return tuple(value for value in values if isinstance(value, _PLAIN))


_CALLS: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch", "Size"): _values,
    ("torch", "device"): _values,
}


def _depth(value: Any) -> int:
    return 1 + max(map(_depth, value), default=0) if isinstance(value, tuple) else 0


_Machine: Any = pickle._Unpickler  # the one written in Python


class Reader(_Machine):  # type: ignore[misc]
    """Python's own stack machine, with a short list of what may be called."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(_Machine.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for what a pickle names; see pickle."""
        if call := _CALLS.get((module, name)):
            return call
        if module in ("torch", "torch.storage") and name.isidentifier():
            return name  # a dtype or the kind of a storage
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no weight")

    def persistent_load(self, pid: Any) -> Any:
        """The kind of a storage; see pickle."""
        if not isinstance(pid, tuple) or len(pid) < 2 or not isinstance(pid[1], str):
            raise pickle.UnpicklingError("a storage is described wrongly")
        return pid[1]


def _checked(build: Callable[[Any], None]) -> Callable[[Any], None]:
    def run(reader: Any) -> None:
        build(reader)
        if _depth(reader.stack[-1]) > MAX_DEPTH:
            raise pickle.UnpicklingError("its tuples are nested too deep")

    return run


def _refused(reader: Any) -> None:
    raise pickle.UnpicklingError("it holds what no weights need")


for _code in (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3):
    Reader.dispatch[_code[0]] = _checked(_Machine.dispatch[_code[0]])
for _code in (pickle.FROZENSET, pickle.INST, pickle.OBJ, pickle.NEWOBJ, pickle.NEWOBJ_EX):
    Reader.dispatch[_code[0]] = _refused
for _code in (pickle.EXT1, pickle.EXT2, pickle.EXT4):
    Reader.dispatch[_code[0]] = _refused
