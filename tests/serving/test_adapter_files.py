"""Adapters before anything is loaded: entries, folders, repositories, their fit to a base."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import Any

import pytest

from tests.hub_server import HubServer
from tests.model_folders import model_files, safetensors_bytes, safetensors_header, write_files
from transformers_api.check import report
from transformers_api.cli import main
from transformers_api.config.settings import SettingError, Settings
from transformers_api.errors import InsufficientMemory, ModelLoadFailed, ModelNotFound
from transformers_api.serving.models.adapter_files import check_base, inspect_adapter
from transformers_api.serving.models.registry import ModelRegistry
from transformers_api.serving.models.spec import HubSource, ModelSpec, PathSource
from transformers_api.serving.models.store import ModelStore

LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
TENSORS = {f"{LAYER}.lora_A.weight": ("F32", [2, 8]), f"{LAYER}.lora_B.weight": ("F32", [4, 2])}
BASE = {"model.layers.0.self_attn.q_proj.weight": ("F32", [4, 8])}
REPO = "someone/adapter"


def adapter_files(tensors=TENSORS, data: bytes | None = None, **config: Any) -> dict[str, bytes]:
    return {
        "adapter_config.json": json.dumps(CONFIG | config).encode(),
        "adapter_model.safetensors": safetensors_bytes(safetensors_header(tensors), data),
    }


def inspect(tmp_path: Path, files=None):
    return inspect_adapter(write_files(tmp_path / "adapter", files or adapter_files()), "mine")


def refused(tmp_path: Path, files) -> str:
    with pytest.raises(ModelLoadFailed) as caught:
        inspect(tmp_path, files)
    return caught.value.message


def test_an_adapter_is_known_by_its_files(tmp_path):
    source, sizes = inspect(tmp_path)
    assert (source.name, source.bytes) == ("mine", 4 * (2 * 8 + 4 * 2))
    (layer,) = source.layers
    assert (layer.path, layer.scale) == ("model.layers.0.self_attn.q_proj", 2)
    assert sizes == {layer.path: (8, 4)}
    folder = tmp_path / "adapter"
    assert inspect_adapter(folder, "mine")[0] == source
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG) + " ")
    assert inspect_adapter(folder, "mine")[0].stamp != source.stamp


def named(name: str, shape=(2, 8), dtype="F32"):
    return TENSORS | {f"base_model.model.{name}": (dtype, list(shape))}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (named("model.embed_tokens.lora_embedding_A"), "adapters of embeddings"),
        (named("model.layers.0.self_attn.q_proj.lora_magnitude_vector"), "use_dora"),
        (named("model.layers.0.self_attn.q_proj.lora_B.bias"), "lora_bias"),
        (named("lm_head.weight"), "modules_to_save"),
        (named("lm_head.base_layer.weight"), "save_embedding_layers=False"),
        (named("model.layers.0.mlp.experts.3.w1.lora_A.weight"), "adapters of experts"),
        (named("model.layers.0.mlp.experts.lora_A.weight"), "adapters of experts"),
        (named("model.layers.1.self_attn.q_proj.lora_A.weight"), "lora_B of model.layers.1"),
        (named("model.layers.1.self_attn.q_proj.lora_B.weight"), "lora_A of model.layers.1"),
        (named("model.layers.0.ada_ia3"), "unknown"),
        (
            TENSORS | {f"{LAYER}.lora_A.weight": ("F32", [3, 8])},
            "has rank 3, and r or rank_pattern",
        ),
        (
            TENSORS | {f"{LAYER}.lora_B.weight": ("F32", [4, 1])},
            "has rank 1, and r or rank_pattern",
        ),
        (TENSORS | {f"{LAYER}.lora_A.weight": ("F32", [16])}, "expected a matrix of floats"),
        (TENSORS | {f"{LAYER}.lora_A.weight": ("I64", [2, 8])}, "expected a matrix of floats"),
        (TENSORS | {f"{LAYER}.lora_B.weight": ("F32", [0, 2])}, "expected a matrix of floats"),
        ({}, "holds no tensors"),
        (
            named("model.layers.0.self_attn.q_proj.lora_A.default.weight"),
            "lora_A of model.layers.0",
        ),
        (named("a." * 300 + "q_proj.lora_A.weight"), "longer than the path of a layer"),
        (named("a." * 600 + "q_proj.lora_A.weight"), "name has 1237 characters"),
        (
            {name.replace("q_proj", "v_proj"): entry for name, entry in TENSORS.items()},
            "leave model.layers.0.self_attn.v_proj out",
        ),
    ],
)
def test_tensors_that_cannot_be_applied_are_refused_by_name(tmp_path, tensors, message):
    assert message in refused(tmp_path, adapter_files(tensors))


@pytest.mark.parametrize(
    ("dtype", "number"),
    [
        ("F32", struct.pack("<f", float("nan"))),
        ("F32", struct.pack("<f", float("-inf"))),
        ("F16", struct.pack("<e", float("inf"))),
        ("BF16", b"\x80\x7f"),
        ("BF16", b"\xc1\xff"),
    ],
)
def test_numbers_that_are_not_finite_are_refused(tmp_path, dtype, number):
    tensors = {name: (dtype, shape) for name, (_, shape) in TENSORS.items()}
    size = len(number) * (16 + 8)
    for data in (number + bytes(size - len(number)), bytes(size - len(number)) + number):
        message = refused(tmp_path, adapter_files(tensors, data))
        assert "has numbers that are not finite" in message
    inspect(tmp_path, adapter_files(tensors, bytes(size)))


LENGTHS = f"{LAYER}.lora_magnitude_vector"


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        (None, "lora_magnitude of model.layers.0.self_attn.q_proj is missing"),
        (("F32", [7]), "expected a vector of 4 floats"),
        (("F32", [2, 2]), "expected a vector of 4 floats"),
        (("I64", [4]), "expected a vector of 4 floats"),
        (("F32", [4]), ""),
        (("F16", [1, 4]), ""),
    ],
)
def test_an_adapter_with_lengths_has_one_for_each_output(tmp_path, lengths, message):
    tensors = dict(TENSORS) if lengths is None else TENSORS | {LENGTHS: lengths}
    if message:
        assert message in refused(tmp_path, adapter_files(tensors, use_dora=True))
    else:
        source, _ = inspect(tmp_path, adapter_files(tensors, use_dora=True))
        assert [layer.magnitude for layer in source.layers] == [LENGTHS]


def test_a_folder_that_is_no_adapter_says_what_it_is(tmp_path):
    files = adapter_files()
    del files["adapter_model.safetensors"]
    assert "no adapter_model.safetensors" in refused(tmp_path / "a", files)
    assert "pickle" in refused(tmp_path / "b", files | {"adapter_model.bin": b"\x80\x02"})
    assert "no adapter_config.json" in refused(tmp_path / "c", {"x": b""})
    with pytest.raises(ModelLoadFailed, match="is no file"):
        inspect_adapter(tmp_path / "lora.gguf", "mine")
    files = adapter_files()
    files["adapter_model.safetensors"] = files["adapter_model.safetensors"][:-1]
    assert "truncated" in refused(tmp_path / "d", files)
    files["adapter_config.json"] = b"[1]"
    assert "not a JSON object" in refused(tmp_path / "e", files)
    files["adapter_config.json"] = b"{" + b" " * (1 << 20) + b"}"
    assert "larger than any" in refused(tmp_path / "f", files)


@pytest.mark.parametrize(
    "base",
    [
        {"model.layers.0.self_attn.q_proj.weight": (4, 8)},
        {"layers.0.self_attn.q_proj.weight": (4, 8)},
        {"model.language_model.layers.0.self_attn.q_proj.weight": (4, 8)},
        {"language_model.model.layers.0.self_attn.q_proj.weight": (4, 8)},
        {"model.layers.0.self_attn.q_proj.weight": (8, 4)},  # as Conv1D has it
        {"model.layers.0.self_attn.q_proj.weight": ()},  # of a quantised format
        {"model.layers.0.self_attn.q_proj.qweight": (1, 4)},
    ],
)
def test_a_base_whose_layers_have_the_sizes_fits(tmp_path, base):
    check_base(*inspect(tmp_path), base)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ({"h.0.attn.c_attn.weight": (8, 24)}, "no layer such as model.layers.0.self_attn.q_proj"),
        ({"model.layers.0.self_attn.q_proj.weight": (4, 16)}, "of 4 x 16 numbers"),
        ({"model.layers.0.self_attn.q_proj.weight": (5, 8)}, "for 8 inputs and 4 outputs"),
    ],
)
def test_another_base_is_refused(tmp_path, base, message):
    with pytest.raises(ModelLoadFailed, match=f"Adapter 'mine' does not fit its base: .*{message}"):
        check_base(*inspect(tmp_path), base)


def test_a_base_with_fewer_layers_is_refused(tmp_path):
    tensors = TENSORS | {
        name.replace("layers.0", "layers.1"): entry for name, entry in TENSORS.items()
    }
    source, sizes = inspect(tmp_path, adapter_files(tensors))
    with pytest.raises(ModelLoadFailed, match=r"no layer model\.layers\.1\.self_attn\.q_proj"):
        check_base(source, sizes, {"model.layers.0.self_attn.q_proj.weight": (4, 8)})


# -- entries of the registry


def registry_of(tmp_path, *entries, **settings):
    path = tmp_path / "models.json"
    path.write_text(json.dumps([{"name": "base", "path": "base", "aliases": ["b"]}, *entries]))
    return ModelRegistry.from_settings(Settings(model_registry_path=path, **settings))


def test_an_entry_has_all_of_its_base_but_what_it_says_itself(tmp_path):
    base = {
        "name": "own",
        "path": "p",
        "dtype": "bfloat16",
        "quantization": "int8",
        "max_context_tokens": 64,
        "chat": "transcript",
        "metadata": {"a": 1},
        "generation": {"top_k": 5},
        "token_encoding": "cl100k_base",
    }
    registry = registry_of(
        tmp_path,
        {"name": "x", "adapter": "a", "base": "own", "aliases": ["y"]},
        {"name": "z", "adapter": REPO, "revision": "v1", "base": "b", "chat": "off"},
        base,
    )
    spec = registry.resolve("y")
    own = registry.resolve("own")
    assert (spec.adapter, spec.base, spec.resident) == (PathSource(tmp_path / "a"), own, own)
    shared = ("source", "dtype", "quantization", "max_context_tokens", "chat", "token_encoding")
    assert all(getattr(spec, name) == getattr(own, name) for name in shared)
    assert (spec.name, spec.generation, spec.metadata) == ("x", {"top_k": 5}, {})
    other = registry.resolve("z")
    assert (other.adapter, other.chat) == (HubSource(REPO, "v1"), "off")
    assert other.base == registry.resolve("base")
    assert own.resident is own


def test_the_base_may_be_of_the_hub(tmp_path):
    registry = registry_of(tmp_path, {"name": "x", "adapter": "a", "base": "owner/model"})
    base = ModelSpec(name="owner/model", source=HubSource("owner/model"), registered=False)
    assert registry.resolve("x").base == base
    assert registry.resolve("x").registered


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"adapter": "a"}, "base is missing; adapter needs it"),
        ({"base": "base"}, "adapter is missing; base needs it"),
        ({"adapter": "a", "base": "base", "path": "p"}, "path is its base's to say"),
        ({"adapter": "a", "base": "base", "dtype": "float32"}, "dtype is its base's to say"),
        ({"adapter": "a", "base": "base", "revision": "x"}, "revision belongs to an adapter of"),
        ({"adapter": 3, "base": "base"}, "the folder of an adapter, or its id on the Hub"),
        ({"adapter": "a", "base": "nobody"}, "base 'nobody' is not allowed"),
        ({"adapter": "a", "base": "x"}, "base 'x' is not allowed"),
        ({"adapter": "a", "base": "all-minilm-l6-v2"}, "not allowed: expected an entry for a"),
    ],
)
def test_a_wrong_entry_is_one_clear_line(tmp_path, entry, message):
    with pytest.raises(SettingError) as caught:
        registry_of(tmp_path, {"name": "x"} | entry)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_allow_list_names_the_base_too(tmp_path):
    entry = {"name": "x", "adapter": "a", "base": "b"}
    with pytest.raises(SettingError, match="base, the base of x, must be in it too"):
        registry_of(tmp_path, entry, model_allow_list=("x",), default_model="x")
    registry = registry_of(tmp_path, entry, model_allow_list=("x", "b"), default_model="x")
    assert [spec.name for spec in registry.list()] == ["base", "x"]
    with pytest.raises(ModelNotFound):
        registry.resolve("gpt2")


# -- on the disk and on the Hub


def spec_of(tmp_path: Path, adapter=None) -> ModelSpec:
    base = ModelSpec(name="base", source=PathSource(tmp_path / "base"))
    files = adapter or PathSource(tmp_path / "adapter")
    return ModelSpec(name="x", source=base.source, adapter=files, base=base)


@pytest.fixture
def store(tmp_path):
    write_files(tmp_path / "base", model_files(tensors=BASE))
    folders = {"model_store": tmp_path / "store", "hf_home": tmp_path / "hf"}
    return ModelStore(Settings(**folders, max_adapters_mb=1))


def prepare(store, spec):
    return store.prepare_adapter(spec, lambda share, what: None)


def test_a_model_is_whole_with_its_adapter_alone(tmp_path, store):
    spec = spec_of(tmp_path)
    assert not store.is_cached(spec)
    with pytest.raises(ModelLoadFailed, match="is not a folder"):
        store.check_source(spec)
    write_files(tmp_path / "adapter", adapter_files())
    assert store.locate(spec) == tmp_path / "base"
    store.check_source(spec)
    source, base = prepare(store, spec)
    assert (source.name, base.folder) == ("x", tmp_path / "base")


def test_the_base_is_looked_at_before_it_is_asked_for(tmp_path, store):
    write_files(tmp_path / "adapter", adapter_files())
    write_files(tmp_path / "base", model_files())
    with pytest.raises(ModelLoadFailed, match="does not fit its base"):
        prepare(store, spec_of(tmp_path))


def test_an_adapter_beyond_the_limit_is_refused_with_the_setting(tmp_path, store):
    tensors = {name: ("F16", [512, 512]) for name in TENSORS}
    write_files(tmp_path / "adapter", adapter_files(tensors, r=512))
    with pytest.raises(InsufficientMemory, match="2 MiB of numbers, and MAX_ADAPTERS_MB allows 1"):
        prepare(store, spec_of(tmp_path))


@pytest.fixture
def hub(monkeypatch):
    from huggingface_hub import constants

    server = HubServer({REPO: {**adapter_files(), "README.md": b"x", "optimizer.pt": b"y"}})
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    server.close()


def test_an_adapter_of_the_hub_is_fetched_once_and_nothing_else_with_it(tmp_path, store, hub):
    spec = spec_of(tmp_path, HubSource(REPO))
    assert not store.is_cached(spec)
    source, _ = prepare(store, spec)
    assert store.is_cached(spec)
    assert prepare(store, spec)[0] == source
    assert len(hub.fetched("adapter_model.safetensors")) == 1
    assert hub.fetched("README.md") == hub.fetched("optimizer.pt") == []


def test_a_config_that_cannot_be_served_is_refused_before_the_numbers_are_fetched(
    tmp_path, store, hub
):
    hub.repos[REPO] = adapter_files(lora_bias=True)
    with pytest.raises(ModelLoadFailed, match="lora_bias"):
        prepare(store, spec_of(tmp_path, HubSource(REPO)))
    assert hub.fetched("adapter_model.safetensors") == []


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["adapter_config.json"], "has no adapter_model.safetensors"),
        (["adapter_config.json", "adapter_model.bin"], "pickle"),
        (["adapter_model.safetensors"], "has no adapter_config.json"),
    ],
)
def test_a_repository_without_an_adapter_says_so(tmp_path, store, hub, names, message):
    hub.repos[REPO] = dict.fromkeys(names, b"{}")
    with pytest.raises(ModelLoadFailed, match=message):
        prepare(store, spec_of(tmp_path, HubSource(REPO)))


def test_without_downloads_an_adapter_of_the_hub_is_refused(tmp_path, hub):
    folders = {"model_store": tmp_path / "store", "hf_home": tmp_path / "hf"}
    store = ModelStore(Settings(**folders, allow_download=False))
    spec = spec_of(tmp_path, HubSource(REPO))
    write_files(tmp_path / "base", model_files(tensors=BASE))
    for call in (store.check_source, lambda each: prepare(store, each)):
        with pytest.raises(ModelLoadFailed, match="downloads are off"):
            call(spec)
    assert hub.requests == []


# -- commands


@pytest.fixture
def environment(tmp_path, monkeypatch):
    for name in Settings.__dataclass_fields__:
        monkeypatch.delenv(name.upper(), raising=False)
    write_files(tmp_path / "base", model_files(tensors=BASE))
    write_files(tmp_path / "adapter", adapter_files())
    write_files(tmp_path / "dora", adapter_files(lora_bias=True))
    entries = [
        {"name": "base", "path": "base"},
        {"name": "x", "adapter": "adapter", "base": "base"},
        {"name": "dora", "adapter": "dora", "base": "base"},
    ]
    (tmp_path / "models.json").write_text(json.dumps(entries))
    monkeypatch.setenv("MODEL_REGISTRY_PATH", str(tmp_path / "models.json"))
    monkeypatch.setenv("MODEL_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("PORT", "1")


def test_commands_pull_check_and_list_adapters(environment, tmp_path, capsys):
    assert main(["pull", "x"]) == 0
    out = capsys.readouterr().out
    assert f"x is ready in {tmp_path / 'adapter'} (0 MB, 1 layers), for" in out
    assert f"base is ready in {tmp_path / 'base'}" in out
    assert main(["pull", "dora"]) != 0
    assert "lora_bias" in capsys.readouterr().err
    assert main(["models"]) == 0
    (line,) = (row for row in capsys.readouterr().out.splitlines() if row.startswith("x "))
    assert f"path:{tmp_path / 'adapter'} on base" in line
    shown = io.StringIO()
    report(shown, "x")
    assert f"Default model x: ready in {tmp_path / 'base'}" in shown.getvalue()
    shown = io.StringIO()
    assert report(shown, "dora") == 1
    assert "lora_bias" in shown.getvalue()
