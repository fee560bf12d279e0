"""Instruction sets that the kernels are compiled for; the same sources, a library for each.

The flags name the instructions and not the machine that compiles, so that a library can be made
where an image is built and be used elsewhere; whether a processor has them is asked at run time.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass

from transformers_api.kernels.platforms import Platform, platform_named

TILE_UNIT = "amx_tile"
# Of Linux on x86-64: arch_prctl(ARCH_REQ_XCOMP_PERM, the registers of the tile unit).
_ARCH_PRCTL, _ASK_FOR_STATE, _TILE_STATE = 158, 0x1023, 18


class NativeUnavailable(Exception):
    """The reason why this machine does without the kernels; never more than a matter of speed."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One instruction set. ``features`` as Linux names them in /proc/cpuinfo.

    ``flags``: the compiler's; ``machine``: as Linux names it.
    """

    name: str
    features: tuple[str, ...]
    flags: tuple[str, ...]
    machine: str = "x86_64"

    def missing(self, cpu_flags: set[str]) -> list[str]:
        """The instructions that a processor lacks for it."""
        return [name for name in self.features if name not in cpu_flags]

    def obstacle(self, cpu_flags: set[str]) -> str | None:
        """The reason why this process cannot run it on a processor that has these instructions.

        The kernel is asked for the tile unit if need be, which lasts for the process and its heirs.
        """
        if missing := self.missing(cpu_flags):
            return f"the processor has no {', '.join(missing)}"
        if TILE_UNIT in self.features and (error := ask_for_tile_unit()):
            return f"the system refuses the processor's tile unit: {error}"
        return None


def _x86(name: str, features: tuple[str, ...], *defines: str) -> Variant:
    instructions = (f"-m{feature.replace('_', '').replace('amx', 'amx-')}" for feature in features)
    return Variant(name, features, (*instructions, *(f"-D{define}" for define in defines)))


_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "fma", "f16c")
_AVX512_BF16 = (*_AVX512, "avx512_bf16")
# The best first.
VARIANTS = (
    _x86("amx", (*_AVX512_BF16, TILE_UNIT, "amx_bf16", "amx_int8"), "ISA_AVX512", "ISA_AMX"),
    _x86("avx512_bf16", _AVX512_BF16, "ISA_AVX512"),
    _x86("avx512", _AVX512, "ISA_AVX512"),
    _x86("avx2_vnni", (*_AVX2, "avx_vnni"), "ISA_AVX2", "HAS_VNNI256"),
    _x86("avx2", _AVX2, "ISA_AVX2"),
    Variant(
        "neon_bf16",
        ("asimd", "asimddp", "i8mm", "bf16"),
        ("-march=armv8.2-a+dotprod+i8mm+bf16", "-DISA_NEON", "-DHAS_BF16_I8MM"),
        machine="aarch64",
    ),
    Variant(
        "neon",
        ("asimd", "asimddp"),
        ("-march=armv8.2-a+dotprod", "-DISA_NEON"),
        machine="aarch64",
    ),
)


def of_machine(target: Platform | None = None) -> list[Variant]:
    """The variants for a kind of machine, by default this one, the best first.

    Without those whose instructions its system cannot say that a processor has.
    """
    target = target or platform_named()
    return [
        variant
        for variant in VARIANTS
        if target
        and variant.machine == target.machine
        and (target.names is None or target.names.issuperset(variant.features))
    ]


def choose(isa: str = "auto") -> Variant:
    """The variant of this name, or the best that this processor can run ("auto").

    Raises NativeUnavailable where it has not got the instructions, or may not use them.
    """
    platform_of()
    own, variants = cpu_flags(), of_machine()
    for variant in variants:
        if isa in ("auto", variant.name) and not variant.obstacle(own):
            return variant
    nearest = next((v for v in VARIANTS if v.name == isa), variants[-1])
    raise NativeUnavailable(nearest.obstacle(own))


def usable() -> list[Variant]:
    """The variants that this process can run, the best first."""
    own = cpu_flags()
    return [variant for variant in of_machine() if not variant.obstacle(own)]


def withheld() -> str | None:
    """The reason why the best variant that the processor has is not used; None if it is."""
    own = cpu_flags()
    best = next((variant for variant in of_machine() if not variant.missing(own)), None)
    return best.obstacle(own) if best else None


def ask_for_tile_unit() -> str | None:
    """Ask the kernel for the registers of the tile unit; the error's text where it refuses."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(_ARCH_PRCTL, _ASK_FOR_STATE, _TILE_STATE) == 0:
        return None
    return os.strerror(ctypes.get_errno())


def platform_of(system: str = "", machine: str = "") -> Platform:
    """The platform of these names, by default this one. Raises NativeUnavailable."""
    if platform := platform_named(system, machine):
        return platform
    raise NativeUnavailable(
        "the kernels are written for Linux on x86-64 and aarch64, and for macOS and Windows there"
    )


def cpu_flags() -> set[str]:
    """The instructions of this processor, as Linux names them."""
    platform = platform_named()
    return platform.detect() if platform else set()
