from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from transformers_api.kernels.abi import Library
from transformers_api.kernels.build import build, content_name
from transformers_api.kernels.variants import VARIANTS, Variant, cpu_flags, of_machine

NEON_ON_X86 = Path(__file__).with_name("neon_on_x86")
# The kernels for other processors, by instructions that more machines have.
STAND_INS = [
    Variant(
        "avx2_vnni_by_avx512",
        ("avx2", "fma", "f16c", "avx512vl", "avx512_vnni"),
        (
            *("-mavx2", "-mfma", "-mf16c", "-mavx512vl", "-mavx512vnni"),
            "-DISA_AVX2",
            "-DHAS_VNNI256",
        ),
    ),
    Variant(
        "neon_on_x86",
        ("avx2", "fma", "f16c"),
        ("-mavx2", "-mfma", "-mf16c", "-Wno-psabi", "-DISA_NEON", "-isystem", str(NEON_ON_X86)),
    ),
]
if not Path("/usr/include/simde/arm/neon.h").exists():
    del STAND_INS[-1]


@pytest.fixture(scope="session")
def library_file(native_cache: Path) -> Path:
    found = find(native_cache)
    assert found is not None
    return found


OWN = [v for v in (*of_machine(), *STAND_INS) if not v.missing(cpu_flags())]


@pytest.fixture(params=OWN or VARIANTS[-1:], ids=lambda variant: variant.name)
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
        subprocess.run(command, input=source, text=True, check=True, timeout=50)
        return library.rename(library.with_name(content_name(library.read_bytes())))

    return compile_source
