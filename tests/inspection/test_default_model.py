"""The embedded default model, in both dtypes that a CPU serves it in."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.inspection.test_trace import everything, generate, scored
from transformers_api.config.settings import Settings
from transformers_api.engine.load_options import LoadOptions
from transformers_api.engine.loader import load_engine
from transformers_api.inspection.attachment import Attachment
from transformers_api.inspection.base import AttentionMode
from transformers_api.serving.models.registry import ModelRegistry
from transformers_api.serving.models.store import ModelStore

ROOT = Path(__file__).parents[2]
PROMPTS = [[504, 3575, 282, 4649, 314], [504, 2644], list(range(300, 320))]
OTHERS = [[900 + row, 4] for row in range(4)]  # one for each slot

pytestmark = pytest.mark.timeout(300)  # the embedded model is converted, once per checkout


@pytest.fixture(scope="module")
def folder():
    settings = Settings(model_store=ROOT / "build" / "test-models")
    store = ModelStore(settings)
    spec = ModelRegistry.from_settings(settings, store.has_repo).resolve(settings.default_model)
    return store.prepare(spec, lambda _share, _what: None).folder


@pytest.fixture
def start(folder, engine_thread):
    """start(dtype): a fresh engine and what was found out about its model."""
    engines = []

    def make(dtype):
        attachment = Attachment(slice_tokens=64)
        options = LoadOptions(dtype=dtype, num_slots=4, kv_cache_bytes=1 << 28)
        load = engine_thread.call(
            lambda: load_engine(folder, options, engine_thread, attachment.wrap)
        )
        engines.append(load.result())
        return engines[-1], attachment.examined.anatomy

    yield make
    for engine in engines:
        engine.close()


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_every_layer_is_verified_and_a_trace_changes_no_bit(start, dtype):
    engine, anatomy = start(dtype)
    assert anatomy.mode is AttentionMode.TAP
    assert anatomy.layers_with_attention == list(range(30))
    assert anatomy.max_rel_err < (1e-5 if dtype == "float32" else 1e-2)
    assert anatomy.lens_is_exact
    asked = (PROMPTS[:1], PROMPTS)  # alone, and in company
    plain = [generate(engine, prompts, max_tokens=6) for prompts in asked]
    generate(engine, OTHERS, max_tokens=1)  # nothing is left of the first run in the cache
    traced = [generate(engine, prompts, everything(anatomy), max_tokens=6) for prompts in asked]
    assert scored(plain[0]) == scored(traced[0])
    if dtype == "float32":  # torch's bits depend on the company, and that on how long passes take
        written = [
            [[output.token_id for output in each] for each in run[1]] for run in (plain, traced)
        ]
        assert written[0] == written[1]
