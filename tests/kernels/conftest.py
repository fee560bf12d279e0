from __future__ import annotations

from pathlib import Path

import pytest

from transformers_api.kernels.abi import Library
from transformers_api.kernels.build import find


@pytest.fixture(scope="session")
def library_file(native_cache: Path) -> Path:
    found = find(native_cache)
    assert found is not None
    return found


@pytest.fixture
def library(library_file: Path) -> Library:
    return Library(library_file, threads=2)
