"""LoRA adapters of tiny models: folders as peft saves them, and their bases with them merged in.

peft is not needed: what it computes is W + scale * B @ A, for each layer that it adapts.
"""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from transformers_api.engine.adapter_source import AdapterSource
from transformers_api.serving.models.adapter_files import inspect_adapter

PREFIX = "base_model.model."
ATTENTION = ["q_proj", "v_proj"]
ALL = [*ATTENTION, "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}


def matching(model: nn.Module, names: list[str]) -> list[str]:
    """The paths of the layers that end with one of these names."""
    return [p for p in linear_layers(model) if any(f".{p}".endswith(f".{n}") for n in names)]


def matrices(
    model: nn.Module, paths: list[str], rank: int, seed: int, ranks: dict[str, int] | None = None
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Random A (rank, in) and B (out, rank) by path, large enough to change what is said."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for path in paths:
        layer = linear_layers(model)[path]
        sizes = (layer.nx, layer.nf) if isinstance(layer, Conv1D) else layer.weight.shape[::-1]
        own = (ranks or {}).get(path, rank)
        made[path] = tuple(
            torch.randn(*shape, generator=generator) for shape in ((own, sizes[0]), (sizes[1], own))
        )
    return made


def save(folder: Path, parts: dict[str, tuple[torch.Tensor, torch.Tensor]], **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{PREFIX}{path}.lora_{name}.weight": tensor.contiguous()
        for path, pair in parts.items()
        for name, tensor in zip("AB", pair, strict=True)
    }
    if config.get("use_dora"):
        generator = torch.Generator().manual_seed(len(parts))
        for path, (_, up) in parts.items():
            lengths = 0.5 + torch.rand(len(up), generator=generator)
            tensors[f"{PREFIX}{path}.lora_magnitude_vector"] = lengths
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    standard = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "somebody/model",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.1,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
        "r": 4,
        "lora_alpha": 8,
        "target_modules": sorted({path.rpartition(".")[2] for path in parts}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(standard | config))
    return folder


def adapter(
    folder: Path,
    model: nn.Module,
    names: list[str] | None = None,
    *,
    seed: int = 0,
    rank: int = 4,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Path:
    """A folder with an adapter of all layers that end with one of ``names``."""
    made = matrices(model, matching(model, names or ATTENTION), rank, seed)
    parts = {path: (down.to(dtype), up.to(dtype)) for path, (down, up) in made.items()}
    return save(folder, parts, r=rank, **config)


def source(folder: Path, name: str | None = None) -> AdapterSource:
    return inspect_adapter(folder, name or folder.name)[0]


def merged(model: nn.Module, folder: Path) -> Any:
    """The model with W + scale * B @ A, by the documentation of peft and nothing of ours."""
    from safetensors.torch import load_file

    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    model = copy.deepcopy(model)
    for name in list(tensors):
        if ".lora_A." not in name:
            continue
        path = name.removeprefix(PREFIX).split(".lora_A")[0]
        rank, alpha = config["r"], config["lora_alpha"]
        for pattern, own in config.get("rank_pattern", {}).items():
            if re.match(rf"(.*\.)?({pattern})$", path):
                rank = own
                break
        for pattern, own in config.get("alpha_pattern", {}).items():
            if re.match(rf"(.*\.)?({pattern})$", path):
                alpha = own
                break
        scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
        lengths = tensors.get(name.replace("lora_A.weight", "lora_magnitude_vector"))
        delta = scale * tensors[name.replace("lora_A", "lora_B")].double() @ tensors[name].double()
        layer = linear_layers(model)[path]
        with torch.no_grad():
            weight = layer.weight
            if path == "lm_head":  # peft adapts the head alone, where it shares the embedding's
                weight = layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
            weight += (delta.T if isinstance(layer, Conv1D) else delta).to(weight.dtype)
            if lengths is not None:  # DoRA: rows of the sum get these lengths
                rows = 0 if isinstance(layer, Conv1D) else 1
                gain = lengths.double() / weight.double().norm(dim=rows)
                weight *= (gain if isinstance(layer, Conv1D) else gain[:, None]).to(weight.dtype)
    return model
