"""Folders and files that look like a model and are something else: what they are, what would do."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers_api.checkpoints.headers.gguf_split import first_parts
from transformers_api.checkpoints.headers.quantized import check_method, quantization_of
from transformers_api.errors import ModelLoadFailed

PART = re.compile(r"-\d{5}-of-\d{5}(?=\.gguf$)")  # in the name of a part of a model
NOT_A_MODEL = "mmproj"  # in the name of a GGUF file beside a model: a projector of images
# quant_method in config.json -> the package without which transformers cannot read such weights
PACKAGES = {
    "gptq": "optimum",
    "awq": "gptqmodel",
    "bitsandbytes": "bitsandbytes",
    "bitsandbytes_4bit": "bitsandbytes",
    "bitsandbytes_8bit": "bitsandbytes",
    "compressed-tensors": "compressed_tensors",
    "hqq": "hqq",
    "quanto": "optimum",
    "torchao": "torchao",
    "aqlm": "aqlm",
    "vptq": "vptq",
    "eetq": "eetq",
    "spqr": "spqr_quant",
    "auto-round": "auto_round",
    "quark": "quark",
}
# A pattern of file names -> what a folder with such a file is, where config.json or weights lack.
_KINDS = (
    ("model_index.json", "a pipeline of diffusers, which makes images"),
    ("params.json", "a model in its makers' own format; take the one converted to transformers"),
    ("weights*.npz", "a model in an old format of MLX; take the one in the format of transformers"),
    ("weights*.safetensors", "a model in a format of MLX; take the one in that of transformers"),
    ("*.onnx", "a model for ONNX Runtime; take the one with safetensors"),
    ("openvino_model.xml", "a model for OpenVINO; take the one with safetensors"),
    ("tf_model.h5", "a model for TensorFlow; take the one with safetensors"),
    ("flax_model*.msgpack", "a model for Flax; take the one with safetensors"),
)


def ggufs(names: Iterable[str]) -> list[str]:
    """The GGUF files among ``names`` that might be a model; of one in parts the first."""
    return first_parts(n for n in names if n.endswith(".gguf") and NOT_A_MODEL not in n)


def only_gguf(folder: Path) -> Path | None:
    """The GGUF file of a folder that has no other weights; None where there is not exactly one."""
    if any(folder.glob("*.safetensors")):
        return None
    names = ggufs(path.name for path in folder.glob("*.gguf"))
    models = {PART.sub("", name) for name in names}
    return folder / names[0] if len(models) == 1 else None


def check_is_adapter(folder: Path) -> None:
    """Raise ModelLoadFailed for what is no LoRA adapter in safetensors."""
    if not folder.is_dir():
        raise ModelLoadFailed(f"{folder} is not a folder")
    if not (folder / "adapter_config.json").is_file():
        raise ModelLoadFailed(f"{folder} has no adapter_config.json, so it is no adapter")
    if (folder / "adapter_model.safetensors").is_file():
        return
    if (folder / "adapter_model.bin").is_file():
        raise ModelLoadFailed(
            f"{folder} has its weights only in the pickle format (adapter_model.bin), which can "
            "run code when it is read and is refused; save the adapter as safetensors"
        )
    raise ModelLoadFailed(f"{folder} has no adapter_model.safetensors")


def kind_of(folder: Path) -> str | None:
    """The kind of a folder that holds no model of ours."""
    if (folder / "adapter_config.json").is_file():
        base = _base_of(folder)
        return f"an adapter{base}, no model: give it a registry entry with adapter and base"
    if names := ggufs(path.name for path in folder.glob("*.gguf")):
        return f"a folder with {len(names)} GGUF files; name one of them: {', '.join(names[:5])}"
    kinds = (kind for pattern, kind in _KINDS if any(folder.glob(pattern)))
    return next(kinds, None)


def _base_of(folder: Path) -> str:
    try:
        base = json.loads((folder / "adapter_config.json").read_bytes())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""
    return f" for {base}" if isinstance(base, str) and base else ""


def check_format(path: Path, config: Mapping[str, Any], tensors: Iterable[str]) -> None:
    """Refuse weights in the format of MLX. Raises ModelLoadFailed."""
    packed = next((name for name in tensors if name.endswith(".scales")), None)
    if packed is not None and isinstance(config.get("quantization"), dict):
        bits = config["quantization"].get("bits", "few")
        raise ModelLoadFailed(
            f"{path.parent}: weights of {bits} bits in the format of MLX ({packed}), which only "
            "MLX reads; take the model that they were made from"
        )


def check_quantization(path: Path, config: Mapping[str, Any], *, by_transformers: bool) -> None:
    """Refuse weights in a quantised format that cannot be read here. Raises ModelLoadFailed.

    ``by_transformers``: of a model that does not generate, or has code of its own.
    """
    quantization = quantization_of(config)
    if quantization is None:
        return
    method = quantization["quant_method"]
    if not by_transformers:
        try:
            return check_method(quantization, config.get("model_type"))
        except ModelLoadFailed as error:
            raise ModelLoadFailed(f"{path}: {error.message}") from None
    package = PACKAGES.get(method)
    if package is not None and importlib.util.find_spec(package) is None:
        raise ModelLoadFailed(
            f"{path}: weights in the format {method}, which need the package {package}; take the "
            "model that they were made from, or a GGUF file"
        )
