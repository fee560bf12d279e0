"""The same API over Ray Serve: what it answers, what is killed under it, what must be closed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from tests.api.test_tools import WEATHER
from tests.scale.conftest import wait_for

LOADS = "transformers_api_model_load_seconds_count"
TOKENS = "vllm:generation_tokens_total"
RUNNING = "vllm:num_requests_running"
MESSAGES = [{"role": "user", "content": "Hi"}]


def test_every_kind_of_answer_comes_through(front):
    assert front.chat()["usage"]["completion_tokens"] == 5
    form = {"type": "regex", "value": "yes|no"}
    answer = front.chat(tokens=20, response_format=form)["choices"][0]
    assert answer["message"]["content"] in ("yes", "no")
    called = front.chat(tokens=900, tools=[WEATHER], tool_choice="required", temperature=1, seed=1)
    (call, *_) = called["choices"][0]["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"])["city"] is not None
    traced = front.chat(tokens=3, trace={"topk": 2, "layers": [1]})
    assert len(traced["choices"][0]["trace"]["steps"]) == 3
    vectors = front.post("/v1/embeddings", model="one", input=["a", "b"])
    assert len(vectors["data"]) == 2
    grid = front.post("/inspect/heads", model="one", prompt="abc")
    assert len(grid["layers"]) == 2
    assert front.post("/v1/messages", model="one", messages=MESSAGES, max_tokens=3)["content"]
    assert front.post("/tokenize", model="two", prompt="abc")["count"] == 3


def test_each_of_two_models_has_its_replica(front, measured):
    for model in ("one", "two"):
        front.chat(model)
    wait_for(lambda: {each["model"] for each in front.replicas()} == {"one", "two"})
    before = front.total(LOADS)
    answers = [front.chat(model, tokens=2) for _ in range(30) for model in ("one", "two")]
    assert all(isinstance(answer, dict) for answer in answers), answers
    after = front.total(LOADS)
    measured(f"60 interleaved requests for 2 models on 2 replicas: {after - before:.0f} loads more")
    assert after == before


def test_more_than_all_replicas_take_is_a_429_with_a_time(front):
    refusals: list[tuple[int, str, str]] = []
    streams = []

    deadline = time.monotonic() + 100

    def ask():  # again, where the first answers were there before the last questions
        while not refusals and time.monotonic() < deadline:
            answer = front.chat("one", tokens=2000, ignore_eos=True)
            if not isinstance(answer, dict):
                refusals.append(answer)

    for _ in range(120):  # more than two replicas take, 16 that run and 16 that wait on each
        streams.append(threading.Thread(target=ask, daemon=True))
        streams[-1].start()
    for stream in streams:
        stream.join(150)
    assert refusals
    assert {status for status, _, _ in refusals} == {429}
    assert all(1 <= int(wait_s) <= 120 for _, _, wait_s in refusals)
    assert isinstance(front.chat("one"), dict)


def test_metrics_of_all_replicas_stand_on_one_page(front):
    names = {each["replica"] for each in front.all_replicas()}

    def are_there() -> bool:  # but those that are not in time, on a busy machine
        page = front.get("/metrics")
        return all(f'transformers_api_ready{{replica="{name}"}} 1.0' in page for name in names)

    wait_for(are_there)
    assert len(names) == 3


def test_request_ids_go_through_to_the_replicas(cluster, front):
    front.post("/v1/completions", "id-of-this-test", model="one", prompt="a", max_tokens=1)
    logs = cluster.folder / "c/ray/session_latest/logs"
    wait_for(lambda: any("id-of-this-test" in f.read_text() for f in logs.rglob("worker-*.err")))


def test_a_tokenizer_of_own_code_comes_with_it(front):
    """The front has none of the model's files; what it writes is in capitals."""
    text = front.chat("own", tokens=60, ignore_eos=True)["choices"][0]["message"]["content"]
    assert text == text.upper() != text.lower()


def test_a_choice_that_has_ended_stops_in_its_replica(front):
    fields = {"n": 2, "temperature": 1, "seed": 3, "ignore_eos": True, "stop": ["e", "a", " "]}
    before = front.total(TOKENS)
    answer = front.chat("one", tokens=3000, **fields)
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["stop", "stop"]
    wait_for(lambda: front.total(RUNNING) == 0)
    assert front.total(TOKENS) - before < 3000


def test_a_front_has_no_torch(cluster, front):
    assert front.process is not None
    workers = subprocess.run(
        ["ps", "--ppid", str(front.process.pid), "-o", "pid="], capture_output=True, text=True
    )
    for pid in map(int, workers.stdout.split()):
        with open(f"/proc/{pid}/maps") as maps:
            assert "libtorch" not in maps.read()


@pytest.mark.parametrize("token", ["", "0" * 64])
def test_nobody_joins_without_the_token(cluster, token, tmp_path):
    file = tmp_path / "token"
    file.write_text(token)
    code = (
        "import ray, sys\n"
        f"ray.init(address='{cluster.environment['CLUSTER_ADDRESS']}', log_to_driver=False)\n"
        "print('joined')"
    )
    mode = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(file)}
    environment = os.environ | (mode if token else {"RAY_AUTH_MODE": "disabled"})
    environment |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "HOME": str(tmp_path)}
    joining = subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert joining.stdout is not None
        words = next(line for line in joining.stdout if "Unauth" in line or "joined" in line)
        assert "Unauthenticated" in words
    finally:
        joining.kill()
        joining.communicate()


def test_all_but_one_port_is_on_the_loopback(cluster, front):
    """Serve's own port between replicas asks for the token, and listens everywhere."""
    listed = subprocess.run(["ss", "-Hltnp"], capture_output=True, text=True).stdout
    open_ports = []
    for line in listed.splitlines():
        address, users = line.split()[3], line.partition("users:")[2]
        pids = [int(part.split(",")[0]) for part in users.split("pid=")[1:]]
        if any(map(cluster.owns, pids)) and not address.startswith(("127.", "[::ffff:127.")):
            open_ports.append(users.split('"')[1])
    assert set(open_ports) <= {"ray::ServeRepli"}


def test_replicas_get_as_much_of_the_processors_as_others(cluster, front):
    pids = [each["pid"] for each in front.all_replicas()]
    assert {os.getpriority(os.PRIO_PROCESS, pid) for pid in pids} == {
        os.getpriority(os.PRIO_PROCESS, 0)
    }


def test_status_is_told_by_the_command(cluster, front):
    done = cluster.command("status")
    assert done.returncode == 0
    assert "3 running" in done.stdout
