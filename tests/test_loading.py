from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.models import tiny_model
from tests.tokenizers import byte_level
from transformers_api.engine import memory
from transformers_api.engine.thread import EngineThread
from transformers_api.errors import InsufficientMemory, ModelLoadFailed
from transformers_api.loading import ModelLoader
from transformers_api.serving.models import ModelFiles, ModelSpec, PathSource
from transformers_api.serving.store import ModelStore
from transformers_api.settings import GIB, Settings


@pytest.fixture
def loader(tmp_path):
    settings = Settings(
        model_store=tmp_path / "store", hf_home=tmp_path / "hub", max_inflight=2, torch_threads=1
    )
    thread = EngineThread(1)
    yield ModelLoader(settings, ModelStore(settings), thread)
    thread.stop()


@pytest.fixture
def spec(tmp_path):
    folder = tmp_path / "tiny"
    tiny_model("gpt2").save_pretrained(folder)
    byte_level().save_pretrained(folder)
    return ModelSpec(name="tiny", source=PathSource(folder), device="cpu")


def files(parameters, stored_dtype="bfloat16"):
    return ModelFiles(Path("nowhere"), parameters * 2, parameters, stored_dtype, 0)


def prepared(loader, spec):
    return loader.prepare(spec, lambda share, what: None)


def test_a_folder_becomes_a_resident_model(loader, spec):
    model = loader.load(spec, prepared(loader, spec))
    assert (model.device, model.dtype) == ("cpu", "float32")
    assert model.bytes == sum(p.nbytes for p in tiny_model("gpt2").parameters())
    assert model.engine.max_model_len == 128
    assert model.engine.vocab_size == 97  # the tokenizer has more, the model does not
    assert model.fingerprint.startswith("fp_")
    model.engine.close()


def test_the_fingerprint_changes_with_the_dtype_and_not_with_time(loader, spec):
    from dataclasses import replace

    models = [
        loader.load(each, prepared(loader, each))
        for each in (spec, spec, replace(spec, dtype="bfloat16"))
    ]
    one, again, other = (model.fingerprint for model in models)
    assert one == again != other
    for model in models:
        model.engine.close()


def test_a_folder_without_a_tokenizer_is_a_failed_load(loader, spec, tmp_path):
    ready = prepared(loader, spec)
    for path in (tmp_path / "tiny").glob("tokenizer*"):
        path.write_text("{")
    with pytest.raises(ModelLoadFailed, match="tokenizer"):
        loader.load(spec, ready)


def test_memory_is_checked_against_what_is_free_and_what_would_be_freed(loader, spec, monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 10 * GIB)
    billion = files(10**9)  # 3.7 GiB in float32, 4.3 with the reserve
    assert loader.check_memory(spec, billion, freed_bytes=0)
    two = files(2 * 10**9)  # 8.6 GiB: fits, but not with a fifth to spare
    assert not loader.check_memory(spec, two, freed_bytes=0)
    three = files(3 * 10**9)
    with pytest.raises(InsufficientMemory, match=r"needs 12\.9 GiB .* 10\.0 GiB can be had"):
        loader.check_memory(spec, three, freed_bytes=0)
    assert not loader.check_memory(spec, three, freed_bytes=4 * GIB)


def test_the_dtype_that_is_served_counts_and_not_the_stored_one(loader, spec, monkeypatch):
    from dataclasses import replace

    monkeypatch.setattr(memory, "available_bytes", lambda device: 3 * GIB)
    billion = files(10**9, "float32")
    with pytest.raises(InsufficientMemory):
        loader.check_memory(spec, billion, freed_bytes=0)
    assert loader.check_memory(replace(spec, dtype="bfloat16"), billion, freed_bytes=0)


def test_the_devices_are_told_without_waiting(loader):
    assert "cpu" in loader.devices()


def test_free_memory_is_a_plausible_number():
    assert 0 < memory.available_bytes("cpu") < 1 << 50
