"""Answers of models without a chat template: they begin with their text, not with a blank."""

from __future__ import annotations

import pytest

from tests.api.conftest import events
from tests.fakes import FakeEngine, fake_spec, say

BLANKS = (" Hello there", "\n\n Hello there", "Hello there", " \tHello there", "   ")


@pytest.fixture
def answers(serve):
    def build(text, chat="transcript"):
        return serve(FakeEngine(say(text)), specs=(fake_spec("fake", chat=chat),))

    return build


@pytest.mark.parametrize("text", BLANKS)
@pytest.mark.parametrize("fields", [{}, {"logprobs": True}, {"return_token_ids": True}])
def test_the_blank_after_the_tag_is_no_text(answers, text, fields):
    served = answers(text)
    choice = served.chat(**fields).get_json()["choices"][0]
    assert choice["message"]["content"] == text.lstrip()
    assert events(served.chat(stream=True, **fields)).text() == text.lstrip()
    if "logprobs" in fields:
        tokens = [token["token"] for token in choice["logprobs"]["content"]]
        assert "".join(tokens) == text
    if "return_token_ids" in fields:
        assert bytes(choice["token_ids"][:-1]).decode() == text


def test_blanks_inside_and_at_the_end_stay(answers):
    served = answers(" a  b ")
    assert served.chat().get_json()["choices"][0]["message"]["content"] == "a  b "


@pytest.mark.parametrize(("stop", "text"), [(["x"], "one "), (["one"], ""), ([" "], "")])
def test_stop_strings_see_the_blank(answers, stop, text):
    served = answers(" one x")
    assert served.chat(stop=stop).get_json()["choices"][0]["message"]["content"] == text
    assert events(served.chat(stop=stop, stream=True)).text() == text


def test_a_text_that_is_continued_keeps_its_blank(answers):
    served = answers(" there")
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    answer = served.chat(messages=turns, continue_final_message=True)
    assert answer.get_json()["choices"][0]["message"]["content"] == " there"
    answer = served.chat(add_generation_prompt=False)
    assert answer.get_json()["choices"][0]["message"]["content"] == " there"


def test_responses_and_messages_begin_with_their_text_too(answers):
    served = answers(" Hello")
    answer = served.client.post("/v1/responses", json={"input": "Hi"}).get_json()
    assert answer["output"][0]["content"][0]["text"] == "Hello"
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 9}
    answer = served.client.post("/v1/messages", json=body | {"model": "fake"}).get_json()
    assert answer["content"][0]["text"] == "Hello"


def test_templates_and_completions_keep_theirs(answers):
    served = answers(" there", chat="template")
    assert served.chat().get_json()["choices"][0]["message"]["content"] == " there"
    served = answers(" there")
    assert served.complete().get_json()["choices"][0]["text"] == " there"
