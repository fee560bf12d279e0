"""Encoders as people publish them, from their folders to vectors: as sentence-transformers."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

from tests.encoders import FAMILIES, save
from transformers_api.config.settings import Settings
from transformers_api.encoder_loader import EncoderLoader
from transformers_api.engine.thread import EngineThread
from transformers_api.serving import embeddings
from transformers_api.serving.limits.cancellation import Cancellation
from transformers_api.serving.models.spec import ModelSpec, PathSource
from transformers_api.serving.models.store import ModelStore
from transformers_api.serving.prompts import choose_prompt, count_prompt_tokens

TEXTS = ["A cat naps.", "Where do CATS sleep, and why?", "x", "The market fell by 3 %."]
PROMPTS = {
    name: files.get("config_sentence_transformers", {}).get("prompts", {})
    for name, (*_, files) in FAMILIES.items()
}


@pytest.fixture(scope="module")
def thread():
    thread = EngineThread(1)
    yield thread
    thread.stop()


@pytest.fixture(scope="module", params=["native", "torch"])
def kernels(request):
    if request.param == "native":
        request.getfixturevalue("native_cache")
    return request.param


@pytest.fixture(scope="module")
def encoders(thread, tmp_path_factory, kernels):
    """encoders(name): the folder and the loaded model, made once."""
    root, made = tmp_path_factory.mktemp("encoders"), {}
    settings = Settings(
        model_store=root / "store", hf_home=root / "hub", native_kernels=kernels == "native"
    )
    loader = EncoderLoader(settings, ModelStore(settings), thread)

    def load(name):
        if name not in made:
            folder = save(name, root / name)
            spec = ModelSpec(name=name, source=PathSource(folder), embedding="encoder")
            files = loader.prepare(spec, lambda share, what: None)
            made[name] = folder, loader.load(spec, files)
        return made[name]

    yield load
    for _, model in made.values():
        model.engine.close()


def ours(model, texts, prompt="", **options):
    rows = embeddings.encode(model, texts, prompt=prompt)
    made = embeddings.embed(
        *(model, rows, options.get("dimensions"), Cancellation(), options.get("normalize")),
        prompt_tokens=count_prompt_tokens(model, texts, prompt),
    )
    return torch.stack([torch.frombuffer(bytearray(v), dtype=torch.float32) for v in made])


def reference(folder, name, texts, prompt=""):
    """The vectors by the formulas of sentence-transformers' documentation, a text at a time."""
    _, pooling, dense, normalizes, files = FAMILIES[name]
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    model = tf.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    lower = files.get("sentence_bert_config", {}).get("do_lower_case")
    first = 0
    if pooling.get("include_prompt") is False and prompt:
        first = len(tokenizer(prompt)["input_ids"]) - 1
    vectors = []
    for text in texts:
        whole = prompt + text
        ids = tokenizer(whole.lower() if lower else whole, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            states = model(input_ids=ids).last_hidden_state[0]
        vector = torch.cat(pooled(states, first, pooling))
        for place, _sizes in enumerate(dense, 2):
            config = json.loads((folder / f"{place}_Dense" / "config.json").read_text())
            weights = load_file(folder / f"{place}_Dense" / "model.safetensors")
            vector = weights["linear.weight"] @ vector + weights.get("linear.bias", 0)
            vector = vector.tanh() if config["activation_function"].endswith("Tanh") else vector
        vectors.append(vector / vector.norm() if normalizes else vector)
    return torch.stack(vectors)


def pooled(states, first, pooling):
    part = states[first:]
    places = torch.arange(first + 1, len(states) + 1)[:, None].float()
    ways = {
        "cls": lambda: part[0],
        "max": lambda: part.max(0).values,
        "mean": lambda: part.mean(0),
        "mean_sqrt_len": lambda: part.sum(0) / len(part) ** 0.5,
        "weightedmean": lambda: (part * places).sum(0) / places.sum(),
        "lasttoken": lambda: states[-1],
    }
    asked = [pooling["pooling_mode"]] if "pooling_mode" in pooling else []
    asked += [
        name.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token")
        for name, value in pooling.items()
        if name.startswith("pooling_mode_") and value
    ]
    return [ways[name]() for name in ways if name in asked]


@pytest.mark.parametrize("name", FAMILIES)
def test_vectors_are_those_of_sentence_transformers_in_any_company(encoders, kernels, name):
    folder, model = encoders(name)
    assert (model.kernels, model.dtype) == (kernels, "float32")
    expected = reference(folder, name, TEXTS)
    torch.testing.assert_close(ours(model, TEXTS), expected, atol=2e-5, rtol=1e-5)
    alone = torch.cat([ours(model, [text]) for text in TEXTS])
    torch.testing.assert_close(alone, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in FAMILIES if PROMPTS[name]])
def test_a_prompt_stands_before_each_text(encoders, name):
    folder, model = encoders(name)
    prompt = choose_prompt(model.prompts, "query")
    assert prompt == PROMPTS[name]["query"]
    expected = reference(folder, name, TEXTS, prompt)
    torch.testing.assert_close(ours(model, TEXTS, prompt), expected, atol=2e-5, rtol=1e-5)


def test_fewer_dimensions_are_cut_behind_the_layers_and_scaled_again(encoders):
    folder, model = encoders("embeddinggemma")
    whole = reference(folder, "embeddinggemma", TEXTS)
    cut = torch.nn.functional.normalize(whole[:, :8], dim=1)
    torch.testing.assert_close(ours(model, TEXTS, dimensions=8), cut, atol=2e-5, rtol=1e-5)
    assert model.embedder.dimensions == whole.shape[1]


def test_what_the_files_say_of_use_is_the_models(encoders):
    assert encoders("mpnet")[1].similarity == "dot"
    assert encoders("embeddinggemma")[1].prompts.default == "document"
    assert encoders("minilm")[1].max_model_len == 64
    assert not encoders("instructor")[1].pools_prompts


def test_sixteen_bits_of_a_file_stay_sixteen_bits(thread, tmp_path, native_cache):
    folder = save("qwen3-embedding", tmp_path / "encoder")
    tf.AutoModel.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    settings = Settings(model_store=tmp_path / "store", hf_home=tmp_path / "hub")
    loader = EncoderLoader(settings, ModelStore(settings), thread)
    spec = ModelSpec(name="m", source=PathSource(folder), embedding="encoder")
    files = loader.prepare(spec, lambda share, what: None)
    assert loader._weight_bytes(spec, files) == 2 * files.parameters
    model = loader.load(spec, files)
    assert (model.kernels, model.dtype) == ("native", "bfloat16")
    assert model.bytes < 3 * files.parameters  # its tables are small, and stay numbers
    expected = reference(folder, "qwen3-embedding", TEXTS)
    cosines = (ours(model, TEXTS) * expected).sum(1)
    assert cosines.min() > 0.999
    model.engine.close()


def test_a_large_table_of_sixteen_bits_is_packed_as_it_is(
    thread, tmp_path, native_cache, monkeypatch
):
    monkeypatch.setattr("transformers_api.engine.native.encoder.LARGE_TABLE", 1 << 10)
    folder = save("bge", tmp_path / "encoder")
    tf.AutoModel.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    settings = Settings(model_store=tmp_path / "store", hf_home=tmp_path / "hub")
    loader = EncoderLoader(settings, ModelStore(settings), thread)
    spec = ModelSpec(name="m", source=PathSource(folder), embedding="encoder")
    model = loader.load(spec, loader.prepare(spec, lambda share, what: None))
    assert type(model.engine.model.get_input_embeddings()).__name__ == "NativeEmbedding"
    cosines = (ours(model, TEXTS) * reference(folder, "bge", TEXTS)).sum(1)
    assert cosines.min() > 0.999
    model.engine.close()
