"""Folders that are no model that this server reads: what they are is said before anything else."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.model_folders import LLAMA, TENSORS, model_files, sharded_files, write_files
from tests.quantized_models import FORMATS, write_quantized
from tests.repeats import slow
from transformers_api.config.settings import Settings
from transformers_api.errors import ModelLoadFailed
from transformers_api.serving.models.description import describe
from transformers_api.serving.models.hub import RemoteFile, _choose
from transformers_api.serving.models.preflight import inspect_folder, refusal
from transformers_api.serving.models.spec import HubSource, ModelSpec, PathSource
from transformers_api.serving.models.store import ModelStore

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n"
INDEX = "model.safetensors.index.json"


def without(*names: str) -> dict[str, bytes]:
    return {name: data for name, data in model_files().items() if name not in names}


def config(**more: Any) -> bytes:
    return json.dumps(LLAMA | more).encode()


@pytest.fixture
def prepare(tmp_path: Path) -> Callable[[Path], object]:
    store = ModelStore(Settings(model_store=tmp_path / "store", hf_home=tmp_path / "hf"))

    def prepare(path: Path) -> object:
        spec = ModelSpec(name="m", source=PathSource(path))
        return store.prepare(spec, lambda share, what: None)

    return prepare


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "model.safetensors", "generation_config.json"]
)
def test_git_lfs_pointer_is_named(tmp_path: Path, name: str) -> None:
    write_files(tmp_path, model_files() | {name: POINTER})
    if name == "generation_config.json":  # it is not read here
        return
    with pytest.raises(ModelLoadFailed, match=rf"{name} is a Git LFS pointer, .*git lfs pull"):
        inspect_folder(tmp_path)


def test_git_lfs_pointer_among_shards_is_named(tmp_path: Path) -> None:
    shard = "model-00002-of-00002.safetensors"
    write_files(tmp_path, sharded_files() | {shard: POINTER})
    with pytest.raises(ModelLoadFailed, match=rf"{shard} is a Git LFS pointer"):
        inspect_folder(tmp_path)
    write_files(tmp_path, sharded_files() | {INDEX: POINTER})
    with pytest.raises(ModelLoadFailed, match=rf"{INDEX} is a Git LFS pointer"):
        inspect_folder(tmp_path)


@pytest.mark.parametrize("suffix", ["gguf", *slow("pt")])
def test_git_lfs_pointer_to_convert_is_named(
    tmp_path: Path, prepare: Callable[[Path], object], suffix: str
) -> None:
    path = tmp_path / f"m.{suffix}"
    path.write_bytes(POINTER)
    with pytest.raises(ModelLoadFailed, match=r"m\.\w+ .*Git LFS pointer"):
        prepare(path)


@pytest.mark.parametrize("metadata", [{}, {"metadata": None}, {"metadata": []}])
def test_index_without_metadata_is_refused_by_name(tmp_path: Path, metadata: Any) -> None:
    files = sharded_files()
    weight_map = json.loads(files[INDEX])["weight_map"]
    files[INDEX] = json.dumps({"weight_map": weight_map} | metadata).encode()
    write_files(tmp_path, files)
    with pytest.raises(ModelLoadFailed, match=rf"{INDEX} has no metadata.*add \"metadata\": {{}}"):
        inspect_folder(tmp_path)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        pytest.param(
            {"adapter_config.json": b'{"base_model_name_or_path": "meta/base"}'},
            "is an adapter for meta/base, no model: give it a registry entry",
            id="adapter",
        ),
        pytest.param({"adapter_config.json": b"{"}, "is an adapter, no model", id="adapter-broken"),
        pytest.param({"a.gguf": b"", "b.gguf": b""}, "2 GGUF files; .*: a.gguf, b.gguf", id="gguf"),
        pytest.param({"weights.npz": b""}, "MLX", id="mlx-old"),
        pytest.param({"params.json": b"{}", "consolidated.00.pth": b""}, "makers", id="meta"),
        pytest.param({"model_index.json": b"{}"}, "diffusers", id="diffusers"),
        pytest.param({"model.onnx": b""}, "ONNX", id="onnx"),
        pytest.param({"tf_model.h5": b""}, "TensorFlow", id="tensorflow"),
    ],
)
@pytest.mark.parametrize("has_config", [False, True])
def test_another_kind_of_folder_is_named(
    tmp_path: Path, files: dict[str, bytes], reason: str, has_config: bool
) -> None:
    if has_config and "consolidated.00.pth" in files:
        reason = "pickle"
    missing = ["model.safetensors", *([] if has_config else ["config.json"])]
    write_files(tmp_path, without(*missing) | files)
    with pytest.raises(ModelLoadFailed, match=reason):
        inspect_folder(tmp_path)


def test_mlx_quantization_is_refused_and_plain_mlx_is_not(tmp_path: Path) -> None:
    quantized = {"quantization": {"group_size": 64, "bits": 4}}
    packed = TENSORS | {"layer.weight": ("U8", [4]), "layer.scales": ("F16", [1])}
    write_files(tmp_path, model_files(LLAMA | quantized, packed))
    with pytest.raises(ModelLoadFailed, match=r"4 bits in the format of MLX \(layer\.scales\)"):
        inspect_folder(tmp_path)
    write_files(tmp_path, model_files(LLAMA | quantized))
    inspect_folder(tmp_path)


CT = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
INT4 = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int"}}


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "hqq"}, "quant_method is 'hqq'"),
        ({"quant_method": "gptq", "bits": 3}, "bits is 3"),
        ({"quant_method": "gptq", "bits": 4.0}, "bits is 4.0"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "checkpoint_format"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version is 'gemv'"),
        ({"quant_method": "gptq", "bits": 4, "is_marlin_format": True}, "is_marlin_format is True"),
        ({"quant_method": "awq", "w_bit": 3}, "bits is 3"),
        ({"quant_method": "awq", "bits": 4, "backend": "llm-awq"}, "backend is 'llm-awq'"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size"),
        ({"quant_method": "fp8", "weight_block_size": 0}, "weight_block_size is 0"),
        ({"quant_method": "fp8", "weight_block_size": "16"}, "weight_block_size is '16'"),
        (CT | {"config_groups": {}, "sparsity_config": -1}, "sparsity_config is -1"),
        (CT | {"config_groups": {}, "transform_config": ["x"]}, "transform_config"),
        (CT | {"config_groups": {"a": {"weights": -1}}}, r"config_groups\.a\.weights is -1"),
        (CT | {"config_groups": {"a": {"targets": 1}}}, r"config_groups\.a\.targets is 1"),
        (CT | {"config_groups": {"a": {"targets": ["re:(a"]}}}, r"config_groups\.a\.targets"),
        (
            CT | {"config_groups": {"a": {"weights": {"block_structure": [1, "x"]}}}},
            r"config_groups\.a\.weights\.block_structure",
        ),
        (CT, "config_groups is None"),
        (CT | {"config_groups": {"g": INT4}, "format": "nvfp4-pack-quantized"}, "format is 'nvfp4"),
        (
            CT | {"config_groups": {"g": INT4 | {"weights": {"num_bits": 3}}}},
            r"config_groups\.g\.weights\.num_bits is 3",
        ),
        (CT | {"config_groups": {"g": INT4}, "transform_config": {"config_groups": {}}}, "transf"),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "int4"},
            "bnb_4bit_quant_type",
        ),
    ],
)
def test_quantised_weights_that_cannot_be_read_are_refused_by_method_and_field(
    tmp_path: Path, quantization: dict[str, Any], message: str
) -> None:
    write_files(tmp_path, model_files(LLAMA | {"quantization_config": quantization}))
    with pytest.raises(ModelLoadFailed, match=rf"config\.json: quantization_config\.{message}"):
        inspect_folder(tmp_path)
    assert re.match(rf"quantization_config\.{message}", refusal(tmp_path) or "")


@pytest.mark.parametrize("name", ["gptq", "gptq-act-order", "awq", "w4a16", "w8a8", "fp8", "nf4"])
def test_quantised_weights_are_counted_as_what_they_stand_for(tmp_path: Path, name: str) -> None:
    model, layers = write_quantized(FORMATS[name], tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    files = inspect_folder(tmp_path)
    assert files.parameters == sum(each.numel() for each in model.parameters())
    assert files.stored_dtype == FORMATS[name].config["quant_method"]
    packed = sum(model.get_parameter(layer).numel() for layer in layers)
    assert files.file_types == {FORMATS[name].width: packed, "F16": files.parameters - packed}
    assert describe(tmp_path).parameters == files.parameters


def test_an_encoders_quantised_weights_need_their_package(tmp_path: Path) -> None:
    config = LLAMA | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    write_files(tmp_path, model_files(config) | {"modules.json": b"[]"})
    with pytest.raises(ModelLoadFailed, match="format gptq, which need the package optimum"):
        inspect_folder(tmp_path, encoder="encoder")


def test_unusual_quantization_config_is_no_error_of_ours(tmp_path: Path) -> None:
    for value in ({}, None, [], {"quant_method": 5}, "none"):
        write_files(tmp_path, model_files(LLAMA | {"quantization_config": value}))
        inspect_folder(tmp_path)


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["m-Q4.gguf", "m-Q8.gguf", "config.json"], "GGUF files: name one .* such as m-Q4.gguf"),
        (["adapter_config.json", "adapter_model.bin"], "is an adapter"),
    ],
)
def test_a_repository_of_another_kind_is_named(names: list[str], reason: str) -> None:
    with pytest.raises(ModelLoadFailed, match=reason):
        _choose(HubSource("a/b"), {name: RemoteFile(1, None) for name in names}, False)


@pytest.mark.parametrize("kind", ["gpt2", "openai-gpt"])
@pytest.mark.parametrize("name", ["gptq", "bnb-int8"])
def test_quantised_layers_that_lie_the_other_way_round_are_refused_unread(tmp_path, kind, name):
    quantization = {"quantization_config": FORMATS[name].config}
    own = config(**quantization, model_type=kind, architectures=["GPT2LMHeadModel"])
    write_files(tmp_path, model_files() | {"config.json": own})
    with pytest.raises(ModelLoadFailed, match=rf"weights of {kind} cannot be read: its layers"):
        inspect_folder(tmp_path)
    assert "the other way round" in str(refusal(tmp_path))
