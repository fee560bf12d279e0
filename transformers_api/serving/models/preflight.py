"""Checks of a model folder, as far as they need no memory for its weights.

Reads JSON files and the headers of safetensors files, never a tensor.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers_api.checkpoints.headers.quantized import check_method, quantization_of
from transformers_api.checkpoints.headers.safetensors_file import (
    DTYPES,
    LFS_POINTER,
    Tensor,
    read_header,
    refuse_pointer,
)
from transformers_api.checkpoints.headers.text_names import has_towers, text_weights
from transformers_api.errors import ModelLoadFailed, ModelNotServable
from transformers_api.serving.models.config_sizes import check_sizes
from transformers_api.serving.models.foreign import check_format, check_quantization, kind_of
from transformers_api.serving.models.headers import is_path, read_object
from transformers_api.serving.models.quantized_files import quantized_types
from transformers_api.serving.models.sidecars import (
    is_sidecar,
    read_stored_tensors,
    stored_files,
)
from transformers_api.serving.models.spec import EncoderKind, ModelFiles

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MODULES = "modules.json"  # of a sentence-transformers encoder
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
TOKENIZERS = (
    ("tokenizer.json",),
    ("tokenizer.model",),
    ("vocab.json", "merges.txt"),
    ("spiece.model",),
    ("spm.model",),
    ("tekken.json",),
    ("vocab.txt",),
)
NOT_GENERATING = ("ForMaskedLM", "Classification", "ForQuestionAnswering", "ForPreTraining")
# Architectures of our own, and fields that only their originals' configurations have.
OWN_TYPES = frozenset({"gpt3dev", "niels_gpt", "tinygpt", "tinygpt2"})
ORIGINAL_FIELDS = frozenset({"block_size", "n_embd"})


def inspect_folder(
    folder: Path,
    trust_remote_code: bool = False,
    knows: Callable[[str], bool] | None = None,
    encoder: EncoderKind | None = None,
) -> ModelFiles:
    """Check a model folder and measure it. Raises ModelLoadFailed, naming the file and the reason.

    ``knows`` says whether a ``model_type`` can be built without the folder's own code; by default
    those that the installed transformers lists. ``encoder``: it is to make vectors or scores.
    """
    if not folder.is_dir():
        raise ModelLoadFailed(f"{folder} is not a folder")
    check_config(folder, trust_remote_code, knows, encoder)
    _check_tokenizer(folder)
    paths = weight_files(folder)
    if is_sidecar(folder):
        return _sidecar_files(folder, paths)
    headers = {path: read_header(path) for path in paths}
    if paths[0].name != WEIGHTS:
        _check_index(folder / INDEX, {path.name: header for path, header in headers.items()})
    tensors = [tensor for header in headers.values() for tensor in header]
    if not tensors:
        raise ModelLoadFailed(f"{paths[0]} holds no tensors")
    config = read_object(folder / "config.json")
    check_format(folder / "config.json", config, (tensor.name for tensor in tensors))
    check_sizes(folder / "config.json", tensors)
    tensors = served_tensors(folder, tensors, trust_remote_code)
    names = {tensor.name for tensor in tensors}
    headers = {path: [t for t in own if t.name in names] for path, own in headers.items()}
    types = quantized_types(config, headers) if encoder is None else {}
    method = (quantization_of(config) or {}).get("quant_method", "")
    by_dtype = Counter[str]()
    for tensor in tensors:
        by_dtype[tensor.dtype] += tensor.bytes
    return ModelFiles(
        folder=folder,
        weight_bytes=sum(tensor.bytes for tensor in tensors),
        parameters=sum(types.values()) or sum(tensor.elements for tensor in tensors),
        stored_dtype=method if types else DTYPES[by_dtype.most_common(1)[0][0]][1],
        created=int(max(path.stat().st_mtime for path in paths)),
        stamp=_stamp(folder),
        file_types=types,
        has_own_code=trust_remote_code and "auto_map" in config,
    )


def served_tensors(
    folder: Path, tensors: list[Tensor], trust_remote_code: bool = False
) -> list[Tensor]:
    """Those of ``tensors`` that are loaded: of a model with towers the language part's alone."""
    config = read_object(folder / "config.json")
    if (folder / MODULES).is_file() or (trust_remote_code and "auto_map" in config):
        return tensors
    if not has_towers(config):
        return tensors
    names = text_weights(tensor.name for tensor in tensors)
    return [tensor for tensor in tensors if tensor.name in names]


def _sidecar_files(folder: Path, paths: list[Path]) -> ModelFiles:
    """The files of a GGUF model, whose tensors have been held against its config already."""
    stored = read_stored_tensors(folder)
    return ModelFiles(
        folder=folder,
        weight_bytes=stored.weight_bytes,
        parameters=stored.parameters,
        stored_dtype="gguf",
        created=int(max(path.stat().st_mtime for path in paths)),
        stamp=_stamp(folder),
        file_types=stored.types,
    )


def _stamp(folder: Path) -> tuple[tuple[str, int, int, int], ...]:
    stats = {str(path): path.stat() for path in sorted(folder.rglob("*")) if path.is_file()}
    return tuple((name, s.st_ino, s.st_size, s.st_mtime_ns) for name, s in stats.items())


def is_complete(folder: Path) -> bool:
    """True where all files that serving needs are there; a look at names, not at contents."""
    try:
        weight_files(folder)
        if not is_original(folder):  # its conversion brings a tokenizer
            _check_tokenizer(folder)
    except ModelLoadFailed:
        return False
    return (folder / "config.json").is_file() and _has_steps(folder)


def _has_steps(folder: Path) -> bool:
    """True where an encoder's layers behind its pooling have their weights."""
    try:
        listed = json.loads((folder / MODULES).read_bytes())
        places = [e["path"] for e in listed if str(e["type"]).endswith((".Dense", ".LayerNorm"))]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return True  # no encoder, or one that its reader refuses
    return all((folder / str(place) / WEIGHTS).is_file() for place in places)


def is_original(folder: Path) -> bool:
    """True for a folder with one of our own architectures as the original system saved it."""
    try:
        config = read_object(folder / "config.json")
    except ModelLoadFailed:
        return False
    return config.get("model_type") in OWN_TYPES and not ORIGINAL_FIELDS.isdisjoint(config)


def weight_files(folder: Path) -> list[Path]:
    """The files to load weights from, all present. One wins over shards, as in transformers.

    Safetensors, or the GGUF files that a sidecar is of. Raises ModelLoadFailed.
    """
    if is_sidecar(folder):
        return stored_files(folder)
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        shards = sorted({folder / name for name in read_weight_map(folder / INDEX).values()})
        for shard in shards:
            if not shard.is_file():
                raise ModelLoadFailed(f"{INDEX} names {shard.name}, which is missing in {folder}")
        return shards
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ModelLoadFailed(
            f"{folder} has its weights only in the pickle format ({pickles[0]}), which can run "
            "code when it is read and is refused; convert them to safetensors, or name a revision "
            "that has them"
        )
    if kind := kind_of(folder):
        raise ModelLoadFailed(f"{folder} is {kind}")
    raise ModelLoadFailed(f"{folder} has no weights: neither {WEIGHTS} nor {INDEX}")


def read_weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name, from the index of a sharded model; plain file names only."""
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelLoadFailed(f"{index}: weight_map is missing or empty")
    for name in weight_map.values():
        is_file = isinstance(name, str) and is_path(name) and Path(name).name == name
        if not is_file or not name.endswith("safetensors"):
            raise ModelLoadFailed(f"{index}: {name!r} is not the name of a safetensors file")
    return weight_map


def _check_index(index: Path, headers: Mapping[str, list[Tensor]]) -> None:
    if not isinstance(read_object(index).get("metadata"), dict):
        raise ModelLoadFailed(
            f"{index} has no metadata, without which transformers does not read it: add "
            '"metadata": {} to it'
        )
    present = {(name, tensor.name) for name, tensors in headers.items() for tensor in tensors}
    for tensor, name in read_weight_map(index).items():
        if (name, tensor) not in present:
            raise ModelLoadFailed(f"{index}: tensor {tensor} is not in {name}")


def check_config(
    folder: Path,
    trust_remote_code: bool = False,
    knows: Callable[[str], bool] | None = None,
    encoder: EncoderKind | None = None,
) -> None:
    """Refuse what cannot be served, from the small files alone; arguments as in inspect_folder."""
    if not (folder / "config.json").is_file() and (kind := kind_of(folder)):
        raise ModelLoadFailed(f"{folder} is {kind}")
    config = read_object(folder / "config.json")
    model_type = config.get("model_type")
    if reason := _not_generating(folder, config, encoder):
        raise ModelNotServable(f"{folder}: {reason}", param="model")
    if encoder == "encoder":
        _check_is_encoder(folder)
    has_own_code = trust_remote_code and "auto_map" in config
    by_transformers = has_own_code or encoder is not None
    check_quantization(folder / "config.json", config, by_transformers=by_transformers)
    if trust_remote_code:
        return
    if not isinstance(model_type, str) or not (knows or _transformers_knows)(model_type):
        own = "needs code of its own (auto_map)" if "auto_map" in config else "is unknown"
        raise ModelLoadFailed(
            f"{folder / 'config.json'}: model_type {model_type!r} {own}; such code runs only for a "
            "registry entry with trust_remote_code: true"
        )


def refusal(folder: Path, encoder: EncoderKind | None = None) -> str | None:
    """The reason why a folder's kind of model can never be served; None where it may be."""
    try:
        config = read_object(folder / "config.json")
    except ModelLoadFailed:
        return None
    if reason := _not_generating(folder, config, encoder):
        return reason
    quantization = quantization_of(config)
    if quantization is None or encoder is not None or "auto_map" in config:
        return None
    try:
        check_method(quantization, config.get("model_type"))
    except ModelLoadFailed as error:
        return error.message
    return None


def _not_generating(
    folder: Path, config: Mapping[str, Any], encoder: EncoderKind | None
) -> str | None:
    architectures = config.get("architectures") or ["?"]
    name = str(architectures[0]) if isinstance(architectures, list) else "?"
    if config.get("is_encoder_decoder"):
        return (
            f"an encoder-decoder model ({config.get('model_type')}) cannot be served, only models "
            "that continue their own text"
        )
    if encoder == "cross_encoder":
        return _not_scoring(name, config)
    if encoder:
        return None
    if (folder / MODULES).is_file():
        return "a sentence encoder makes embeddings, it writes no text"
    if name.endswith(NOT_GENERATING) and not config.get("is_decoder"):
        return f"{name} does not generate text"
    return None


def _not_scoring(name: str, config: Mapping[str, Any]) -> str | None:
    """The reason why a model has no score for a pair of texts; None where it has one."""
    if not name.endswith("ForSequenceClassification"):
        return f"{name} has no head that scores a pair of texts, so it is no cross encoder"
    names = config.get("id2label")
    labels = len(names) if isinstance(names, Mapping) else config.get("num_labels", 2)
    if labels != 1:
        return f"{name} has {labels} labels; a cross encoder's head has one, the score of a pair"
    return None


def _check_is_encoder(folder: Path) -> None:
    if not (folder / MODULES).is_file():
        raise ModelLoadFailed(
            f"{folder} has no {MODULES}, so it is no sentence-transformers encoder; the embeddings "
            "of a causal model need a registry entry that says how to pool them, a cross encoder "
            "one with embedding: cross_encoder"
        )


def _check_tokenizer(folder: Path) -> None:
    if not any(all((folder / name).is_file() for name in names) for names in TOKENIZERS):
        raise ModelLoadFailed(f"{folder} has no tokenizer, such as tokenizer.json")
    for name in {name for names in TOKENIZERS for name in names}:
        if (folder / name).is_file():
            with (folder / name).open("rb") as file:
                refuse_pointer(folder / name, file.read(len(LFS_POINTER)))


@functools.cache
def _transformers_types() -> frozenset[str]:
    """The model types of the installed transformers, without the seconds that importing it takes.

    Its table is a module of plain data, which is run alone.
    """
    package = importlib.util.find_spec("transformers")
    for root in (package.submodule_search_locations or ()) if package else ():
        table = Path(root, "models", "auto", "auto_mappings.py")
        spec = importlib.util.spec_from_file_location("_transformers_auto_mappings", table)
        if spec and spec.loader and table.is_file():
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return frozenset(module.CONFIG_MAPPING_NAMES)
    return frozenset()


def _transformers_knows(model_type: str) -> bool:
    model_types = _transformers_types()
    return not model_types or model_type in model_types or model_type in OWN_TYPES
