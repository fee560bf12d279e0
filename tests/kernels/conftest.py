from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests import instruction_sets
from tests.instruction_sets import AMX
from tests.repeats import slow
from transformers_api.kernels.abi import Library
from transformers_api.kernels.build import FLAGS, SOURCES, build, content_name, find
from transformers_api.kernels.variants import VARIANTS, Variant, cpu_flags, usable

NEON_ON_X86 = Path(__file__).with_name("neon_on_x86")
AMX_BY_LOOPS = Path(__file__).with_name("amx_by_loops")
DRIVER = Path(__file__).with_name("driver.cpp")
AVX2 = next(variant for variant in VARIANTS if variant.name == "avx2")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give a first test the time that its kernels take to be compiled, or another process's do."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.timeout(300))


def headers(folder: Path) -> tuple[str, ...]:
    """The compiler's flags for what stands before its own headers; they change as that does."""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.glob("*.h"))))
    return "-isystem", str(folder), f"-DHEADERS=0x{digest.hexdigest()[:8]}"


# The kernels for other processors and systems, by what more machines have.
STAND_INS = [
    Variant(
        "amx_by_loops",
        tuple(feature for feature in AMX.features if not feature.startswith("amx")),
        (*(flag for flag in AMX.flags if not flag.startswith("-mamx")), *headers(AMX_BY_LOOPS)),
    ),
    Variant(
        "avx2_vnni_by_avx512",
        ("avx2", "fma", "f16c", "avx512vl", "avx512_vnni"),
        (
            *("-mavx2", "-mfma", "-mf16c", "-mavx512vl", "-mavx512vnni"),
            "-DISA_AVX2",
            "-DHAS_VNNI256",
        ),
    ),
    # Threads wait as they do on macOS and Windows.
    Variant("avx2_plain_waits", AVX2.features, (*AVX2.flags, "-DPLAIN_WAITS")),
]
# -O1: what takes time is to compile them
SIMDE_FLAGS = (
    *("-O1", "-mavx2", "-mfma", "-mf16c", "-Wno-psabi", "-DISA_NEON"),
    *headers(NEON_ON_X86),
)
SIMDE = Path("/usr/include/simde/arm/neon.h")
if SIMDE.exists():
    STAND_INS += [
        Variant("neon_on_x86", ("avx2", "fma", "f16c"), SIMDE_FLAGS),
        Variant("neon_bf16_on_x86", ("avx2", "fma", "f16c"), (*SIMDE_FLAGS, "-DHAS_BF16_I8MM")),
    ]


def driven(
    compiler: Sequence[str],
    variant: Variant,
    folder: Path,
    emulator: Sequence[str] = (),
    sources: Sequence[Path] = (),
) -> bytes:
    """The bytes of all that the kernels give for numbers of its own, by a program of its own.

    ``sources``: more of its sources.
    """
    program = folder / variant.name
    flags = [flag for flag in (*FLAGS, *variant.flags) if flag != "-shared"]
    files = [str(path) for path in (DRIVER, *sources)]
    command = [*compiler, *flags, "-static", "-I", str(SOURCES), *files, "-o", str(program)]
    subprocess.run(command, check=True, timeout=600)
    done = subprocess.run(
        [*emulator, str(program)], check=True, stdout=subprocess.PIPE, timeout=300
    )
    return done.stdout


@pytest.fixture(scope="session")
def library_file(native_cache: Path) -> Path:
    found = find(native_cache)
    assert found is not None
    return found


# Nearly the code of another one: in `make test-all` alone.
REPEATED = {"avx2_vnni_by_avx512", "avx2_plain_waits", "neon_bf16_on_x86"}
REPEATED |= instruction_sets.REPEATED
if AMX in usable():  # its own instructions do what loops do elsewhere
    REPEATED |= {"amx_by_loops"}
OWN = [*usable(), *(variant for variant in STAND_INS if not variant.missing(cpu_flags()))]
EVERY = [variant for variant in OWN if variant.name not in REPEATED]


@pytest.fixture(
    params=[*(EVERY or VARIANTS[-1:]), *slow(*(each for each in OWN if each not in EVERY))],
    ids=lambda variant: variant.name,
)
def variant(request: pytest.FixtureRequest) -> Variant:
    """Each instruction set that this processor has."""
    variant: Variant = request.param
    return variant


@pytest.fixture
def library(variant: Variant, native_cache: Path) -> Library:
    return Library(build(native_cache, variant=variant), threads=2, isa=variant.name)


@pytest.fixture(scope="session")
def compile_source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Compile a few lines of C++ into a shared library that is named as ours are."""
    compiler = shutil.which("g++")  # before a test puts another one on the path
    if compiler is None:
        pytest.skip("no g++")

    def compile_source(source: str) -> Path:
        library = tmp_path_factory.mktemp("source") / "library.so"
        command = [compiler, "-x", "c++", "-", "-shared", "-fPIC", "-o", str(library)]
        subprocess.run(command, input=source, text=True, check=True, timeout=110)
        return library.rename(library.with_name(content_name(library.read_bytes())))

    return compile_source
