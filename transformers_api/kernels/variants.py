"""Instruction sets that the kernels are compiled for; the same sources, a library for each.

The flags name the instructions and not the machine that compiles, so that a library can be made
where an image is built and be used elsewhere; whether a processor has them is asked at run time.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path


class NativeUnavailable(Exception):
    """The reason why this machine does without the kernels; never more than a matter of speed."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One instruction set. ``features`` as Linux names them in /proc/cpuinfo."""

    name: str
    features: tuple[str, ...]
    defines: tuple[str, ...]

    @property
    def flags(self) -> tuple[str, ...]:
        """The compiler's flags for it."""
        return (
            *(f"-m{name.replace('_', '')}" for name in self.features),
            *(f"-D{name}" for name in self.defines),
        )

    def missing(self, cpu_flags: set[str]) -> list[str]:
        """The instructions that a processor lacks for it."""
        return [name for name in self.features if name not in cpu_flags]


_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "fma", "f16c")
# The best first.
VARIANTS = (
    Variant("avx512_bf16", (*_AVX512, "avx512_bf16"), ("ISA_AVX512",)),
    Variant("avx512", _AVX512, ("ISA_AVX512",)),
    Variant("avx2_vnni", (*_AVX2, "avx_vnni"), ("ISA_AVX2", "HAS_VNNI256")),
    Variant("avx2", _AVX2, ("ISA_AVX2",)),
)
NAMES = tuple(variant.name for variant in VARIANTS)


def choose(isa: str = "auto") -> Variant:
    """The variant of this name, or the best that this processor can run ("auto").

    Raises NativeUnavailable where it has not got the instructions.
    """
    check_platform()
    own = cpu_flags()
    for variant in VARIANTS:
        if isa in ("auto", variant.name) and not variant.missing(own):
            return variant
    nearest = next((v for v in VARIANTS if v.name == isa), VARIANTS[-1])
    raise NativeUnavailable(f"the processor has no {', '.join(nearest.missing(own))}")


def check_platform() -> None:
    """Raise NativeUnavailable where the kernels can be of no use."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise NativeUnavailable("the kernels are written for Linux on x86-64")


def cpu_flags() -> set[str]:
    """The instructions of this processor, as Linux names them."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return set(next((line for line in lines if line.startswith("flags")), "").split())
