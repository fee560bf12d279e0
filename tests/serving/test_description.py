"""What a list of models shows of files that were never loaded."""

from __future__ import annotations

import pickle
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.families.originals import ORIGINALS
from tests.model_folders import LLAMA, model_files, write_files
from transformers_api.api.seeds.generate_format import model
from transformers_api.checkpoints.headers.pickled_file import read_pickled
from transformers_api.errors import ModelLoadFailed
from transformers_api.serving.models.description import describe
from transformers_api.serving.models.spec import ModelSpec, PathSource
from transformers_api.serving.swap.policy import SwapperStatus

EMPTY = SwapperStatus(state="empty")


def listed(path: Path) -> dict[str, Any]:
    spec = ModelSpec(name="m", source=PathSource(path))
    return model(spec, describe(path), None, EMPTY)


@pytest.mark.parametrize("name", ORIGINALS)
def test_an_original_checkpoint_shows_its_shape_before_it_is_converted(name: str) -> None:
    from transformers_api.checkpoints.read import read_checkpoint

    source = ORIGINALS[name].checkpoint
    shown = listed(source)["config"]
    checkpoint = read_checkpoint(source)
    config = checkpoint.config
    window = getattr(config, "prompt_window", None) or config.max_position_embeddings
    expected = {
        "vocab_size": config.vocab_size,
        "block_size": window,
        "n_embd": config.hidden_size,
        "n_head": config.num_attention_heads,
        "n_layer": config.num_hidden_layers,
    }
    if experts := getattr(config, "num_experts", 0):
        expected |= {"n_experts": experts, "top_experts": config.num_experts_per_tok}
    assert shown == expected
    assert describe(source).parameters == checkpoint.parameters


def test_a_folder_shows_what_its_headers_hold(tmp_path: Path) -> None:
    write_files(tmp_path, model_files(LLAMA | {"hidden_size": 8}))
    assert listed(tmp_path)["config"] == {"vocab_size": 8, "n_embd": 8}
    assert listed(tmp_path)["parameters"] == "36"


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [(36, "36"), (17_400, "17K"), (51_300_000, "51M"), (1_315_000_000, "1.31B"), (None, None)],
)
def test_sizes_are_named_as_people_do(parameters: int | None, expected: str | None) -> None:
    from transformers_api.serving.models.description import Description

    spec = ModelSpec(name="m", source=PathSource(Path("m")))
    assert model(spec, Description({}, parameters), None, EMPTY)["parameters"] == expected


@pytest.mark.parametrize("content", [b"", b"PK\3\4", b"\x80\x04.", b"GGUF" + bytes(40), b"{}"])
@pytest.mark.parametrize("name", ["m.pt", "m.pth", "m.gguf"])
def test_what_cannot_be_read_shows_nothing(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    shown = listed(tmp_path / name)
    assert (shown["config"], shown["parameters"]) == ({}, None)
    shown = listed(tmp_path / "absent.pt")
    assert (shown["config"], shown["parameters"]) == ({}, None)


class Malicious:
    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call = call, arguments

    def __reduce__(self) -> Any:
        return self.call


def archive(path: Path, data: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", data)
    return path


def test_a_pickle_runs_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    for call in (Malicious(open, str(mark), "w"), Malicious(eval, f"open({str(mark)!r}, 'w')")):
        for protocol in (0, 2, 5):
            path = archive(tmp_path / "m.pt", pickle.dumps({"w": call}, protocol))
            with pytest.raises(ModelLoadFailed, match="cannot be read as plain weights"):
                read_pickled(path)
            path.write_bytes(pickle.dumps({"w": call}, protocol))
            with pytest.raises(ModelLoadFailed):
                read_pickled(path)
    assert not mark.exists()


def doubled(opening: bytes, again: bytes) -> bytes:
    """A dict whose key is built of itself sixty times: hashing it would take 2^60 steps."""
    return pickle.PROTO + b"\2}" + opening + again * 60 + b"K\1s."


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(doubled(b")", b"2\x86"), id="tuples"),
        pytest.param(doubled(b"(\x91", b"2\x86"), id="frozen sets"),
        pytest.param(b"\x80\2" + b"(" * 100_000 + b".", id="marks"),
        pytest.param(b"\x80\2" + b"]" * 100_000 + b"a" * 99_999 + b".", id="nested lists"),
        pytest.param(b"\x80\2\x8b" + (1 << 30).to_bytes(4, "little") + b"1", id="huge number"),
    ],
)
def test_a_pickle_that_would_never_end_is_refused_at_once(tmp_path: Path, data: bytes) -> None:
    path = archive(tmp_path / "m.pt", data)
    started = time.thread_time()
    assert describe(path).parameters is None
    assert time.thread_time() - started < 5


def test_an_archive_that_unpacks_to_gigabytes_is_not_unpacked(tmp_path: Path) -> None:
    path = archive(tmp_path / "m.pt", bytes(17 << 20))
    with pytest.raises(ModelLoadFailed, match="huge"):
        read_pickled(path)


def test_reading_a_header_needs_no_torch() -> None:
    path = ORIGINALS["tinygpt"].checkpoint
    code = (
        "import sys; from pathlib import Path\n"
        "from transformers_api.serving.models.description import describe\n"
        f"assert describe(Path({str(path)!r})).parameters\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
