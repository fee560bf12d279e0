from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from tests.model_folders import (
    LLAMA,
    TENSORS,
    model_files,
    safetensors_bytes,
    safetensors_header,
    sharded_files,
    write_files,
)
from transformers_api.checkpoints.headers.safetensors_file import read_header
from transformers_api.errors import ModelLoadFailed
from transformers_api.serving.models.preflight import inspect_folder, is_complete

GOOD = model_files()["model.safetensors"]


def changed_header(**entry: object) -> bytes:
    header = safetensors_header(TENSORS)
    header["b"] = header["b"] | entry
    return safetensors_bytes(header, bytes(138))


def test_sound_folder_is_measured(tmp_path: Path) -> None:
    files = inspect_folder(write_files(tmp_path, model_files()))
    assert (files.folder, files.weight_bytes, files.parameters) == (tmp_path, 138, 36)
    assert files.stored_dtype == "float32"
    assert files.created == int((tmp_path / "model.safetensors").stat().st_mtime)


def test_shards_are_measured_together(tmp_path: Path) -> None:
    files = inspect_folder(write_files(tmp_path, sharded_files()))
    assert (files.weight_bytes, files.parameters) == (134, 35)


def test_real_files_of_the_safetensors_library_pass(tmp_path: Path) -> None:
    import numpy
    from safetensors.numpy import save_file

    tensors = {
        "half": numpy.ones((2, 3), numpy.float16),
        "empty": numpy.ones((0, 3), numpy.float32),
        "whole": numpy.ones(5, numpy.int64),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = {t.name: (t.elements, t.bytes) for t in read_header(tmp_path / "model.safetensors")}
    assert found == {"half": (6, 12), "empty": (0, 0), "whole": (5, 40)}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(b"", "too few", id="empty"),
        pytest.param(GOOD[:7], "too few", id="shorter-than-its-length"),
        pytest.param(GOOD[:-1], "truncated or padded", id="truncated"),
        pytest.param(GOOD + b"\0", "truncated or padded", id="padded"),
        pytest.param(struct.pack("<Q", 1 << 60) + GOOD[8:], "truncated", id="header-of-2^60"),
        pytest.param(
            struct.pack("<Q", len(GOOD) - 7) + GOOD[8:], "truncated", id="header-too-long"
        ),
        pytest.param(GOOD[:8] + b"}" + GOOD[9:], "not valid JSON", id="garbled"),
        pytest.param(safetensors_bytes({}, b""), "no tensors", id="no-tensors"),
        pytest.param(struct.pack("<Q", 2) + b"[]", "not a JSON object", id="list"),
        pytest.param(
            struct.pack("<Q", 200_000) + b'{"a":' + b"[" * 199_995, "not valid JSON", id="deep"
        ),
        pytest.param(changed_header(data_offsets=[0, 6]), "starts at", id="overlap"),
        pytest.param(changed_header(data_offsets=[129, 135]), "starts at", id="hole"),
        pytest.param(changed_header(shape=[4]), "tensor b has 6 bytes", id="shape"),
        pytest.param(changed_header(dtype="F64"), "tensor b has 6 bytes", id="dtype"),
        pytest.param(changed_header(dtype="Q9"), "described wrongly", id="unknown-dtype"),
        pytest.param(changed_header(shape=[1 << 62, 1 << 62]), "tensor b has", id="huge-shape"),
        pytest.param(changed_header(shape=[1] * 500_000), "no shape", id="dimensions"),
        pytest.param(changed_header(shape={"3": 1}), "no shape", id="shape-of-names"),
        pytest.param(changed_header(dtype="Q" * 9999), "wrongly.{,250}$", id="long-description"),
        pytest.param(changed_header(shape=[-1, -3]), "cannot be", id="negative-shape"),
        pytest.param(changed_header(data_offsets=[128, 1 << 70]), "cannot be", id="huge-offset"),
        pytest.param(changed_header(data_offsets=[128]), "described wrongly", id="one-offset"),
        pytest.param(changed_header(shape=None), "described wrongly", id="no-shape"),
    ],
)
def test_bad_weights_are_named(tmp_path: Path, content: bytes, reason: str) -> None:
    write_files(tmp_path, model_files() | {"model.safetensors": content})
    with pytest.raises(ModelLoadFailed, match=reason) as caught:
        inspect_folder(tmp_path)
    assert "model.safetensors" in str(caught.value)


def test_missing_shard_is_named(tmp_path: Path) -> None:
    write_files(tmp_path, sharded_files())
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelLoadFailed, match=r"model-00002-of-00002.*, which is missing"):
        inspect_folder(tmp_path)
    assert not is_complete(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "reason"),
    [
        pytest.param({"z": "model-00001-of-00002.safetensors"}, "tensor z is not in", id="tensor"),
        pytest.param({"a": "../model.safetensors"}, "not the name", id="traversal"),
        pytest.param({"a": "pytorch_model.bin"}, "not the name", id="pickle"),
        pytest.param({"a": 1}, "not the name", id="number"),
        pytest.param({"a": "x" * 300 + ".safetensors"}, "not the name", id="long"),
        pytest.param({"a": "x\0.safetensors"}, "not the name", id="zero"),
        pytest.param({}, "missing or empty", id="empty"),
        pytest.param([], "missing or empty", id="list"),
    ],
)
def test_index_that_does_not_fit_is_refused(
    tmp_path: Path, weight_map: object, reason: str
) -> None:
    index = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    write_files(tmp_path, sharded_files() | {"model.safetensors.index.json": index})
    with pytest.raises(ModelLoadFailed, match=reason):
        inspect_folder(tmp_path)
    assert is_complete(tmp_path) is (reason == "tensor z is not in")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        pytest.param({"model_type": "t5", "is_encoder_decoder": True}, "encoder-decoder", id="t5"),
        pytest.param(
            {"model_type": "roberta", "architectures": ["RobertaForMaskedLM"]},
            "RobertaForMaskedLM does not generate text",
            id="masked",
        ),
        pytest.param({"model_type": "novel"}, "model_type 'novel' is unknown", id="unknown-type"),
        pytest.param({}, "model_type None", id="no-type"),
        pytest.param(
            {"model_type": "novel", "auto_map": {"AutoConfig": "x.Y"}}, "auto_map", id="own-code"
        ),
    ],
)
def test_models_that_cannot_be_served_are_refused(
    tmp_path: Path, config: dict[str, object], reason: str
) -> None:
    write_files(tmp_path, model_files(config=config))
    with pytest.raises(ModelLoadFailed, match=reason):
        inspect_folder(tmp_path)


def test_own_code_is_accepted_where_it_is_trusted_or_not_needed(tmp_path: Path) -> None:
    own = {"auto_map": {"AutoConfig": "x.Y"}}
    write_files(tmp_path, model_files(config={"model_type": "novel"} | own))
    assert inspect_folder(tmp_path, trust_remote_code=True).parameters == 36
    assert inspect_folder(tmp_path, knows=lambda name: name == "novel").parameters == 36
    write_files(tmp_path, model_files(config=LLAMA | own))
    assert inspect_folder(tmp_path).parameters == 36


@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        pytest.param("config.json", "config.json cannot be read", id="config"),
        pytest.param("tokenizer.json", "no tokenizer", id="tokenizer"),
        pytest.param("model.safetensors", "no weights", id="weights"),
    ],
)
def test_missing_file_is_named(tmp_path: Path, missing: str, reason: str) -> None:
    write_files(tmp_path, model_files())
    assert is_complete(tmp_path)
    (tmp_path / missing).unlink()
    assert not is_complete(tmp_path)
    with pytest.raises(ModelLoadFailed, match=reason):
        inspect_folder(tmp_path)


def test_pickle_weights_are_refused_unread(tmp_path: Path) -> None:
    files = model_files()
    del files["model.safetensors"]
    write_files(tmp_path, files | {"pytorch_model.bin": b"\x80\x04."})
    with pytest.raises(ModelLoadFailed, match=r"pickle format \(pytorch_model.bin\)"):
        inspect_folder(tmp_path)


def test_path_that_is_no_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadFailed, match="absent is not a folder"):
        inspect_folder(tmp_path / "absent")
