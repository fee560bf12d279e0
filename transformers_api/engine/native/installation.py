"""The compiled kernels of this machine: there, to be made, or why not. Torch-free."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

from transformers_api.engine.platform.cpu import usable_cores
from transformers_api.kernels import build, variants
from transformers_api.kernels.provider import KernelProvider, kernel_provider
from transformers_api.kernels.variants import NativeUnavailable

__all__ = ["NativeUnavailable"]


@functools.cache
def provider(cache: Path, threads: int | None, isa: str) -> KernelProvider:
    """Return the provider of the kernels in ``cache``; None: as many threads as there are cores.

    ``isa`` here and below: the instruction set, "auto" for the best that this processor has.
    """
    return kernel_provider(cache, threads or usable_cores(), isa)


def unusable(isa: str, *, on_any_cpu: bool = False) -> str | None:
    """Return the reason why this machine cannot run the kernels; None if it can.

    ``on_any_cpu``: whatever its processor, as where an image is built.
    """
    try:
        variants.platform_of() if on_any_cpu else variants.choose(isa)
    except NativeUnavailable as error:
        return str(error)
    return None


def instruction_set(isa: str) -> str:
    """Return the instruction set that this machine runs. Raises NativeUnavailable."""
    return variants.choose(isa).name


def withheld() -> str | None:
    """Return the reason why "auto" is not the best that the processor has; None where it is."""
    return variants.withheld()


def find(cache: Path, isa: str) -> Path | None:
    """Return the library that was compiled into ``cache``. Raises NativeUnavailable."""
    return build.find(cache, variants.choose(isa))


def missing_compiler() -> str | None:
    """Return what is wrong with the machine's compiler; None if there is one."""
    try:
        build.find_compiler()
    except NativeUnavailable as error:
        return str(error)
    return None


def install(cache: Path, isa: str, *, for_any_cpu: bool = False) -> list[Path]:
    """Compile the kernels into ``cache``, if they are not there. Raises NativeUnavailable.

    ``for_any_cpu``: for each instruction set, whatever this processor has.
    """
    chosen = variants.of_machine() if for_any_cpu else [variants.choose(isa)]
    return [build.build(cache, variant=variant) for variant in chosen]


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


def compilations(cache: Path, threads: int | None, isa: str) -> Mapping[str, int]:
    """The runs of the compiler by this process so far, by outcome: succeeded, failed."""
    return provider(cache, threads, isa).outcomes
