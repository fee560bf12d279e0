"""The compiled kernels of this machine: there, to be made, or why not. Torch-free."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

from transformers_api.engine.platform.cpu import usable_cores
from transformers_api.kernels import build
from transformers_api.kernels.build import NativeUnavailable
from transformers_api.kernels.provider import KernelProvider, kernel_provider

__all__ = ["NativeUnavailable"]


@functools.cache
def provider(cache: Path, threads: int | None) -> KernelProvider:
    """Return the provider of the kernels in ``cache``; None: as many threads as there are cores."""
    return kernel_provider(cache, threads or usable_cores())


def unusable(*, on_any_cpu: bool = False) -> str | None:
    """Return the reason why this machine cannot run the kernels; None if it can.

    ``on_any_cpu``: whatever its processor, as where an image is built.
    """
    try:
        (build.check_platform if on_any_cpu else build.check_processor)()
    except NativeUnavailable as error:
        return str(error)
    return None


def find(cache: Path) -> Path | None:
    """Return the library that was compiled into ``cache``."""
    return build.find(cache)


def missing_compiler() -> str | None:
    """Return what is wrong with the machine's compiler; None if there is one."""
    try:
        build.find_compiler()
    except NativeUnavailable as error:
        return str(error)
    return None


def install(cache: Path) -> Path:
    """Compile the kernels into ``cache``, if they are not there. Raises NativeUnavailable."""
    return build.build(cache)


def untrusted(cache: Path) -> str | None:
    """Return the reason why libraries in this folder are not opened; None where they may be."""
    try:
        build.check_folder(cache)
    except NativeUnavailable as error:
        return str(error)
    return None


def refusal(library: Path) -> str | None:
    """Return the reason why this library is not opened; None where it may be."""
    try:
        build.check_trusted(library)
    except build.LibraryRefused as error:
        return str(error)
    return None


def compilations(cache: Path, threads: int | None) -> Mapping[str, int]:
    """The runs of the compiler by this process so far, by outcome: succeeded, failed."""
    return provider(cache, threads).outcomes
