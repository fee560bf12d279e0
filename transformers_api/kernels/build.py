"""Compiles kernels.cpp into a cache, once: source, flags and C library name the result.

The flags name the instructions and not the machine that compiles, so that a library can be made
where an image is built and be used elsewhere; whether a processor has them is asked at run time.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)
SOURCE = Path(__file__).with_name("src") / "kernels.cpp"
COMPILERS = ("g++", "clang++")
FEATURES = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx512_bf16", "fma")
FLAGS = (
    *("-std=c++17", "-O3", "-shared", "-fPIC", "-pthread", "-ffp-contract=off"),
    *(f"-m{feature.replace('_', '')}" for feature in FEATURES),
)
TIMEOUT_S = 1800  # it has a low priority, and a server may be busy
outcomes = {"succeeded": 0, "failed": 0}  # how often the compiler was run by this process


class NativeUnavailable(Exception):
    """Why this machine does without the kernels; never more than a matter of speed."""


def find(cache: Path) -> Path | None:
    """The compiled library, if an earlier ``build`` left it in ``cache``."""
    made = cache / _name()
    return made if made.is_file() else None


def build(cache: Path, compiler: str | None = None) -> Path:
    """The compiled library in ``cache``, from an earlier run or made now (half a minute).

    Whoever asks meanwhile, also in another process, waits and finds it. ``compiler`` is one other
    than the first that is found. Whether this processor can run it is another question. Raises
    NativeUnavailable.
    """
    check_platform()
    if found := find(cache):
        return found
    compiler = compiler or find_compiler()
    with _locked(cache):
        if find(cache) is None:
            _compile(compiler, cache / _name())
    return cache / _name()


def check_processor() -> None:
    """Raises NativeUnavailable for a CPU that lacks an instruction the kernels use."""
    check_platform()
    if missing := [name for name in FEATURES if name not in _cpu_flags()]:
        raise NativeUnavailable(f"the processor has no {', '.join(missing)}")


def check_platform() -> None:
    """Raises NativeUnavailable where the kernels can be of no use."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise NativeUnavailable("the kernels are written for Linux on x86-64")


def _cpu_flags() -> set[str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


def find_compiler() -> str:
    """The compiler of this machine. Raises NativeUnavailable."""
    found = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    if found is None:
        raise NativeUnavailable(f"there is no compiler ({', '.join(COMPILERS)})")
    return found


def _name() -> str:
    """Of the file: says all that it depends on, but for the compiler that happens to be there."""
    parts = [SOURCE.read_text(), " ".join(FLAGS), platform.libc_ver()[1]]
    return f"kernels-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}.so"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Made if need be, and nobody else's while it lasts."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise NativeUnavailable(f"cannot write to {folder}: {error.strerror}") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        for left in folder.glob("kernels-*.part"):  # of somebody who was stopped
            left.unlink(missing_ok=True)
        yield
    except OSError as error:
        raise NativeUnavailable(f"cannot write to {folder}: {error.strerror}") from error
    finally:
        os.close(handle)


def _compile(compiler: str, target: Path) -> None:
    start = time.monotonic()
    made = target.with_suffix(".part")
    try:
        made.touch()
        _run(compiler, [*FLAGS, str(SOURCE), "-o", str(made)])
        made.chmod(0o755)  # whatever the umask: it may be another user who runs the server
        made.replace(target)
        outcomes["succeeded"] += 1
    except (NativeUnavailable, OSError):
        outcomes["failed"] += 1
        raise
    finally:
        made.unlink(missing_ok=True)
    log.info("Native kernels compiled in %.1f s: %s", time.monotonic() - start, target)


def _run(compiler: str, arguments: list[str]) -> None:
    patient = [nice, "-n", "10"] if (nice := shutil.which("nice")) else []  # a server may be busy
    command = [*patient, compiler, *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailable(f"{compiler} cannot be run: {error}") from error
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), "")
        raise NativeUnavailable(f"{compiler} failed: {first or f'status {done.returncode}'}")
