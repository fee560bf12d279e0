"""Facts that a load needs or states: the devices, free memory, what an engine says of its model."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from transformers_api import __version__
from transformers_api.serving.models.preflight import weight_files
from transformers_api.serving.models.spec import ModelFiles

if TYPE_CHECKING:
    from transformers_api.engine.base import EngineFacts


def register_families() -> None:
    """Make our own architectures known to transformers. On the engine thread."""
    from transformers_api import families

    families.register()


def torch_devices() -> list[str]:
    """The devices of this machine. On the engine thread."""
    import torch

    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    mps = ["mps"] if torch.backends.mps.is_available() else []
    return ["cpu", *(["cuda"] if gpus else []), *gpus, *mps]


def available_bytes(device: str) -> int:
    """Free memory on ``device``. On the engine thread."""
    from transformers_api.engine.platform import memory

    return memory.available_bytes(device)


def engine_facts(facts: EngineFacts) -> dict[str, Any]:
    """The fields of LoadedModel that are facts of its engine."""
    return {
        "device": facts.device,
        "dtype": facts.dtype,
        "quantization": facts.quantization,
        "kernels": facts.kernels,
        "isa": facts.isa,
        "bytes": facts.bytes,
    }


def fingerprint_of(files: ModelFiles, facts: dict[str, Any]) -> str:
    """The ``system_fingerprint`` of a model: the same for the same files, served the same way."""
    weights = [(path.name, path.stat().st_size) for path in weight_files(files.folder)]
    content = repr((__version__, weights, files.created, sorted(facts.items())))
    return "fp_" + hashlib.sha256(content.encode()).hexdigest()[:10]
