from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from transformers_api.kernels.abi import Library
from transformers_api.kernels.build import build, content_name, find
from transformers_api.kernels.variants import VARIANTS, Variant, cpu_flags

# The kernels for AVX2 with VNNI, by instructions that machines with AVX-512 have too: more machines
# can test them.
AVX2_VNNI_BY_AVX512 = Variant(
    "avx2_vnni_by_avx512",
    ("avx2", "fma", "f16c", "avx512vl", "avx512_vnni"),
    ("ISA_AVX2", "HAS_VNNI256"),
)


@pytest.fixture(scope="session")
def library_file(native_cache: Path) -> Path:
    found = find(native_cache)
    assert found is not None
    return found


OWN = [v for v in (*VARIANTS, AVX2_VNNI_BY_AVX512) if not v.missing(cpu_flags())]


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
