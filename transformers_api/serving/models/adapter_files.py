"""Checks of a LoRA adapter's folder, and of its fit to a base, before anything is loaded.

Reads adapter_config.json and adapter_model.safetensors, without torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from transformers_api.checkpoints.headers.adapter_config import (
    MAX_RANK,
    AdapterConfig,
    parse_adapter_config,
)
from transformers_api.checkpoints.headers.gguf_adapter import (
    ggml_names,
    read_gguf_adapter,
    read_numbers,
)
from transformers_api.checkpoints.headers.path_pattern import MAX_PATH
from transformers_api.checkpoints.headers.safetensors_file import Tensor, read_header
from transformers_api.engine.adapter_source import AdapterLayer, AdapterSource
from transformers_api.errors import InsufficientMemory, ModelLoadFailed
from transformers_api.serving.models.adapter_numbers import check_finite, is_finite
from transformers_api.serving.models.foreign import check_is_adapter
from transformers_api.serving.models.headers import read_object
from transformers_api.serving.models.sidecars import FLOATS

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MIB = 1 << 20
MAX_CONFIG_BYTES = MIB
PREFIX = "base_model.model."  # of every tensor's name
_PART = re.compile(r"(.+)\.lora_([AB])(\.\w+)?\.weight")
_MAGNITUDE = re.compile(r"(.+)\.lora_(magnitude)_vector(\.\w+)*")
_REFUSED = {
    "lora_embedding_": "adapters of embeddings cannot be applied",
    ".base_layer.": "a layer of the base itself; save the adapter with save_embedding_layers=False",
    ".bias": "biases (bias, lora_bias) cannot be applied",
    ".weight": "whole layers (modules_to_save) cannot be replaced",
}
Shape = tuple[int, ...]


def inspect_adapter(
    folder: Path, name: str, most_bytes: int | None = None
) -> tuple[AdapterSource, dict[str, tuple[int, int]]]:
    """Check an adapter; it, and inputs and outputs of its layers by their paths.

    ``name``: of its registry entry. ``most_bytes``: of its numbers as float32. Raises
    ModelLoadFailed, naming the file and the reason, InsufficientMemory.
    """
    if folder.suffix == ".gguf":
        return _inspect_gguf(folder, name, most_bytes)
    check_is_adapter(folder)
    weights = folder / WEIGHTS
    config = check_adapter_config(folder)
    parts: dict[str, dict[str, Tensor]] = {}
    tensors = read_header(weights)
    for tensor in tensors:
        path, part = _place(weights, tensor)
        if part in parts.get(path, ()):
            raise ModelLoadFailed(f"{weights}: lora_{part} of {path} is there twice")
        parts.setdefault(path, {})[part] = tensor
    if not parts:
        raise ModelLoadFailed(f"{weights} holds no tensors")
    sizes = {path: _sizes(weights, config, path, own) for path, own in parts.items()}
    layers = [
        AdapterLayer(
            *(path, own["A"].name, own["B"].name, config.scale_of(path)),
            own["magnitude"].name if config.has_magnitudes else None,
        )
        for path, own in parts.items()
    ]
    size = _checked_size(name, sum(tensor.elements for tensor in tensors), most_bytes)
    check_finite(weights, tensors)
    return AdapterSource(name, weights, tuple(layers), size, adapter_stamp(folder)), sizes


def _inspect_gguf(
    file: Path, name: str, most_bytes: int | None
) -> tuple[AdapterSource, dict[str, tuple[int, int]]]:
    """See ``inspect_adapter``: of a GGUF file, whose layers have ggml's names."""
    if not file.is_file():
        raise ModelLoadFailed(f"{file} is no file")
    adapter = read_gguf_adapter(file)
    tensors = [tensor for pair in adapter.layers.values() for tensor in pair]
    size = _checked_size(name, sum(tensor.elements for tensor in tensors), most_bytes)
    for tensor in tensors:
        if min(tensor.shape) > MAX_RANK:
            raise ModelLoadFailed(f"{file}: {tensor.name} has a rank above {MAX_RANK}")
        if not is_finite(read_numbers(file, tensor)):
            raise ModelLoadFailed(f"{file}: {tensor.name} has numbers that are not finite")
    layers = tuple(
        AdapterLayer(layer, down.name, up.name, adapter.scale(layer))
        for layer, (down, up) in adapter.layers.items()
    )
    sizes = {layer: (down.shape[1], up.shape[0]) for layer, (down, up) in adapter.layers.items()}
    stamp, architecture = adapter_stamp(file), adapter.architecture
    return AdapterSource(name, file, layers, size, stamp, architecture), sizes


def _checked_size(name: str, numbers: int, most_bytes: int | None) -> int:
    """The bytes of an adapter's numbers as float32. Raises InsufficientMemory."""
    size = 4 * numbers
    if most_bytes is not None and size > most_bytes:
        raise InsufficientMemory(
            f"Adapter '{name}' has {size / MIB:.0f} MiB of numbers, and MAX_ADAPTERS_MB allows "
            f"{most_bytes / MIB:.0f}"
        )
    return size


def check_adapter_config(folder: Path) -> AdapterConfig:
    """The configuration in a folder. Raises ModelLoadFailed, naming the key."""
    file = folder / CONFIG
    if file.stat().st_size > MAX_CONFIG_BYTES:
        raise ModelLoadFailed(f"{file} is larger than any such file should be")
    return parse_adapter_config(read_object(file), str(file))


def is_whole_adapter(folder: Path) -> bool:
    """True where both files are there, or the one; a look at names, not at contents."""
    if folder.suffix == ".gguf":
        return folder.is_file()
    return all((folder / name).is_file() for name in (CONFIG, WEIGHTS))


def weight_bytes(folder: Path) -> int | None:
    """The size of the file of numbers; None where it is gone."""
    try:
        return (folder if folder.suffix == ".gguf" else folder / WEIGHTS).stat().st_size
    except OSError:
        return None


def adapter_stamp(folder: Path) -> tuple[tuple[int, int, int], ...]:
    """Another value when a file of the adapter has changed. Raises OSError."""
    names = (CONFIG, WEIGHTS) if folder.suffix != ".gguf" else ("",)
    stats = [(folder / name).stat() for name in names]
    return tuple((stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats)


def check_base(
    source: AdapterSource, sizes: Mapping[str, tuple[int, int]], base: Mapping[str, Shape]
) -> None:
    """Refuse an adapter that is for another model, by the shapes of the base's tensors.

    Names in files may differ from those of layers, so that only what is known is judged: a layer
    whose like is there must be there, with these sizes. Raises ModelLoadFailed.
    """
    named = {_without_wrapper(name): shape for name, shape in base.items()}
    if source.architecture is not None:
        own = ggml_names(source.architecture, named)
        named = {f"{layer}.weight": named[name] for layer, name in own.items()}
    shapes = {path: _weight(_without_wrapper(path), named) for path in sizes}
    leaves = {path.rpartition(".")[2] for path, shape in shapes.items() if shape is not None}
    if not leaves:
        raise _foreign(source, f"it has no layer such as {next(iter(sizes))}")
    for path, (inputs, outputs) in sizes.items():
        shape = shapes[path]
        if shape is None and path.rpartition(".")[2] in leaves:
            raise _foreign(source, f"it has no layer {path}")
        if shape and shape not in ((outputs, inputs), (inputs, outputs)):
            raise _foreign(
                source,
                f"{path} there is of {' x '.join(map(str, shape))} numbers, and the adapter's is "
                f"for {inputs} inputs and {outputs} outputs",
            )


def _weight(path: str, base: Mapping[str, Shape]) -> Shape | None:
    """The shape of a layer's weight, whatever the file has in the place of its path's beginning.

    (): it is there in a quantised format; None: it is not.
    """
    end = path.partition(".")[2] or path
    for name in (f"{path}.weight", f"{end}.weight"):
        if name in base:
            return base[name]
    for name, shape in base.items():
        if name.endswith(f".{end}.weight"):
            return shape
        if name.startswith((f"{path}.", f"{end}.")):
            return ()
    return None


def _without_wrapper(name: str) -> str:
    """A name in the language part of a model, which may be served alone."""
    return name.replace("language_model.", "")


def _foreign(source: AdapterSource, reason: str) -> ModelLoadFailed:
    return ModelLoadFailed(
        f"Adapter '{source.name}' does not fit its base: {reason}", param="model"
    )


def _place(file: Path, tensor: Tensor) -> tuple[str, str]:
    """(path of the layer, A or B) of a tensor. Raises ModelLoadFailed for one of another kind."""
    name = tensor.name.removeprefix(PREFIX)
    if len(name) > MAX_PATH:
        raise ModelLoadFailed(f"{file}: {name[:50]}… is longer than the path of a layer may be")
    match = _PART.fullmatch(name) or _MAGNITUDE.fullmatch(name)
    if match is None or ".lora_" in match[1]:
        reason = next((text for part, text in _REFUSED.items() if part in name), "unknown")
        raise ModelLoadFailed(f"{file}: {tensor.name}: {reason}")
    if ".experts." in f".{match[1]}.":
        raise ModelLoadFailed(f"{file}: {tensor.name}: adapters of experts cannot be applied")
    return match[1], match[2]


def _check_magnitude(
    file: Path, config: AdapterConfig, magnitude: Tensor | None, up: Tensor
) -> None:
    """Refuse lengths of rows (DoRA) of another number, or where nothing says that they are used."""
    if magnitude is None:
        return
    if not config.has_magnitudes:
        raise ModelLoadFailed(f"{file}: {magnitude.name} is there, and use_dora is not set")
    is_vector = magnitude.elements == max(magnitude.shape, default=0) == up.shape[0]
    if magnitude.dtype not in FLOATS or not is_vector:
        raise ModelLoadFailed(
            f"{file}: {magnitude.name} is {magnitude.dtype} {list(magnitude.shape)}, expected a "
            f"vector of {up.shape[0]} floats"
        )


def _sizes(
    file: Path, config: AdapterConfig, path: str, parts: Mapping[str, Tensor]
) -> tuple[int, int]:
    """(inputs, outputs) of a layer. Raises ModelLoadFailed where its tensors cannot be so."""
    for part in ("A", "B", *(["magnitude"] if config.has_magnitudes else [])):
        if part not in parts:
            raise ModelLoadFailed(f"{file}: lora_{part} of {path} is missing")
    down, up = parts["A"], parts["B"]
    for tensor in (down, up):
        if tensor.dtype not in FLOATS or len(tensor.shape) != 2 or 0 in tensor.shape:
            shape = list(tensor.shape)
            raise ModelLoadFailed(
                f"{file}: {tensor.name} is {tensor.dtype} {shape}, expected a matrix of floats"
            )
    _check_magnitude(file, config, parts.get("magnitude"), up)
    rank = config.rank_of(path)
    for tensor, own in ((down, down.shape[0]), (up, up.shape[1])):
        if own != rank:
            raise ModelLoadFailed(
                f"{file}: {tensor.name} has rank {own}, and r or rank_pattern of {CONFIG} says "
                f"{rank}"
            )
    if not config.targets_layer(path):
        raise ModelLoadFailed(
            f"{file}: {tensor.name}: target_modules, exclude_modules and layers_to_transform of "
            f"{CONFIG} leave {path} out"
        )
    return down.shape[1], up.shape[0]
