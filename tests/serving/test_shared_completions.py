"""Recent completions that several fronts share through a real redis, which may be killed."""

from __future__ import annotations

import pytest

from tests.fakes import fake_model, fake_spec
from tests.redis_server import RedisServer, wait_for_redis
from transformers_api.errors import InvalidRequest, UnknownCompletion
from transformers_api.serving.inspect import shared_completions
from transformers_api.serving.inspect.recent_completions import Completion
from transformers_api.serving.inspect.shared_completions import SharedCompletions

MODEL = fake_model(fake_spec("owner/model"))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    made = RedisServer(tmp_path_factory.mktemp("redis"))
    made.start()
    yield made
    made.kill()


@pytest.fixture
def fronts(server, monkeypatch):
    wait_for_redis(monkeypatch)
    fronts = [SharedCompletions(server.url, most=4) for _ in range(2)]
    yield fronts
    for front in fronts:
        front.close()


def remains(front, completion_id):
    try:
        return bool(front.find(completion_id))
    except UnknownCompletion:
        return False


def test_another_front_has_all_choices_of_all_prompts(fronts):
    fronts[0].remember("cmpl-1", MODEL, [[1, 2], [3]], [[10], [11, 12], [], [21]])
    assert [fronts[1].find("cmpl-1", choice) for choice in range(4)] == [
        Completion("owner/model", (1, 2), (10,)),
        Completion("owner/model", (1, 2), (11, 12)),
        Completion("owner/model", (3,), ()),
        Completion("owner/model", (3,), (21,)),
    ]
    with pytest.raises(InvalidRequest, match=r"choice must be in \[0, 3\]"):
        fronts[1].find("cmpl-1", 4)


def test_the_oldest_go_whichever_front_made_them(server, fronts):
    for number in range(6):
        fronts[number % 2].remember(f"cmpl-{number}", MODEL, [[number]], [[number]])
    third = SharedCompletions(server.url, most=4)
    assert [remains(third, f"cmpl-{number}") for number in range(6)] == [False] * 2 + [True] * 4
    third.close()


def test_one_that_is_remembered_again_is_the_newest(server, fronts):
    for name in ("a", "b", "c", "d", "a", "e"):
        fronts[0].remember(name, MODEL, [[1]], [[2]])
    assert [remains(fronts[1], name) for name in "abcde"] == [True, False, True, True, True]


def test_redis_drops_them_after_their_age(server):
    front = SharedCompletions(server.url)
    front.remember("cmpl-9", MODEL, [[1]], [[2]])
    keys = (shared_completions.PREFIX + "cmpl-9", shared_completions.ORDER)
    assert all(598 <= front._redis.command("TTL", key) <= 600 for key in keys)
    front.close()


def test_a_very_long_one_stays_with_its_front(fronts):
    prompt = [100000 + number for number in range(150000)]
    fronts[0].remember("long", MODEL, [prompt], [[1]])
    assert fronts[0].find("long").prompt_ids == tuple(prompt)
    with pytest.raises(UnknownCompletion, match="'long' is not known; the last 4 are"):
        fronts[1].find("long")


def test_while_redis_is_away_a_front_has_its_own(server, fronts):
    server.kill()
    try:
        fronts[0].remember("cmpl-a", MODEL, [[1]], [[2]])
        assert fronts[0].find("cmpl-a").token_ids == (2,)
        assert not remains(fronts[1], "cmpl-a")
    finally:
        server.start()
