"""Systems and machines that the kernels are built for, and all in which they differ.

Linux is where they are used and tested. The libraries for macOS and Windows are made by ziglang on
Linux, and nobody has run one yet.
"""

from __future__ import annotations

import ctypes
import importlib
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

# Names that systems have for what Linux calls otherwise.
SYSTEMS = {"darwin": "macos"}
MACHINES = {"arm64": "aarch64", "amd64": "x86_64"}


@dataclass(frozen=True, slots=True)
class Platform:
    """One system on one kind of machine, which Linux calls ``machine``.

    ``target``: ziglang's name of it. ``tag``: the name of wheels that ziglang's libraries are in;
    ``suffix``: of their files. ``detect``: the instructions of the processor that this runs on.
    ``names``: all that it can detect, by Linux's names; None: any.
    """

    system: str
    machine: str
    target: str
    tag: str
    suffix: str
    detect: Callable[[], set[str]]
    names: frozenset[str] | None = None

    @property
    def can_compile(self) -> bool:
        """True where the server may compile kernels into a folder of its own.

        Windows does not say by owner and mode who else can write there.
        """
        return self.system != "windows"


def platform_named(system: str = "", machine: str = "") -> Platform | None:
    """The platform of these names, by default that of this process; None: there are no kernels."""
    system = (system or platform.system()).lower()
    machine = (machine or platform.machine()).lower()
    names = SYSTEMS.get(system, system), MACHINES.get(machine, machine)
    return next((each for each in PLATFORMS if (each.system, each.machine) == names), None)


def _listed_by_linux() -> set[str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    listed = (line for line in lines if line.startswith(("flags", "Features")))
    return set(next(listed, "").split())


def sysctl(name: str) -> int:
    """A number that macOS has under this name; 0 where it has none."""
    value, size = ctypes.c_int64(0), ctypes.c_size_t(8)
    arguments = name.encode(), ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0)
    return 0 if ctypes.CDLL(None).sysctlbyname(*arguments) else value.value


def feature_of_windows(number: int) -> int:
    """The answer of Windows to a question for a feature of the processor; 0: it has it not."""
    return int(ctypes.CDLL("kernel32").IsProcessorFeaturePresent(number))


def features_by_numpy() -> Mapping[str, bool]:
    """The processor's own answers (cpuid), and the system's part in them, as numpy reads them."""
    try:
        return dict(importlib.import_module("numpy._core._multiarray_umath").__cpu_features__)
    except (ImportError, AttributeError):  # numpy does not promise to have it
        return {}


BY_SYSCTL = {
    "asimd": "hw.optional.neon",
    "asimddp": "hw.optional.arm.FEAT_DotProd",
    "i8mm": "hw.optional.arm.FEAT_I8MM",
    "bf16": "hw.optional.arm.FEAT_BF16",
}
BY_WINDOWS = {"asimd": 19, "asimddp": 43}  # PF_ARM_..._INSTRUCTIONS_AVAILABLE
BY_NUMPY = {
    "avx2": "AVX2",
    "fma": "FMA3",
    "f16c": "F16C",
    "avx512f": "AVX512F",
    "avx512bw": "AVX512BW",
    "avx512vl": "AVX512VL",
    "avx512dq": "AVX512DQ",
    "avx512_vnni": "AVX512VNNI",
    "avx512_bf16": "AVX512BF16",
}


def _detected_by_macos() -> set[str]:
    return {name for name, theirs in BY_SYSCTL.items() if sysctl(theirs)}


def _detected_by_windows() -> set[str]:
    return {name for name, theirs in BY_WINDOWS.items() if feature_of_windows(theirs)}


def _detected_by_numpy() -> set[str]:
    features = features_by_numpy()
    return {name for name, theirs in BY_NUMPY.items() if features.get(theirs)}


_GLIBC = "2.28"  # the oldest that torch's wheels run with, too
_MACOS = "12.0"  # the first that tells BY_SYSCTL
_OF_LINUX = ".so", _listed_by_linux
_OF_X86 = _detected_by_numpy, frozenset(BY_NUMPY)
_OF_MACOS = _detected_by_macos, frozenset(BY_SYSCTL)
_OF_WINDOWS = _detected_by_windows, frozenset(BY_WINDOWS)
PLATFORMS = tuple(
    Platform(*fields)
    for fields in (
        ("linux", "x86_64", f"x86_64-linux-gnu.{_GLIBC}", "manylinux_2_28_x86_64", *_OF_LINUX),
        ("linux", "aarch64", f"aarch64-linux-gnu.{_GLIBC}", "manylinux_2_28_aarch64", *_OF_LINUX),
        ("macos", "x86_64", f"x86_64-macos.{_MACOS}", "macosx_12_0_x86_64", ".dylib", *_OF_X86),
        ("macos", "aarch64", f"aarch64-macos.{_MACOS}", "macosx_12_0_arm64", ".dylib", *_OF_MACOS),
        ("windows", "x86_64", "x86_64-windows-gnu", "win_amd64", ".dll", *_OF_X86),
        ("windows", "aarch64", "aarch64-windows-gnu", "win_arm64", ".dll", *_OF_WINDOWS),
    )
)
