"""Compiles the sources into a cache, once for each instruction set that is asked for.

Sources, flags and C library name the result.

A library is code that a server runs, so one is opened only if nobody but this user or root can have
written it, and if it is what was compiled: its name ends with the digest of its bytes.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from transformers_api.kernels.platforms import Platform
from transformers_api.kernels.variants import (
    NativeUnavailable,
    Variant,
    choose,
    of_machine,
    platform_of,
)

log = logging.getLogger(__name__)
SOURCES = Path(__file__).with_name("src")
MAIN_SOURCE = SOURCES / "kernels.cpp"  # which includes the others
PACKAGED = Path(__file__).with_name("lib")  # libraries that came in a wheel, made by setup.py
ARM_KIND = "-march="  # of variants for aarch64 alone
COMPILERS = ("g++", "clang++")  # or the package ziglang
FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC", "-pthread", "-ffp-contract=off")
TIMEOUT_S = 1800  # it has a low priority, and a server may be busy
WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
DIGITS = 32  # hexadecimal, of the digest in a name


class LibraryRefused(NativeUnavailable):
    """A compiled library that must not be used. Another may be compiled in its place."""


def find(cache: Path, variant: Variant | None = None) -> Path | None:
    """The compiled library of the package, or what an earlier ``build`` left in ``cache``.

    It may be refused yet. ``variant`` None: the best that this processor can run.
    """
    if path := _packaged(variant or choose()):
        return path
    paths = sorted(cache.glob(f"{_prefix(variant or choose())}-*{platform_of().suffix}"))
    return next((path for path in paths if _refusal(path) is None), paths[0] if paths else None)


def build(
    cache: Path,
    compiler: Sequence[str] = (),
    replace: bool = False,
    outcomes: dict[str, int] | None = None,
    variant: Variant | None = None,
) -> Path:
    """The compiled library in ``cache``, from an earlier run or compiled now (half a minute).

    Callers that arrive meanwhile, also in other processes, wait for the same result. ``variant``
    None: the best that this processor can run. ``compiler``: the command of another one than the
    first on the path. ``replace``: compile even if a library is there.
    ``outcomes``: counts the runs of the compiler that "succeeded" and "failed". Whether this
    processor can run the library is another question. Raises NativeUnavailable.
    """
    platform_of()
    variant = variant or choose()
    if not replace and (library := _reusable(cache, variant)):
        return library
    compiler = compiler or find_compiler()
    with _locked(cache):
        library = None if replace else _reusable(cache, variant)
        return library or _compile(compiler, cache, variant, {} if outcomes is None else outcomes)


def build_for_package(folder: Path, target: Platform | None = None) -> list[Path]:
    """Compile the libraries of all instruction sets of a platform into ``folder``.

    ``target`` None: this platform. Raises NativeUnavailable.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = target or platform_of()
    compiler = find_compiler(portable=True, target=target)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = pool.map(lambda v: _compile(compiler, folder, v, {}, target), of_machine(target))
        libraries = list(compiled)
    for path in folder.glob("*.lib"):  # what linkers would need, beside libraries for Windows
        path.unlink()
    return libraries


def wheel_platform(compiler: Sequence[str], target: Platform) -> str:
    """The platform of a wheel with what ``compiler`` makes, in a wheel's words."""
    if "ziglang" in compiler or target.system != "linux":
        return target.tag
    return f"linux_{target.machine}"  # the C library is as new as this machine's


def _packaged(variant: Variant) -> Path | None:
    paths = PACKAGED.glob(f"{_prefix(variant, libc='')}-*{platform_of().suffix}")
    return next((path for path in paths if _is_whole(path)), None)


def check_trusted(path: Path) -> None:
    """Check that nobody but this user or root can have written a library, and that it is whole.

    One that came in the wheel is trusted as far as its modules are, which lie beside it.
    Raises LibraryRefused for the file, which may be a link, of another owner, writable for a group
    or for all, or damaged; NativeUnavailable for its folder.
    """
    if path.parent == PACKAGED and _is_whole(path):
        return
    check_folder(path.parent)
    if reason := _refusal(path):
        raise LibraryRefused(f"{path} {reason}")


def content_name(
    library: bytes, variant: Variant | None = None, target: Platform | None = None
) -> str:
    """The file's name: a hash of all that it depends on but the compiler, and its own digest.

    ``target``: the platform of a wheel that it is in; None: it is compiled for this machine.
    """
    digest = hashlib.sha256(library).hexdigest()[:DIGITS]
    prefix = _prefix(variant or choose(), libc="" if target else None)
    return f"{prefix}-{digest}{(target or platform_of()).suffix}"


def _refusal(path: Path) -> str | None:
    """The reason why this file is not opened."""
    if path.is_symlink() or not path.is_file():
        return "is not a file of this folder"
    if reason := _distrust(path):
        return reason
    if not _is_whole(path):
        return "is not what was compiled: its bytes have another digest than its name says"
    return None


def _is_whole(path: Path) -> bool:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:DIGITS] == path.stem.rpartition("-")[2]


def check_folder(folder: Path) -> None:
    """Raise NativeUnavailable for a folder into which others may write; see ``check_trusted``."""
    folder = folder.resolve()
    if reason := _distrust(folder):
        raise NativeUnavailable(f"no library is opened in {folder}, because it {reason}")


def _distrust(path: Path) -> str | None:
    try:
        status = path.stat()
    except OSError as error:
        return f"cannot be examined: {error.strerror}"
    if not hasattr(os, "geteuid"):
        return "is on a system that does not say by owner and mode who may write it"
    if status.st_uid not in (0, os.geteuid()):
        return f"belongs to the user {status.st_uid}, not to {os.geteuid()} or root"
    if status.st_mode & WRITABLE_BY_OTHERS:
        return f"may be written by others (mode {stat.S_IMODE(status.st_mode):o})"
    return None


def _reusable(cache: Path, variant: Variant) -> Path | None:
    path = find(cache, variant)
    if path is None:
        return None
    try:
        check_trusted(path)
    except LibraryRefused:
        return None
    return path


def find_compiler(*, portable: bool = False, target: Platform | None = None) -> list[str]:
    """The command of a compiler. Raises NativeUnavailable.

    ``portable``: rather one whose libraries run with an older C library than this machine's.
    ``target``: what they are for; another platform than this one takes ziglang.
    """
    here = platform_of()
    target = target or here
    zig = [sys.executable, "-m", "ziglang", "c++", "-target", target.target, "-s"]
    if not here.can_compile:
        raise NativeUnavailable(f"on {here.system} kernels come in a wheel or not at all")
    if (portable or target is not here) and find_spec("ziglang"):
        return zig
    if target is not here:
        name = f"{target.machine} on {target.system}"
        raise NativeUnavailable(f"only ziglang compiles for {name}, and it is not installed")
    if path := next((path for name in COMPILERS if (path := shutil.which(name))), None):
        return [path]
    if find_spec("ziglang"):
        return zig
    raise NativeUnavailable(f"there is no compiler ({', '.join([*COMPILERS, 'ziglang'])})")


def _prefix(variant: Variant, libc: str | None = None) -> str:
    """The beginning of a library's name; ``libc`` "": of one in a wheel, whose name has that."""
    libc = platform.libc_ver()[1] if libc is None else libc
    sources = [f"{path.name}\n{path.read_text('utf-8')}" for path in sorted(SOURCES.iterdir())]
    parts = [*sources, " ".join([*FLAGS, *variant.flags]), libc]
    digest = hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]
    return f"kernels-{variant.name}-{digest}"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock the folder against other processes; it is made if need be."""
    import fcntl  # which Windows has not, where nothing is compiled

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o755, exist_ok=True)  # not for a group to write, whatever the umask
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise NativeUnavailable(f"cannot write to {folder}: {error.strerror}") from error
    try:
        check_folder(folder)
        fcntl.flock(handle, fcntl.LOCK_EX)
        for part in folder.glob("kernels-*.part"):  # of a process that was stopped
            part.unlink(missing_ok=True)
        yield
    except OSError as error:
        raise NativeUnavailable(f"cannot write to {folder}: {error.strerror}") from error
    finally:
        os.close(handle)


def _compile(
    compiler: Sequence[str],
    folder: Path,
    variant: Variant,
    outcomes: dict[str, int],
    packaged_for: Platform | None = None,
) -> Path:
    """The library, on the disk under its name; those that were made of the same before are gone."""
    start = time.monotonic()
    prefix = _prefix(variant, libc="" if packaged_for else None)
    part = folder / f"{prefix}.part"
    outcome = "failed"
    try:
        part.touch()
        flags = [*FLAGS, *_flags_for(compiler, variant)]
        _run(compiler, [*flags, str(MAIN_SOURCE), "-o", str(part)])
        part.chmod(0o755)  # whatever the umask: it may be another user who runs the server
        target = folder / content_name(part.read_bytes(), variant, packaged_for)
        _sync(part)  # else a crash may leave the name, and half of the bytes
        part.replace(target)
        _sync(folder)
        for other in set(folder.glob(f"{prefix}-*{target.suffix}")) - {target}:
            other.unlink()
        outcome = "succeeded"
    finally:
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        part.unlink(missing_ok=True)
    log.info("Native kernels compiled in %.1f s: %s", time.monotonic() - start, target)
    return target


def _flags_for(compiler: Sequence[str], variant: Variant) -> list[str]:
    """The variant's flags in the compiler's words: ziglang names processors, not their kinds."""
    if "ziglang" not in compiler:
        return list(variant.flags)
    return [
        f"-mcpu=generic+{flag.removeprefix(ARM_KIND).replace('armv8.2-a', 'v8_2a')}"
        if flag.startswith(ARM_KIND)
        else flag
        for flag in variant.flags
    ]


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _run(compiler: Sequence[str], arguments: list[str]) -> None:
    low_priority = [nice, "-n", "10"] if (nice := shutil.which("nice")) else []
    command = [*low_priority, *compiler, *arguments]
    name = compiler[0] if len(compiler) == 1 else "ziglang"
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailable(f"{name} cannot be run: {error}") from error
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), "")
        raise NativeUnavailable(f"{name} failed: {first or f'status {done.returncode}'}")
