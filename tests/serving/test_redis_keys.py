"""API keys in a real redis: shared by servers, kept while it is away, and when it has lost them."""

from __future__ import annotations

import pytest
import redis

from tests.fakes import FakeLoader
from tests.redis_server import RedisServer, wait_for_redis
from transformers_api.app import create_app
from transformers_api.config.settings import Settings
from transformers_api.errors import Unavailable
from transformers_api.serving import redis_times
from transformers_api.serving.limits import key_redis
from transformers_api.serving.limits.access import Access
from transformers_api.serving.limits.api_keys import ApiKeys
from transformers_api.serving.limits.key_redis import KeyRedis


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


@pytest.fixture
def server(started, monkeypatch):
    wait_for_redis(monkeypatch)
    monkeypatch.setattr(key_redis, "FRESH_S", 0.0)  # asked with every request
    monkeypatch.setattr(redis_times, "TRY_AGAIN_S", 0.0)
    started.kill()
    started.start()
    return started


@pytest.fixture
def store(server):
    """What `keys add` and `keys remove` write to."""
    return KeyRedis(server.url)


def front(server: RedisServer) -> ApiKeys:
    """What a server has that was started with this redis."""
    keys = Access.from_settings(Settings(redis_url=server.url, api_keys_redis=True)).keys
    assert keys is not None
    return keys


def name_of(keys: ApiKeys, secret: str) -> str | None:
    key = keys.find(secret)
    return key and key.name


def test_a_key_counts_in_every_server_until_it_is_removed(server, store):
    ann = store.add("ann", "infer")
    fronts = [front(server), front(server)]
    ops = store.add("ops", "admin")
    for keys in fronts:
        assert (name_of(keys, ann), name_of(keys, ops)) == ("ann", "ops")
        assert (keys.find(ann).may("admin"), keys.find(ops).may("admin")) == (False, True)
        assert keys.find("sk-other") is None
    store.remove("ann")
    for keys in fronts:
        assert (name_of(keys, ann), name_of(keys, ops)) == (None, "ops")
    store.remove("ops")
    assert [name_of(keys, ops) for keys in fronts] == [None, None]


def test_redis_has_the_hash_of_a_key_and_not_the_key(server, store):
    secret = store.add("ann", "infer")
    client = redis.Redis.from_url(server.url)
    content = client.hgetall(key_redis.HASH)
    client.close()
    assert content[b"ann"].startswith(b"infer:sha256$")
    assert secret.encode() not in b"".join(content.values())


def test_a_name_that_is_taken_or_bad_or_unknown_is_refused(server, store):
    ann = store.add("ann", "infer")
    with pytest.raises(ValueError, match="has a key of the name ann"):
        store.add("ann", "admin")
    with pytest.raises(ValueError, match="a name has"):
        store.add("", "infer")
    with pytest.raises(ValueError, match="no key of the name bob"):
        store.remove("bob")
    with pytest.raises(ValueError, match="a name has"):
        store.remove("")
    assert name_of(front(server), ann) == "ann"


def test_keys_stay_valid_while_redis_is_away_and_when_it_has_lost_them(server, store, caplog):
    ann = store.add("ann", "infer")
    keys = front(server)
    server.kill()
    assert name_of(keys, ann) == "ann"
    assert keys.find("sk-other") is None
    server.start()  # as empty as a redis that keeps nothing on a disk
    assert name_of(keys, ann) == "ann"
    assert "Redis has lost the API keys: those from before stay valid" in caplog.text
    bob = store.add("bob", "infer")  # from now on redis says again who may
    assert (name_of(keys, ann), name_of(keys, bob)) == (None, "bob")


def test_a_broken_entry_keeps_the_keys_from_before_and_is_not_repeated(server, store, caplog):
    ann = store.add("ann", "infer")
    keys = front(server)
    client = redis.Redis.from_url(server.url)
    client.hset(key_redis.HASH, mapping={"bob": "infer:in-the-clear", "": "other"})
    client.close()
    assert [name_of(keys, ann), name_of(keys, ann)] == ["ann", "ann"]
    assert caplog.text.count("Redis: the keys from before stay valid: line 2 must be") == 1
    assert "in-the-clear" not in caplog.text
    store.remove("bob")
    assert name_of(keys, ann) == "ann"


def test_a_server_that_starts_without_its_redis_refuses_until_it_is_there(server, store, tmp_path):
    ann = store.add("ann", "infer")
    server.kill()
    with pytest.raises(Unavailable):
        front(server).find(ann)
    folders = {"model_store": tmp_path / "store", "hf_home": tmp_path / "hub"}
    shared = {"redis_url": server.url, "api_keys_redis": True}
    app = create_app(Settings(preload_model=False, **folders, **shared), FakeLoader())
    client = app.test_client()

    def models(secret: str):
        return client.get("/v1/models", headers={"Authorization": f"Bearer {secret}"})

    refused = models(ann)
    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "5")
    assert refused.get_json()["error"]["code"] == "unavailable"
    assert client.get("/healthz").status_code == 200
    server.start()
    assert models(ann).status_code == 401  # it has lost the key
    assert models(store.add("ann", "infer")).status_code == 200
