"""Free memory of a device, and giving it back."""

from __future__ import annotations

import gc

import torch

from transformers_api.heap import trim_memory
from transformers_api.memory import free_bytes


def available_bytes(device: str) -> int:
    """Free memory on ``device``: the GPU's, or the machine's within the cgroup's limit."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    return free_bytes()


def release_memory() -> None:
    """Return what is no longer referenced to the operating system."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim_memory()
