from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from transformers_api.kernels.abi import Library
from transformers_api.kernels.build import content_name, find


@pytest.fixture(scope="session")
def library_file(native_cache: Path) -> Path:
    found = find(native_cache)
    assert found is not None
    return found


@pytest.fixture
def library(library_file: Path) -> Library:
    return Library(library_file, threads=2)


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
