"""What happens to a request that does not go smoothly, and what it gives back."""

import json
import threading

import pytest

from tests.api.conftest import events
from tests.fakes import FakeEngine, fake_spec, say
from transformers_api.api.http.disconnect import DisconnectWatcher, Watch
from transformers_api.errors import EngineFailed, InvalidRequest, Overloaded, UnknownCompletion
from transformers_api.serving.inspect.recent_completions import Completion


class Client(DisconnectWatcher):
    """Watches nothing by itself; the test says when the client leaves."""

    def __init__(self):
        super().__init__()
        self.leave = []
        self.closed = 0
        self.watched = threading.Semaphore(0)

    def watch(self, environ, on_gone):
        self.leave.append(on_gone)
        self.watched.release()
        return Watch(self._close)

    def _close(self):
        self.closed += 1


@pytest.fixture
def watcher():
    return Client()


@pytest.fixture
def client(watcher):
    """The client of every request of the test."""
    return watcher


def released(served, client=None):
    """Nothing is held any more: lease, sequences, watch."""
    assert served.swapper.status().leases == 0
    if client is not None:
        assert client.closed == len(client.leave)
    return True


def test_a_stream_says_how_it_is_sent(served):
    response = served.chat(stream=True)
    assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert response.headers["Cache-Control"] == "no-cache"
    assert response.headers["X-Accel-Buffering"] == "no"
    assert "Content-Length" not in response.headers
    assert events(response).done


@pytest.mark.parametrize("route", ["chat", "complete"])
def test_an_error_after_the_first_byte_is_an_event_and_no_done(serve, client, route):
    error = EngineFailed("The step failed")
    served = serve(FakeEngine(say("Hello"), error=error, error_after=2))
    read = events(getattr(served, route)(stream=True))
    assert read.payloads[-1] == {
        "error": {
            "message": "The step failed",
            "type": "server_error",
            "param": None,
            "code": "engine_failed",
        }
    }
    assert not read.done
    assert released(served, client)


def test_an_error_before_the_answer_is_complete_is_a_status(serve, client):
    served = serve(FakeEngine(say("Hello"), error=EngineFailed("The step failed"), error_after=2))
    response = served.chat()
    assert response.status_code == 500
    assert response.get_json()["error"]["code"] == "engine_failed"
    assert released(served, client)


def test_an_unexpected_error_in_a_stream_is_logged_and_not_shown(served, client, caplog):
    def broken(*_):
        yield b'data: {"choices":[]}\n\n'
        raise RuntimeError("secret")

    from transformers_api.api.openai.format import ChatFormatter

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ChatFormatter, "frames", broken)
        read = events(served.chat(stream=True))
    assert read.payloads[-1]["error"]["code"] == "engine_failed"
    assert "secret" not in str(read.payloads)
    assert "secret" in caplog.text
    assert released(served, client)


@pytest.mark.parametrize("stream", [False, True])
def test_a_refused_request_is_a_status_also_for_a_stream(serve, client, stream):
    served = serve(FakeEngine(refusal=Overloaded("Too much is waiting", retry_after=300)))
    response = served.chat(stream=stream)
    assert response.status_code == 429
    assert response.headers["Retry-After"] == "120"
    assert response.get_json()["error"]["code"] == "queue_full"
    assert released(served, client)


def test_what_does_not_fit_is_a_status_also_for_a_stream(serve, client):
    served = serve(FakeEngine(max_model_len=8))
    assert served.chat("x" * 9, stream=True).status_code == 400
    assert released(served, client)


def test_silence_is_filled_with_comments(serve):
    gate = threading.Semaphore(0)
    served = serve(FakeEngine(say("Hi"), gate=gate), keepalive_s=0.02)
    response = served.chat(stream=True)
    frames = iter(response.response)
    assert b'"role":"assistant"' in next(frames)
    assert next(frames) == b": ping\n\n"
    gate.release(10)
    rest = b"".join(frames)
    assert rest.endswith(b"data: [DONE]\n\n")
    response.close()
    assert released(served)


def test_a_stream_that_is_never_read_gives_everything_back(serve, client):
    gate = threading.Event()
    served = serve(FakeEngine(say("Hello"), gate=gate))
    response = served.chat(stream=True)
    assert served.swapper.status().leases == 1
    response.close()
    assert served.engine.aborted == [None]
    assert released(served, client)


def test_a_stream_that_is_left_in_the_middle_gives_everything_back(serve, client):
    gate = threading.Semaphore(2)
    served = serve(FakeEngine(say("Hello"), gate=gate))
    response = served.chat(stream=True)
    frames = iter(response.response)
    texts = [next(frames) for _ in range(3)]
    assert b'"content":"e"' in texts[2]
    response.close()
    assert served.engine.aborted == [None]
    assert released(served, client)


def test_a_stream_is_remembered_at_its_end_with_the_token_that_ended_it(serve):
    gate = threading.Semaphore(0)
    served = serve(FakeEngine(say("Hello"), gate=gate))
    response = served.chat(stream=True)
    frames = iter(response.response)
    completion_id = json.loads(next(frames).removeprefix(b"data: "))["id"]
    with pytest.raises(UnknownCompletion):
        served.services.completions.find(completion_id)
    gate.release(10)
    assert b"".join(frames).endswith(b"data: [DONE]\n\n")
    response.close()
    prompt = tuple(served.engine.submitted[0][0].prompt_ids)
    (end,) = served.engine.eos_token_ids
    remembered = Completion("fake", prompt, (*b"Hello", end), "127.0.0.1")
    assert served.services.completions.find(completion_id) == remembered


def test_a_stream_that_its_reader_leaves_is_not_remembered(serve):
    served = serve(FakeEngine(say("Hello"), gate=threading.Semaphore(2)))
    response = served.chat(stream=True)
    frames = iter(response.response)
    completion_id = json.loads(next(frames).removeprefix(b"data: "))["id"]
    next(frames)
    response.close()
    with pytest.raises(UnknownCompletion):
        served.services.completions.find(completion_id)


def test_all_choices_of_a_stream_are_remembered(serve):
    served = serve(FakeEngine(say("ab")))
    completion_id = events(served.chat(stream=True, n=2)).payloads[0]["id"]
    assert served.services.completions.find(completion_id, 1).token_ids[:2] == (*b"ab",)


def test_of_several_answers_only_those_that_were_sent_are_remembered(served):
    completion_id = served.complete(n=1, best_of=2).get_json()["id"]
    assert served.services.completions.find(completion_id)
    with pytest.raises(InvalidRequest, match=r"choice must be in \[0, 0\]"):
        served.services.completions.find(completion_id, 1)


def test_a_stream_that_was_read_to_its_end_aborts_nothing(served, client):
    assert events(served.chat(stream=True)).done
    assert served.engine.aborted == []
    assert released(served, client)


def test_a_client_that_leaves_a_plain_request_ends_it(serve, client):
    served = serve(FakeEngine(say("Hello"), gate=threading.Event()))
    statuses = []
    thread = threading.Thread(target=lambda: statuses.append(served.chat().status_code))
    thread.start()
    assert client.watched.acquire(timeout=30)
    client.leave[0]()
    thread.join(30)
    assert statuses == [499]
    assert served.engine.stats().generated_tokens == 0
    assert released(served, client)


def test_a_client_that_leaves_while_its_model_loads_is_forgotten(serve, client):
    served = serve()
    served.loader.hold["load"] = threading.Event()
    statuses = []
    thread = threading.Thread(target=lambda: statuses.append(served.chat(stream=True).status_code))
    thread.start()
    assert served.loader.entered["load"].acquire(timeout=30)
    client.leave[0]()
    thread.join(30)
    served.loader.hold["load"].set()
    assert statuses == [499]
    assert served.engine.submitted == []
    assert released(served, client)


def test_a_client_that_leaves_a_stream_ends_its_sequences(serve, client):
    gate = threading.Semaphore(0)
    served = serve(FakeEngine(say("Hello"), gate=gate))
    response = served.chat(stream=True, n=2)
    client.leave[0]()
    assert events(response).payloads[-1]["error"]["code"] == "client_gone"
    assert released(served, client)


def test_a_model_that_is_taken_away_ends_a_stream_with_an_error(serve):
    served = serve(FakeEngine(say("Hello"), gate=threading.Event()))
    response = served.chat(stream=True)
    served.swapper.evict(force=True, wait=False)
    assert served.engine.closed.wait(30)
    read = events(response)
    assert read.payloads[-1]["error"]["code"] == "model_unloaded"
    assert not read.done
    assert released(served)


def test_a_switch_of_models_waits_for_a_stream(serve):
    gate = threading.Semaphore(0)
    served = serve(FakeEngine(say("Hello"), gate=gate))
    response = served.chat(stream=True)
    statuses = []
    other = threading.Thread(target=lambda: statuses.append(served.chat(model="two").status_code))
    other.start()
    assert served.loader.entered["prepare"].acquire(timeout=30)
    gate.release(10)
    assert events(response).text() == "Hello"
    other.join(30)
    assert statuses == [200]


def test_a_model_that_is_not_loaded_is_503_without_auto_load(serve):
    served = serve(auto_load=False)
    response = served.chat()
    assert response.status_code == 503
    body = response.get_json()["error"]
    assert (body["message"], body["code"]) == ("Model 'fake' is not loaded", "model_not_loaded")


def test_a_model_that_fails_to_load_is_503_with_the_reason(serve):
    from transformers_api.errors import ModelLoadFailed

    served = serve(specs=(fake_spec(),))
    served.loader.fail["load"] = ModelLoadFailed("the file is cut off")
    response = served.chat(stream=True)
    assert response.status_code == 503
    assert "cut off" in response.get_json()["error"]["message"]
    assert 1 <= int(response.headers["Retry-After"]) <= 120
