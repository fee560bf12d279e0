"""Lenses from the files that people publish: tuned lenses, Jacobian lenses."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy
from numpy.typing import NDArray

from transformers_api.checkpoints.headers.tensor_file import read_tensors
from transformers_api.errors import InvalidRequest, ModelLoadFailed
from transformers_api.inspection.lens_maps import LensMaps
from transformers_api.serving.inspect.tensor_store import StoredTensors

MOST_UNPACKED = 8 << 20  # bytes of a small file's numbers; those of a large one: twice its own
_TRANSLATOR = re.compile(r"(?:layer_translators\.)?(\d{1,4})\.(weight|bias)")
_JACOBIAN = re.compile(r"J\.(\d{1,4})")
EMBEDDING = -1

Tensors = Mapping[str, NDArray[Any]]


def lens_of_file(data: bytes) -> LensMaps:
    """The lens of a file: of torch, safetensors or numpy. Raises InvalidRequest.

    A translator N of a tuned lens is for the stream that layer N reads, which is the one after
    layer N - 1; a Jacobian N is for the stream after layer N.
    """
    try:
        tensors, _ = read_tensors(data, max(MOST_UNPACKED, 2 * len(data)))
    except ModelLoadFailed as error:
        raise InvalidRequest(f"The file is refused: {error}") from None
    named = {match[0]: match for name in tensors if (match := _TRANSLATOR.fullmatch(name))}
    if named:
        return _tuned(tensors, named)
    if "J" in tensors or any(map(_JACOBIAN.fullmatch, tensors)):
        return _jacobian(tensors)
    names = ", ".join(list(tensors)[:5]) or "none"
    raise InvalidRequest(
        "The file is no lens: it has neither tensors N.weight and N.bias (a tuned lens) nor J with "
        f"source_layers (a Jacobian lens); there are: {names}"
    )


def _tuned(tensors: Tensors, named: Mapping[str, re.Match[str]]) -> LensMaps:
    weights = {
        int(match[1]): tensors[name] for name, match in named.items() if match[2] == "weight"
    }
    biases = {int(match[1]): tensors[name] for name, match in named.items() if match[2] == "bias"}
    if not weights or not biases.keys() <= weights.keys():
        raise InvalidRequest("The file is refused: a translator has a bias and no weight")
    numbers = sorted(weights)
    maps = _matrices([weights[number] for number in numbers])
    width = maps.shape[1]
    none = numpy.zeros(width, numpy.float32)
    rows = [biases.get(number, none) for number in numbers]
    if any(row.shape != (width,) for row in rows):
        raise InvalidRequest(f"The file is refused: a bias has not the shape [{width}]")
    layers = tuple(number + EMBEDDING for number in numbers)
    return _checked(LensMaps("tuned", layers, maps, _finite(numpy.stack(rows))))


def _jacobian(tensors: Tensors) -> LensMaps:
    by_layer = {
        int(match[1]): tensor
        for name, tensor in tensors.items()
        if (match := _JACOBIAN.fullmatch(name))
    }
    if "J" in tensors:
        whole = tensors["J"]
        layers = tensors.get("source_layers", numpy.arange(len(whole) if whole.ndim else 0))
        if whole.ndim != 3 or len(whole) != layers.size:
            raise InvalidRequest(
                f"The file is refused: J has the shape {list(whole.shape)} for {layers.size} "
                "source_layers; it must be [layers, width, width]"
            )
        by_layer = dict(zip(map(int, layers.ravel()), whole, strict=True))
    if not by_layer:
        raise InvalidRequest("The file is refused: J has no layers")
    numbers = sorted(by_layer)
    maps = _matrices([by_layer[number] for number in numbers])
    if "d_model" in tensors and tensors["d_model"].ravel().tolist() != [maps.shape[1]]:
        raise InvalidRequest("The file is refused: d_model is not the width of J")
    return _checked(LensMaps("jacobian", tuple(numbers), maps, None))


def _matrices(matrices: list[NDArray[Any]]) -> NDArray[numpy.float32]:
    """(L, C, C). Raises InvalidRequest."""
    width = matrices[0].shape[-1] if matrices[0].ndim else 0
    for matrix in matrices:
        if matrix.shape != (width, width) or not width:
            raise InvalidRequest(
                f"The file is refused: a matrix has the shape {list(matrix.shape)}; all must be "
                "[width, width]"
            )
    return _finite(numpy.stack(matrices))


def _finite(numbers: NDArray[Any]) -> NDArray[numpy.float32]:
    with numpy.errstate(over="ignore"):
        floats = numbers.astype(numpy.float32)
    if not numpy.isfinite(floats).all():
        raise InvalidRequest("The file is refused: every number must be finite")
    return floats


def _checked(lens: LensMaps) -> LensMaps:
    if lens.layers[0] < EMBEDDING or len(set(lens.layers)) < len(lens.layers):
        raise InvalidRequest("The file is refused: its layers must differ, and be 0 or more")
    return lens


def tensors_of(lens: LensMaps) -> dict[str, NDArray[numpy.float32]]:
    """A lens as it is stored."""
    tensors = {"maps": lens.maps}
    return tensors if lens.biases is None else {**tensors, "biases": lens.biases}


def lens_of(stored: StoredTensors) -> LensMaps:
    """The lens that was stored."""
    meta, tensors = stored.meta, stored.tensors
    return LensMaps(meta["kind"], tuple(meta["layers"]), tensors["maps"], tensors.get("biases"))
