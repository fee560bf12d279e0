"""A real cluster of two replicas and two fronts, once for all tests; skipped without Ray."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.redis_server import RedisServer

ROOT = Path(__file__).parents[2]
REPLICA, CONTROLLER = "ray::ServeReplica:transformers-api:", "ray::ServeController"
PAUSE_S = 0.3
CLOSED = ("ConnectionRefusedError", "The server is shutting down")  # to new requests
CONTEXT = 1 << 16  # of the models
ENDLESS = 60_000  # tokens of an answer that something else ends: half a minute of the fastest steps
OF_HOT = "ray::ServeReplica:transformers-api.hot."  # the replicas that "hot" has for itself


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.scale)
            item.add_marker(pytest.mark.timeout(600))  # of a busy machine


def free_ports(count: int = 1) -> int:
    """The first of so many in a row that nobody listens on.

    They are none that the system gives to outgoing connections, of which Ray makes many: such a
    one could be another's before a server comes back to it.
    """
    while True:
        first = random.randrange(20_000, 32_000)
        try:
            for port in range(first, first + count):
                with socket.socket() as one:
                    one.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first


@dataclass
class Front:
    """One front, a process of its own."""

    environment: dict[str, str]
    port: int = field(default_factory=free_ports)
    process: subprocess.Popen[bytes] | None = None
    python: str = sys.executable

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        environment = {**self.environment, "ENGINE": "ray", "PORT": str(self.port)}
        log = Path(self.environment["CLUSTER_FOLDER"]) / f"front-{self.port}.log"
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                [self.python, "-m", "transformers_api", "serve"],
                cwd=ROOT,
                env=environment,
                stdout=out,
                stderr=out,
            )

    def stop(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(120)

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            text = answer.read().decode()
        return json.loads(text) if text.startswith(("{", "[")) else text

    def post(self, path: str, request_id: str = "", **body: Any) -> Any:
        """The answer, or of an error (status, its body, Retry-After)."""
        request = urllib.request.Request(
            self.url + path,
            json.dumps(body).encode(),
            {"Content-Type": "application/json", "X-Request-Id": request_id},
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode(), error.headers.get("Retry-After")

    def chat(self, model: str = "one", tokens: int = 5, **fields: Any) -> Any:
        messages = [{"role": "user", "content": "Hi"}]
        body = {"model": model, "messages": messages, "max_tokens": tokens, **fields}
        return self.post("/v1/chat/completions", **body)

    def stream(self, model: str, tokens: int) -> Stream:
        return Stream(self, model, tokens)

    def ready(self) -> bool:
        try:
            return self.get("/readyz")["status"] == "ready"
        except OSError:
            return False

    def replicas(self) -> list[dict[str, Any]]:
        """Those that share all models but "hot"."""
        return [each for each in self.all_replicas() if each["model"] != "hot"]

    def total(self, metric: str) -> float:
        """A metric of all replicas, as of now; ``replicas`` are as of a second ago."""
        lines: list[str] = []

        def are_there() -> bool:  # but those that are not in time, on a busy machine
            page = self.get("/metrics").splitlines()
            lines[:] = [line for line in page if 'replica="' in line]
            shown = sum(line.startswith("transformers_api_ready{") for line in lines)
            return shown == len(self.all_replicas())

        wait_for(are_there)
        return sum(float(row.rpartition(" ")[2]) for row in lines if row.startswith(metric))

    def all_replicas(self) -> list[dict[str, Any]]:
        return list(self.get("/status")["replicas"])


class Stream:
    """A streamed chat, read on a thread of its own."""

    def __init__(self, front: Front, model: str, tokens: int) -> None:
        self.events: list[str] = []
        self.failure: Exception | None = None
        self._request = urllib.request.Request(
            f"{front.url}/v1/chat/completions",
            json.dumps(
                {
                    "model": model,
                    "messages": [{"role": "user", "content": "Hi"}],
                    "max_tokens": tokens,
                    "stream": True,
                    "ignore_eos": True,
                    "temperature": 1,
                }
            ).encode(),
            {"Content-Type": "application/json"},
        )
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            with urllib.request.urlopen(self._request, timeout=120) as answer:
                for line in answer:
                    if line.startswith(b"data: "):
                        self.events.append(line[6:].decode().strip())
        except urllib.error.HTTPError as error:
            self.failure = RuntimeError(error.code, error.read().decode())
        except Exception as error:
            self.failure = error

    def has_begun(self) -> bool:
        assert self.failure is None, self.failure
        return bool(self.events)

    def end(self) -> str:
        """``done``, the code of its error, or how it was cut."""
        self._thread.join(120)
        if self.events and self.events[-1] == "[DONE]":
            return "done"
        with suppress(IndexError, ValueError, KeyError):  # none, half of one, or a token
            return str(json.loads(self.events[-1])["error"]["code"])
        return f"cut: {self.failure!r} after {len(self.events)} events"


class Load:
    """Streams and answers of these models, one after the other each, two at a time of a model.

    With a pause between: processes that start meanwhile need the cores, too.
    """

    def __init__(self, front: Front, *models: str) -> None:
        self.front = front  # whom the next request is sent to
        self.answers: list[object] = []
        self._is_over = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(model,), daemon=True) for model in models * 2
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()

    def _run(self, model: str) -> None:
        def streamed(front: Front) -> object:
            return front.stream(model, 300).end()

        def whole(front: Front) -> object:
            try:
                answer = front.chat(model)
            except OSError as error:
                return f"cut: {error!r}"
            return "done" if isinstance(answer, dict) else answer

        while not self._is_over.wait(PAUSE_S):
            self.answers += [self._ask(streamed), self._ask(whole)]

    def _ask(self, one: Callable[[Front], object]) -> object:
        """As a proxy asks: another front where this one has closed before it was sent anything.

        Or where it refuses, as one that has just been told to end does.
        """
        front: Front | None = None
        answer: object = None
        while front is not self.front:
            front = self.front
            answer = one(front)
            if not any(words in str(answer) for words in CLOSED):
                break
        return answer

    def end(self) -> list[object]:
        """All answers, once the last are there."""
        self._is_over.set()
        for thread in self._threads:
            thread.join(120)
        return self.answers


@dataclass
class Cluster:
    """The head, its replicas and two fronts. ``python`` has their version of Ray."""

    environment: dict[str, str]
    folder: Path
    redis: RedisServer
    fronts: list[Front] = field(default_factory=list)
    python: str = sys.executable

    def command(self, *words: str, code: Path = ROOT) -> subprocess.CompletedProcess[str]:
        """Run ``cluster``; ``code``: the folder that the package lies in."""
        return subprocess.run(
            [self.python, "-m", "transformers_api", "cluster", *words],
            cwd=code,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    def pids(self, title: str) -> list[int]:
        """The processes of this cluster whose title begins so."""
        listed = subprocess.run(["ps", "axo", "pid,args"], capture_output=True, text=True)
        rows = (line.split(maxsplit=1) for line in listed.stdout.splitlines()[1:])
        return [int(pid) for pid, args in rows if args.startswith(title) and self.owns(int(pid))]

    def owns(self, pid: int) -> bool:
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            return False
        return self.environment["CLUSTER_FOLDER"].encode() in environment  # titles cut its start


def wait_for(condition: Callable[[], bool], within_s: float = 150) -> float:
    """The seconds until it came true. A front that does not answer now may do so later."""
    began = time.monotonic()
    while not comes_true(condition):
        assert time.monotonic() - began < within_s
        time.sleep(0.1)
    return time.monotonic() - began


def comes_true(condition: Callable[[], bool]) -> bool:
    try:
        return condition()
    except OSError:
        return False


def replace_fronts(cluster: Cluster, load: Load) -> None:
    """End one after the other, and start it again; requests go to the other one meanwhile."""
    first, second = cluster.fronts
    for ending, load.front in ((second, first), (first, second)):
        ending.stop()
        ending.environment, ending.python = cluster.environment, cluster.python
        ending.start()
        wait_for(ending.ready)


def own_code(folder: Path) -> dict[str, Any]:
    """The entry of a model whose tokenizer is code that lies beside it."""
    from tests import tokenizers
    from tests.api.tiny_app import save

    save(folder, tokenizers.byte_level())
    (folder / "shouting.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n\n\n"
        "class Shouting(PreTrainedTokenizerFast):\n"
        "    def _decode(self, *args, **kwargs):\n"
        "        return super()._decode(*args, **kwargs).upper()\n"
    )
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text()) | {
        "tokenizer_class": "Shouting",
        "auto_map": {"AutoTokenizer": [None, "shouting.Shouting"]},
    }
    file.write_text(json.dumps(config))
    return {"name": "own", "path": str(folder), "trust_remote_code": True}


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed: make test-scale installs it")
    from tests import tokenizers
    from tests.api.tiny_app import save

    folder = Path(tempfile.mkdtemp(prefix="ta-", dir="/tmp"))  # short: sockets lie in it
    names = ("one", "two", "hot")
    for name in names:
        save(folder / name, tokenizers.byte_level(), max_position_embeddings=CONTEXT)
    entries: list[dict[str, Any]] = [{"name": name, "path": str(folder / name)} for name in names]
    entries[0]["embedding"] = {"pooling": "mean"}
    entries[2]["replicas"] = {"min": 1, "max": 2}
    entries.append(own_code(folder / "own"))
    (folder / "models.json").write_text(json.dumps(entries))
    store = RedisServer(folder)
    store.start()
    environment = os.environ | {
        "CLUSTER_MAX_INFLIGHT": "200",
        "REDIS_URL": store.url,
        "CLUSTER_ADDRESS": f"127.0.0.1:{free_ports(3)}",
        "CLUSTER_FOLDER": str(folder / "c"),
        "CLUSTER_REPLICA_CPUS": "0.25",
        "DEFAULT_MODEL": "one",
        "ENABLE_EMBEDDINGS_BACKEND": "true",
        "GRACEFUL_S": "60",
        "HF_HOME": str(folder / "hub"),
        "HOST": "127.0.0.1",
        "INCLUDE_DEFAULT_MODELS": "false",
        "MAX_INFLIGHT": "16",
        "MAX_QUEUE": "16",
        "MODEL_REGISTRY_PATH": str(folder / "models.json"),
        "MODEL_STORE": str(folder / "store"),
        "RATE_LIMIT_PER_MIN": "0",
    }
    made = Cluster(environment, folder, store)
    try:
        up = made.command("up", "--replicas", "2")
        assert up.returncode == 0, up.stderr[-3000:]
        made.fronts = [Front(environment), Front(environment)]
        for front in made.fronts:
            front.start()
        for front in made.fronts:
            wait_for(front.ready)
        yield made
    finally:
        for front in made.fronts:
            front.stop()
        made.command("down")
        store.kill()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def front(cluster: Cluster) -> Front:
    """A front of a cluster that is whole."""
    first = cluster.fronts[0]
    wait_for(lambda: first.ready() and len(first.replicas()) == 2)
    return first
