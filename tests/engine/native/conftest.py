from __future__ import annotations

from pathlib import Path

import pytest

from transformers_api.engine.native.build import NativeUnavailable, build
from transformers_api.engine.native.library import Library


@pytest.fixture(scope="session")
def library_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        return build(tmp_path_factory.mktemp("native"))
    except NativeUnavailable as error:
        pytest.skip(f"no native kernels: {error}")


@pytest.fixture
def library(library_file: Path) -> Library:
    return Library(library_file, threads=2)
