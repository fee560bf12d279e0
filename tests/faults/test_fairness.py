"""Clients that take more than their share: of prompts, of switches, of loads; a real server."""

from __future__ import annotations

import http.client
import json
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from tests.busy_machine import allowed
from tests.conftest import Measured
from tests.faults.tiny import LIMIT_S, MODEL, Tiny, environment, long_tiny, started, until
from tests.test_end_to_end import save_tiny

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]

SHORT = {"prompt": "Hi", "max_tokens": 1}
SERVED_S = 20.0  # of each crowd
NEVER_READY = """
import itertools, time, torch
from transformers import LlamaForCausalLM

class NeverReady(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        for _ in itertools.count():
            {step}
"""
STEPS = {"endless": "self.spare = torch.nn.Linear(1, 1)", "stuck": "time.sleep(1000)"}


def ask_as(tiny: Tiny, address: str, body: Any) -> float:
    """Ask from an address of one's own, as another client; the seconds until the answer."""
    began = time.monotonic()
    connection = http.client.HTTPConnection(
        *tiny.address, timeout=LIMIT_S, source_address=(address, 0)
    )
    connection.request(
        "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
    )
    response = connection.getresponse()
    text = response.read()
    connection.close()
    assert response.status == 200, text
    return time.monotonic() - began


@contextmanager
def beside(tiny: Tiny, *loops: Iterator[Any]) -> Iterator[list[float]]:
    """While it lasts each of ``loops`` is a client that asks for one after the other; its waits."""
    over, waits = threading.Event(), list[float]()

    def loop(place: int, bodies: Iterator[Any]) -> None:
        while not over.is_set():
            waits.append(ask_as(tiny, f"127.0.1.{place + 1}", next(bodies)))

    with ThreadPoolExecutor(len(loops)) as pool:
        clients = [pool.submit(loop, place, bodies) for place, bodies in enumerate(loops)]
        try:
            yield waits
        finally:
            over.set()
        for client in clients:
            client.result()


def innocent(tiny: Tiny, seconds: float = SERVED_S, pause_s: float = 0.3) -> list[float]:
    """Waits of a client that asks for a token of the default model now and then."""
    end, waits = time.monotonic() + seconds, list[float]()
    while time.monotonic() < end:
        waits.append(ask_as(tiny, "127.0.0.77", SHORT))
        threading.Event().wait(pause_s)
    return waits


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    kinds = {"one": "llama", "two": "gpt2", "three": "llama", "four": "gpt2", "five": "llama"}
    return environment(folder, **{n: save_tiny(folder / n, kind) for n, kind in kinds.items()})


@pytest.mark.parametrize("others", [["two"], ["two", "three", "four", "five"]])
def test_four_who_loop_on_other_models_hold_an_innocent_client_shortly(
    models: dict[str, str], others: list[str], measured: Measured
) -> None:
    with started(models) as tiny:
        names = [cycle(others[n % len(others) :] + others[: n % len(others)]) for n in range(4)]
        bodies = [
            ({"prompt": "Hi", "max_tokens": 16, "model": name} for name in each) for each in names
        ]
        with beside(tiny, *bodies) as theirs:
            waits = innocent(tiny)
        loading = tiny.metric("transformers_api_model_load_seconds_sum")
    measured(
        f"4 clients on {len(others)} other models: the innocent one waited {max(waits):.2f} s at most "
        f"(median {sorted(waits)[len(waits) // 2]:.2f}), they {max(theirs):.2f} s; "
        f"{loading:.1f} s of {SERVED_S:g} were loading"
    )
    assert max(waits) < allowed(6)
    assert len(waits) > 5


def test_long_and_scored_prompts_do_not_hold_a_short_one(
    tmp_path: Path, measured: Measured
) -> None:
    settings = environment(tmp_path, **{MODEL: long_tiny(tmp_path / MODEL)})
    long = {"prompt": [[5] * 8000], "max_tokens": 1}
    scored = long | {"max_tokens": 0, "echo": True, "logprobs": 5}
    many = {"prompt": [[7 + n] * 2000 for n in range(16)], "max_tokens": 1}
    with started(settings) as tiny:
        alone = max(ask_as(tiny, "127.0.0.77", SHORT) for _ in range(5))
        with beside(tiny, cycle([long]), cycle([scored]), cycle([many])) as theirs:
            waits = innocent(tiny)
    measured(
        f"a short prompt beside 8,000 tokens, 8,000 scored ones and 16 x 2,000: {max(waits):.2f} s at "
        f"most (alone {alone:.2f}); they {max(theirs):.1f} s"
    )
    assert max(waits) < allowed(5)


BIG = (2 << 20) - 200
BODIES = {  # (around, unit) of two megabytes, or as many units as are accepted
    "messages": ('{"messages":[%s]}', '{"role":"user","content":"' + "x" * 900 + '"}', 1024),
    "parts": ('{"messages":[{"role":"user","content":[%s]}]}', '{"type":"text","text":"a"}', 256),
    "ids": ('{"prompt":[%s],"max_tokens":1}', "1", 262_144),
    "stops": ('{"prompt":"a","max_tokens":1,"stop":[%s]}', '"x"', 150_000),
    "biases": ('{"prompt":"a","max_tokens":1,"logit_bias":{%s}}', '"%d":1', 100_000),
    "tools": ('{"messages":[],"tools":[%s]}', '{"a":{"b":{"c":[{"d":1}]}}}', 6_000),
    "deep": ('{"prompt":"a","max_tokens":1,"x":[%s]}', "[" * 60 + "]" * 60, 500),
    "escapes": ('{"prompt":"a","max_tokens":1,"x":["%s"]}', "\\u0041", 340_000),
    "objects": ('{"prompt":"a","max_tokens":1,"x":[%s]}', '{"a":1}', 16_000),
    "bombs": ('{"prompt":"a","max_tokens":1,"x":[%s]}', '{"a":1}', 250_000),
    "fractions": ('{"prompt":"a","max_tokens":1,"x":[%s]}', "1." + "5" * 30, 16_000),
}


def body_of(around: str, unit: str, count: int) -> bytes:
    count = min(count, BIG // (len(unit) + 4))
    units = [unit % n for n in range(count)] if "%d" in unit else [unit] * count
    return (around % ("" if unit[0] == "\\" else ",").join(units)).encode()


def test_eight_senders_of_large_bodies_do_not_hold_an_innocent_client(
    models: dict[str, str], measured: Measured
) -> None:
    figures, over = {}, threading.Event()

    def send(tiny: Tiny, path: str, body: bytes) -> int:
        sent = 0
        while not over.is_set():
            assert tiny.ask("POST", path, body)[0] in (200, 400, 413)
            sent += 1
        return sent

    with started(models) as tiny, ThreadPoolExecutor(8) as pool:
        for name, (around, unit, count) in BODIES.items():
            path = "/v1/chat/completions" if "messages" in around else "/v1/completions"
            body = body_of(around, unit, count)
            over.clear()
            senders = [pool.submit(send, tiny, path, body) for _ in range(8)]
            waits = sorted(innocent(tiny, 5.0, pause_s=0.02))
            over.set()
            sent = sum(sender.result() for sender in senders)
            figures[name] = waits[int(len(waits) * 0.99)], sent
    measured(
        "the innocent client's p99 beside 8 senders: "
        + ", ".join(f"{name} {p99 * 1000:.0f} ms ({n})" for name, (p99, n) in figures.items())
    )
    assert max(p99 for p99, _ in figures.values()) < allowed(1.5)


def never_ready(folder: Path, step: str) -> Path:
    """A folder with code of its own, which never comes to the end of a load."""
    save_tiny(folder, "llama")
    (folder / "never_ready.py").write_text(NEVER_READY.format(step=step))
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "never_ready.NeverReady"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind", STEPS)
def test_a_load_without_an_end_is_given_up_or_ends_the_process(
    tmp_path: Path, kind: str, measured: Measured
) -> None:
    settings = environment(
        tmp_path,
        **{MODEL: long_tiny(tmp_path / MODEL), kind: never_ready(tmp_path / kind, STEPS[kind])},
    )
    registry = Path(settings["MODEL_REGISTRY_PATH"])
    entries = json.loads(registry.read_text())
    entries[1]["trust_remote_code"] = True
    registry.write_text(json.dumps(entries))
    shutil.rmtree(tmp_path / "hub", ignore_errors=True)
    with started(settings, MODEL_WAIT_S="8", STEP_TIMEOUT_S="3") as tiny:
        worker, began = tiny.worker, time.monotonic()
        status, body = tiny.ask("POST", "/v1/completions", SHORT | {"model": kind})
        told_s = time.monotonic() - began
        until(lambda: answers(tiny), 60)
        again_s = time.monotonic() - began
        log = tiny.server.log
    measured(
        f"{kind}: told after {told_s:.1f} s of 8 ({body['error']['message']}), the other model "
        f"answers again after {again_s:.1f} s, worker {'replaced' if tiny.worker != worker else 'kept'}"
    )
    assert status == 503
    assert told_s < 8 + allowed(4)
    if kind == "stuck":
        assert "exited with code 70" in log
    else:
        assert tiny.worker == worker
        assert "was not loaded within 8 s" in log


def answers(tiny: Tiny) -> bool:
    try:
        return tiny.ask("POST", "/v1/completions", SHORT)[0] == 200
    except (OSError, http.client.HTTPException):  # between two workers
        return False
