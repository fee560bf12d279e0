"""Free memory, and giving it back."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import torch

from transformers_api.heap import trim_memory


def available_bytes(device: str) -> int:
    """Free memory on ``device``: the GPU's, or the machine's within the cgroup's limit."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    free = _meminfo("MemAvailable")
    limit, used = _cgroup("memory.max"), _cgroup("memory.current")
    if limit is not None and used is not None:
        free = min(free, limit - used + (_cgroup_reclaimable() or 0))
    return max(free, 0)


def release_memory() -> None:
    """Return what is no longer referenced to the operating system."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim_memory()


def _meminfo(name: str) -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux
        return _physical_half()
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(name + ":")), 0)


def _physical_half() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _cgroup(name: str) -> int | None:
    """A value of this process's cgroup v2; None without a limit."""
    try:
        path = Path("/proc/self/cgroup").read_text().rsplit("::", 1)[-1].strip()
        text = Path(f"/sys/fs/cgroup{path}/{name}").read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _cgroup_reclaimable() -> int | None:
    """Page cache counts as used in a cgroup but can be taken back."""
    try:
        path = Path("/proc/self/cgroup").read_text().rsplit("::", 1)[-1].strip()
        lines = Path(f"/sys/fs/cgroup{path}/memory.stat").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), None)
