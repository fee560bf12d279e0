from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.engine.conftest import engine_thread, make_engine  # noqa: F401
from tests.families.originals import ORIGINALS
from transformers_api.checkpoints.convert import convert


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """converted(name): the standard folder of an original; made once."""
    store = tmp_path_factory.mktemp("converted")

    @functools.cache
    def make(name: str) -> Path:
        convert(ORIGINALS[name].checkpoint, store / name, lambda share, what: None)
        return store / name

    return make


@pytest.fixture(scope="session")
def load(converted: Callable[[str], Path]) -> Callable[..., Any]:
    """load(name, attention="sdpa"): the converted model, as the Auto class loads it."""
    from transformers import AutoModelForCausalLM

    import transformers_api.families  # noqa: F401

    @functools.cache
    def make(name: str, attention: str = "sdpa") -> Any:
        model, info = AutoModelForCausalLM.from_pretrained(
            converted(name), attn_implementation=attention, output_loading_info=True
        )
        assert not any(info.values()), info
        return model.eval()

    return make
