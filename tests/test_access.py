"""Keys and limits with real processes: gunicorn, the command line, the SDK, redis."""

from __future__ import annotations

import os
import subprocess
import sys

import httpx
import openai
import pytest

from api_client import ApiClient, ApiClientError
from tests.redis_server import RedisServer
from tests.served_app import serving
from tests.servers import ROOT, run

CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}


def transformers_api(*arguments, status=0, **environ):
    """(stdout, stderr) of a command."""
    done = subprocess.run(
        [sys.executable, "-m", "transformers_api", *arguments],
        cwd=ROOT,
        env=os.environ | environ,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == status, done.stderr
    return done.stdout, done.stderr


def url(server):
    host, port = server.address()
    return f"http://{host}:{port}"


def sdk(server, key):
    base_url = f"{url(server)}/v1"
    return openai.OpenAI(base_url=base_url, api_key=key, max_retries=0)


def ask(client):
    with client:
        answer = client.chat.completions.create(model="smollm2-135m-instruct", **CHAT)
    return answer.choices[0].message.content


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "keys")


def test_keys_from_the_command_line_rotate_while_the_server_runs(tmp_path, path):
    said, told = transformers_api("keys", "add", "ann", "--file", path)
    ann = said.strip()
    assert said == f"{ann}\n"  # for KEY=$(… keys add ann)
    assert "shown only now" in told
    assert ann not in told
    with serving(tmp_path, API_KEYS_FILE=path) as server:
        assert httpx.get(f"{url(server)}/healthz", timeout=30).status_code == 200
        assert httpx.get(f"{url(server)}/v1/models", timeout=30).status_code == 401
        assert ask(sdk(server, ann))
        root = transformers_api("keys", "add", "root", "--scope", "admin", API_KEYS_FILE=path)[
            0
        ].strip()
        assert ask(sdk(server, root))
        transformers_api("keys", "remove", "ann", "--file", path)
        with pytest.raises(openai.AuthenticationError) as caught, sdk(server, ann) as client:
            client.models.list()
        assert caught.value.code == "invalid_api_key"
        with pytest.raises(ApiClientError, match="Incorrect API key"):
            ApiClient(url(server), api_key=ann).models()
        assert ApiClient(url(server), api_key=root).models()
        with open(path, "a") as file:
            file.write("garbage\n")
        assert ask(sdk(server, root))
        assert httpx.get(f"{url(server)}/v1/models", timeout=30).status_code == 401
        server.said("the keys from before stay valid: line 2 must be")
        log = server.log
    assert ann not in log
    assert root not in log
    assert log.count("the keys from before stay valid") == 1


def test_the_list_of_keys_has_no_secret(path):
    secret = transformers_api("keys", "add", "ann", "--file", path)[0].strip()
    said, _ = transformers_api("keys", "list", "--file", path)
    assert said.splitlines() == ["NAME  SCOPE", "ann   infer"]
    assert secret not in said


def test_keys_in_redis_are_made_listed_and_removed_as_those_in_a_file(tmp_path):
    shared = RedisServer(tmp_path)
    settings = {"API_KEYS_REDIS": "true", "REDIS_URL": shared.url}
    _, told = transformers_api("keys", "list", status=2, **settings)
    assert told.startswith("error: Redis is away: ")
    assert "WRONG  Access: Redis is away" in transformers_api("check", status=1, **settings)[0]
    shared.start()
    try:
        said, told = transformers_api("keys", "add", "ann", **settings)
        assert "whose hash is in Redis" in told
        with serving(tmp_path, **settings) as server:
            assert ask(sdk(server, said.strip()))
            assert httpx.get(f"{url(server)}/v1/models", timeout=30).status_code == 401
        assert transformers_api("keys", "list", **settings)[0].splitlines()[1] == "ann   infer"
        assert "with one of 1 API keys" in transformers_api("check", **settings, PORT="0")[0]
        transformers_api("keys", "remove", "ann", **settings)
        assert transformers_api("keys", "list", **settings)[0].splitlines() == ["NAME  SCOPE"]
    finally:
        shared.kill()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("add", "ann"), "API_KEYS_FILE is not set; set it or API_KEYS_REDIS, or give --file"),
        (("remove", "ann", "--file", "{path}"), "{path}: No such file or directory"),
        (("add", "a b", "--file", "{path}"), "a name has up to 64 letters"),
        (("add", "ann", "--file", "/nowhere/keys"), "/nowhere"),
    ],
)
def test_a_command_that_fails_says_so_in_one_line(path, arguments, told):
    given = (argument.format(path=path) for argument in arguments)
    _, said = transformers_api("keys", *given, status=2)
    assert said.startswith("error: ")
    assert told.format(path=path) in said
    assert said.count("\n") == 1


def test_a_broken_file_of_keys_stops_the_start_in_one_line(path):
    with open(path, "w") as file:
        file.write("ann:infer:in-the-clear\n")
    command = (sys.executable, "-m", "transformers_api", "serve", "--port", "0")
    status, said = run(*command, API_KEYS_FILE=path)
    assert status == 2
    assert f"API_KEYS_FILE={path} is not allowed: line 1 must be name:infer:sha256" in said
    assert "Traceback" not in said
    assert "in-the-clear" not in said


def test_check_says_who_may_use_the_server(path, tmp_path):
    folders = {"MODEL_STORE": str(tmp_path / "store"), "HF_HOME": str(tmp_path / "hub")}
    folders |= {"PORT": "0", "HOST": "0.0.0.0"}

    def access(status=0, **environ):
        said, _ = transformers_api("check", status=status, **folders | environ)
        lines = iter(said.splitlines())
        return next(line for line in lines if " Access: " in line) + " " + next(lines, "").strip()

    assert "note   Access: EVERYBODY who reaches this address" in access()
    assert "everybody on this machine" in access(HOST="127.0.0.1")
    assert "WRONG  Access" in access(1, API_KEYS_FILE=path)
    transformers_api("keys", "add", "ann", "--file", path)
    assert "ok     Access: with one of 1 API keys" in access(API_KEYS_FILE=path)
    secret = "redis://:verysecret@127.0.0.1:1/0"
    said, _ = transformers_api("check", **folders, API_KEYS_FILE=path, REDIS_URL=secret)
    assert "verysecret" not in said


def statuses(server, count, **headers):
    with httpx.Client(timeout=30) as client:
        answers = [
            client.post(f"{url(server)}/v1/completions", json={"prompt": "Hi"}, headers=headers)
            for _ in range(count)
        ]
    return [answer.status_code for answer in answers]


def test_no_address_that_a_client_forwards_opens_another_bucket(tmp_path):
    limits = {"RATE_LIMIT_PER_MIN": "1", "RATE_LIMIT_BURST": "1"}
    with serving(tmp_path, **limits, TRUSTED_PROXIES="1") as server:
        for spoofed, expected in (("", 200), ("192.0.2.1, ", 429), ("10.0.0.1,", 429)):
            forwarded = {"X-Forwarded-For": f"{spoofed}203.0.113.9"}
            assert statuses(server, 1, **forwarded) == [expected]
        assert statuses(server, 1, **{"X-Forwarded-For": "203.0.113.10"}) == [200]
        assert statuses(server, 2) == [200, 429]  # the proxy's own


def test_two_servers_share_their_limits_and_outlive_their_redis(tmp_path):
    redis = RedisServer(tmp_path)
    redis.start()
    app = "tests.served_app:create_patient_app"
    given = {"RATE_LIMIT_PER_MIN": "1", "RATE_LIMIT_BURST": "4", "REDIS_URL": redis.url}
    try:
        with serving(tmp_path, app, **given) as one, serving(tmp_path, app, **given) as two:
            assert statuses(one, 3) == [200] * 3
            assert statuses(two, 2) == [200, 429]
            assert statuses(one, 1) == [429]
            redis.kill()
            # No error: each of them counts for itself now.
            assert statuses(one, 5) == [200] * 4 + [429]
            assert statuses(two, 5) == [200] * 4 + [429]
            for server in (one, two):
                server.said("REDIS_URL does not answer")
    finally:
        redis.kill()
    for log in (one.log, two.log):
        assert log.count("REDIS_URL does not answer") == 1
        assert "Traceback" not in log
