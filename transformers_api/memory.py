"""The memory of this machine, within its cgroup's limit, and of this process."""

from __future__ import annotations

import os
from pathlib import Path


def process_bytes() -> int | None:
    """Memory of this process that is in RAM; None where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # not Linux
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def total_bytes() -> int:
    """All the memory that this process may take."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(total, _cgroup("memory.max") or total)


def free_bytes() -> int:
    """The memory that is free, or can be taken back from caches."""
    free = _meminfo("MemAvailable")
    limit, used = _cgroup("memory.max"), _cgroup("memory.current")
    if limit is not None and used is not None:
        free = min(free, limit - used + (_cgroup_reclaimable() or 0))
    return max(free, 0)


def _meminfo(name: str) -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(name + ":")), 0)


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
