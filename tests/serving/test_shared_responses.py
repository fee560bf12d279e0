"""Answers that several fronts share through a real redis, which may be killed."""

from __future__ import annotations

import pytest

from tests.redis_server import RedisServer, wait_for_redis
from transformers_api.serving.response_store import StoredResponse
from transformers_api.serving.shared_responses import SharedResponses

ANSWER = StoredResponse(
    body={"id": "resp_1"}, items=[{"type": "message"}], messages=[{"role": "user"}], owner="me"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    made = RedisServer(tmp_path_factory.mktemp("redis"))
    made.start()
    yield made
    made.kill()


@pytest.fixture
def stores(server, monkeypatch):
    wait_for_redis(monkeypatch)
    stores = [SharedResponses(server.url, 1 << 20, 60) for _ in range(2)]
    yield stores
    for store in stores:
        store._redis.close()


def test_another_front_goes_on_from_an_answer(stores):
    stores[0].put("resp_1", ANSWER)
    assert stores[1].get("resp_1", "me") == ANSWER


def test_nobody_gets_the_answers_of_others(stores):
    stores[0].put("resp_2", ANSWER)
    assert stores[1].get("resp_2", "somebody") is None
    assert stores[1].delete("resp_2", "somebody") is False
    assert stores[1].get("resp_2", "me") == ANSWER


def test_what_one_deletes_is_gone_for_the_other(stores):
    stores[0].put("resp_3", ANSWER)
    assert stores[0].delete("resp_3", "me") is True
    assert stores[1].get("resp_3", "me") is None
    assert stores[1].delete("resp_3", "me") is False


def test_an_answer_that_is_too_large_is_not_kept(server):
    store = SharedResponses(server.url, 10, 60)
    store.put("resp_4", ANSWER)
    assert store.get("resp_4", "me") is None
    store._redis.close()


def test_while_redis_is_away_a_front_has_its_own(server, stores):
    stores[0].put("resp_5", ANSWER)
    server.kill()
    try:
        assert stores[0].get("resp_5", "me") == ANSWER
        assert stores[1].get("resp_5", "me") is None
        stores[1].put("resp_6", ANSWER)
        assert stores[1].get("resp_6", "me") == ANSWER
    finally:
        server.start()
