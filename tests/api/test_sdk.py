"""The official SDK, unchanged, through the whole application."""

import httpx2
import openai
import pytest

from tests.fakes import FakeEngine, say
from transformers_api.errors import EngineFailed, Overloaded

MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def sdk(serve):
    """Make an SDK client of an application with this engine."""
    clients = []

    def build(engine: FakeEngine | None = None, **options) -> openai.OpenAI:
        transport = httpx2.WSGITransport(serve(engine).app)
        client = openai.OpenAI(
            base_url="http://testserver/v1",
            api_key="none",
            max_retries=0,
            http_client=httpx2.Client(transport=transport),
            **options,
        )
        clients.append(client)
        return client

    yield build
    for client in clients:
        client.close()


def test_models(sdk):
    client = sdk()
    assert [model.id for model in client.models.list()] == ["fake", "owner/second"]
    assert client.models.retrieve("owner/second").id == "owner/second"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.delete("owner/second")
    assert caught.value.body["code"] == "not_found"


def test_chat(sdk):
    client = sdk(FakeEngine(say("Hello!")))
    answer = client.chat.completions.create(model="fake", messages=MESSAGES, logprobs=True)
    assert answer.choices[0].message.content == "Hello!"
    assert len(answer.choices[0].logprobs.content) == 6
    assert answer._request_id


def test_streamed_chat(sdk):
    client = sdk(FakeEngine(say("Hello!")))
    with client.chat.completions.create(
        model="fake", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Hello!"
    assert chunks[-1].usage.completion_tokens == 7


def test_the_stream_helper(sdk):
    client = sdk(FakeEngine(say("Hello!")))
    with client.chat.completions.stream(model="fake", messages=MESSAGES, n=2) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert "content.delta" in kinds
    assert [choice.message.content for choice in final.choices] == ["Hello!", "Hello!"]


def test_completions(sdk):
    client = sdk(FakeEngine(say(" there")))
    answer = client.completions.create(model="fake", prompt=["Hi", "Ho"], echo=True)
    assert [choice.text for choice in answer.choices] == ["Hi there", "Ho there"]
    with client.completions.create(model="fake", prompt="Hi", stream=True) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == " there"


def test_errors_have_code_and_param(sdk):
    client = sdk()
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="fake", messages=[{"role": "robot", "content": ""}])
    assert caught.value.param == "messages[0].role"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="none", messages=MESSAGES)
    assert missing.value.code == "model_not_found"


def test_an_overloaded_server_is_a_rate_limit_error(sdk):
    client = sdk(FakeEngine(refusal=Overloaded("Too much is waiting", retry_after=3)))
    with pytest.raises(openai.RateLimitError) as caught:
        client.chat.completions.create(model="fake", messages=MESSAGES)
    assert caught.value.response.headers["retry-after"] == "3"


def test_a_broken_stream_is_an_exception_and_never_a_short_answer(sdk):
    client = sdk(FakeEngine(say("Hello!"), error=EngineFailed("The step failed"), error_after=3))
    with (
        client.chat.completions.create(model="fake", messages=MESSAGES, stream=True) as stream,
        pytest.raises(openai.APIError) as caught,
    ):
        list(stream)
    assert caught.value.code == "engine_failed"
