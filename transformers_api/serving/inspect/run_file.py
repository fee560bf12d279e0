"""A run: all that one answer was made of, and its form in a file. Nothing in it is pickled.

A file is an archive of numpy: the rows of each recorded part in the stream's own bits, and
``meta``, the bytes of a JSON document.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy
from numpy.typing import NDArray

from transformers_api.errors import InvalidRequest
from transformers_api.inspection.activations import ActivationPart, RecordedRows, numbers
from transformers_api.serving.inspect.run_params import from_json

Json = dict[str, Any]
Place = tuple[int, ActivationPart]
VERSION = 1
_DTYPES = {"bfloat16": numpy.uint16, "float16": numpy.uint16, "float32": numpy.float32}


class Damaged(Exception):
    """A file that is not a whole run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPart:
    """The numbers of a part of a layer at the first n tokens: (n, width), in their own bits."""

    bits: NDArray[Any]
    dtype: str
    factor: float = 1.0  # the part is so many times these numbers

    @property
    def values(self) -> NDArray[numpy.floating[Any]]:
        """The part: float32, or float64 where that alone gives the same bits when put back."""
        own = numbers(self.bits, self.dtype)
        return own if self.factor == 1 else own.astype(numpy.float64) * self.factor


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One answer: its tokens, how it was asked for, and what was noted while it was written."""

    id: str
    created: int  # seconds since 1970
    model: str
    fingerprint: str
    prompt_ids: Sequence[int]
    token_ids: Sequence[int]  # the one that ended it included
    prompt_tokens: Sequence[str]  # texts
    tokens: Sequence[str]
    text: str
    finish_reason: str
    params: Json  # see ``run_params``
    stop: Sequence[str] = ()
    intervene: Any = None  # the field as the request had it; None: there was none
    edits: Sequence[Mapping[str, Any]] = ()  # what was meant by it
    spans: Sequence[Json] = ()  # of the prompt's messages
    can_replay: bool = True
    steps: Sequence[Json] = ()  # the trace of each token
    parts: Mapping[Place, StoredPart] = field(default_factory=dict)

    def numbers(self, layer: int, part: ActivationPart) -> NDArray[numpy.floating[Any]]:
        """The part (n, width) of a layer; -1 is the embedding. Raises InvalidRequest.

        n counts the tokens that were read: all but the last. What is put back by an edit gives the
        same bits.
        """
        stored = self.parts.get((layer, part))
        if stored is None:
            there = ", ".join(f"{own} of layer {at}" for at, own in sorted(self.parts)) or "nothing"
            raise InvalidRequest(f"run '{self.id}' has no {part} of layer {layer}; it has {there}")
        return stored.values

    @property
    def meta(self) -> Json:
        """All but the numbers and the steps."""
        return {
            "v": VERSION,
            "id": self.id,
            "created": self.created,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "prompt_ids": list(self.prompt_ids),
            "token_ids": list(self.token_ids),
            "prompt_tokens": list(self.prompt_tokens),
            "tokens": list(self.tokens),
            "text": self.text,
            "finish_reason": self.finish_reason,
            "params": self.params,
            "stop": list(self.stop),
            "intervene": self.intervene,
            "edits": list(self.edits),
            "spans": list(self.spans),
            "can_replay": self.can_replay,
            "activations": [
                {
                    "layer": layer,
                    "part": part,
                    "array": _name(layer, part),
                    "dtype": stored.dtype,
                    "factor": stored.factor,
                    "shape": list(stored.bits.shape),
                }
                for (layer, part), stored in self.parts.items()
            ],
        }


def joined(pieces: Sequence[RecordedRows]) -> dict[Place, StoredPart]:
    """The rows of each part, of all tokens from the first one; what was read again counts last."""
    by_place: dict[Place, list[RecordedRows]] = {}
    for piece in pieces:
        by_place.setdefault((piece.layer, piece.part), []).append(piece)
    parts = {}
    for place, own in by_place.items():
        first = own[0]
        count = max(piece.start + len(piece.bits) for piece in own)
        bits = numpy.zeros((count, first.bits.shape[1]), first.bits.dtype)
        for piece in own:
            bits[piece.start : piece.start + len(piece.bits)] = piece.bits
        parts[place] = StoredPart(bits=bits, dtype=first.dtype, factor=first.factor)
    return parts


def write(run: Run) -> bytes:
    """The bytes of a run's file, as ``numpy.load`` reads it."""
    text = json.dumps({**run.meta, "steps": list(run.steps)}, separators=(",", ":")).encode()
    arrays = {_name(layer, part): stored.bits for (layer, part), stored in run.parts.items()}
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in {**arrays, "meta": numpy.frombuffer(text, numpy.uint8)}.items():
            # Activations hardly shrink; the text does.
            how = zipfile.ZIP_DEFLATED if name == "meta" else zipfile.ZIP_STORED
            content = io.BytesIO()
            numpy.lib.format.write_array(
                content, numpy.ascontiguousarray(array), allow_pickle=False
            )
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), content.getvalue(), how)
    return file.getvalue()


def read_meta(file: Path | BinaryIO, most_bytes: int) -> Json:
    """The document of a run, ``steps`` included. Raises Damaged, OSError."""
    with _opened(file, most_bytes) as archive:
        return _document(archive)


def read(file: Path | BinaryIO, most_bytes: int) -> Run:
    """The run in a file that unpacks to no more than ``most_bytes``. Raises Damaged, OSError."""
    with _opened(file, most_bytes) as archive:
        meta = _document(archive)
        with _noticing_damage():
            parts = {
                (each["layer"], each["part"]): StoredPart(
                    bits=_array(archive, each),
                    dtype=each["dtype"],
                    factor=float(each["factor"]),
                )
                for each in meta["activations"]
            }
            names = Run.__dataclass_fields__.keys() - {"parts"}
            return Run(**{name: meta[name] for name in names}, parts=parts)


@contextmanager
def _noticing_damage() -> Iterator[None]:
    """Raise Damaged for whatever zipfile, zlib, numpy and json make of a damaged file."""
    try:
        yield
    except (Damaged, OSError):
        raise
    except Exception as error:
        raise Damaged(f"{type(error).__name__}: {error}") from None


def _opened(file: Path | BinaryIO, most_bytes: int) -> zipfile.ZipFile:
    with _noticing_damage():
        archive = zipfile.ZipFile(file)
    if sum(each.file_size for each in archive.infolist()) > most_bytes:
        archive.close()
        raise Damaged("it unpacks to too much")
    return archive


def _document(archive: zipfile.ZipFile) -> Json:
    with _noticing_damage():
        raw = _loaded(archive, "meta")
        document = json.loads(raw.astype(numpy.uint8).tobytes())
    if not isinstance(document, dict) or document.get("v") != VERSION:
        raise Damaged("it is of another version")
    for name, (kind, items) in _FIELDS.items():
        value: Any = document.get(name)
        if type(value) is not kind or (items and {*map(type, value)} - {items}):
            raise Damaged(f"its {name} is not one")
    for ids, texts in (("prompt_ids", "prompt_tokens"), ("token_ids", "tokens")):
        if len(document[ids]) != len(document[texts]):
            raise Damaged(f"it has not as many {texts} as {ids}")
    with _noticing_damage():
        from_json(document["params"])
    return document


# Of the document: the type of each field, and of the items of a list.
_FIELDS: Mapping[str, tuple[type[Any], type | None]] = {
    "id": (str, None),
    "created": (int, None),
    "model": (str, None),
    "fingerprint": (str, None),
    "prompt_ids": (list, int),
    "token_ids": (list, int),
    "prompt_tokens": (list, str),
    "tokens": (list, str),
    "text": (str, None),
    "finish_reason": (str, None),
    "params": (dict, None),
    "stop": (list, str),
    "edits": (list, dict),
    "spans": (list, dict),
    "can_replay": (bool, None),
    "activations": (list, dict),
    "steps": (list, dict),
}


def _loaded(archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    content = io.BytesIO(archive.read(f"{name}.npy"))  # to its end, where its sum is checked
    array: NDArray[Any] = numpy.lib.format.read_array(content, allow_pickle=False)
    return array


def _array(archive: zipfile.ZipFile, entry: Json) -> NDArray[Any]:
    array = _loaded(archive, _name(entry["layer"], entry["part"]))
    if array.dtype != _DTYPES[entry["dtype"]] or list(array.shape) != entry["shape"]:
        raise ValueError("its numbers are not those that it says")
    return array


def _name(layer: int, part: ActivationPart) -> str:
    return f"{part}.{layer}"
