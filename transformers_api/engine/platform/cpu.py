"""The number of threads that this process can really run at once."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path("/")


def usable_cores(root: Path = ROOT) -> int:
    """Cores by affinity, two threads of one core counted once, within the quota of the cgroup."""
    allowed = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)
    cores = {_siblings(root, cpu) for cpu in allowed}
    quota = _quota(root)
    return max(1, min(len(cores), int(quota)) if quota else len(cores))


def _siblings(root: Path, cpu: int) -> str:
    path = root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
    return _read(path) or str(cpu)


def _quota(root: Path) -> float | None:
    """CPUs that the cgroup grants; None without a limit. Version 2 first, then version 1."""
    group = next(
        (line[3:] for line in _read(root / "proc/self/cgroup").splitlines() if line[:3] == "0::"),
        "/",
    )
    folder = root / "sys/fs/cgroup"
    granted = [
        float(words[0]) / float(words[1])
        for path in {folder / group.strip("/") / "cpu.max", folder / "cpu.max"}
        if len(words := _read(path).split()) == 2 and words[0] != "max"
    ]
    quota = _read(folder / "cpu/cpu.cfs_quota_us")
    if quota and int(quota) > 0:
        granted.append(int(quota) / float(_read(folder / "cpu/cpu.cfs_period_us") or 100000))
    return min(granted, default=None)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
