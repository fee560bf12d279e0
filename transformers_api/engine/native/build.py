"""Compiles kernels.cpp, once per machine: source, compiler and processor name the result."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

log = logging.getLogger(__name__)
SOURCE = Path(__file__).with_name("kernels.cpp")
COMPILERS = ("g++", "clang++")
FEATURES = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx512_bf16", "fma")
FLAGS = (
    *("-std=c++17", "-O3", "-shared", "-fPIC", "-pthread", "-ffp-contract=off"),
    *(f"-m{feature.replace('_', '')}" for feature in FEATURES),
)
TIMEOUT_S = 180


class NativeUnavailable(Exception):
    """Why this machine does without the kernels; never more than a matter of speed."""


def build(cache: Path, compiler: str | None = None) -> Path:
    """The compiled library in ``cache``, from an earlier run or made now (some seconds).

    Processes may do so at once: each writes a file of its own and renames it. ``compiler`` is one
    other than the first that is found. Raises NativeUnavailable.
    """
    check_processor()
    compiler = compiler or _compiler()
    target = cache / f"kernels-{_key(compiler)}.so"
    if not target.is_file():
        _compile(compiler, target)
    return target


def check_processor() -> None:
    """Raises NativeUnavailable for a CPU that lacks an instruction the kernels use."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise NativeUnavailable("the kernels are written for Linux on x86-64")
    if missing := [name for name in FEATURES if name not in _cpu_flags()]:
        raise NativeUnavailable(f"the processor has no {', '.join(missing)}")


def _cpu_flags() -> set[str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


def _compiler() -> str:
    found = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    if found is None:
        raise NativeUnavailable(f"there is no compiler ({', '.join(COMPILERS)})")
    return found


def _key(compiler: str) -> str:
    """All that the result depends on."""
    version = _run([compiler, "--version"])
    parts = [SOURCE.read_text(), version, " ".join(FLAGS), platform.libc_ver()[1]]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _compile(compiler: str, target: Path) -> None:
    start = time.monotonic()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=target.stem, suffix=".part", dir=target.parent)
    except OSError as error:
        raise NativeUnavailable(f"cannot write to {target.parent}: {error.strerror}") from error
    os.close(handle)
    made = Path(name)
    try:
        _run([compiler, *FLAGS, str(SOURCE), "-o", name])
        made.replace(target)
    finally:
        made.unlink(missing_ok=True)
    log.info("Native kernels compiled in %.1f s: %s", time.monotonic() - start, target)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailable(f"{command[0]} cannot be run: {error}") from error
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), "")
        raise NativeUnavailable(f"{command[0]} failed: {first or f'status {done.returncode}'}")
    return done.stdout
