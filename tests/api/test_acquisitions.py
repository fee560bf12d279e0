"""A request that fails anywhere on its way gives back all that it took: descriptors do run out."""

import errno
import os
import select
import socket
import threading

import flask
import pytest

from tests import descriptors
from tests.api.conftest import Served
from transformers_api.api.http.disconnect import DisconnectWatcher
from transformers_api.api.http.request_record import RequestRecord
from transformers_api.api.http.stream_writer import StreamWriter
from transformers_api.api.openai import format as openai_format
from transformers_api.api.openai import views
from transformers_api.serving import generation
from transformers_api.serving.limits.admission import Admission
from transformers_api.serving.limits.cancellation import Cancellation
from transformers_api.serving.swap.swapper import Swapper

BODY = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
POINTS = {
    "a thread": (threading.Thread, "start"),
    "a place": (Admission, "enter"),
    "the copy of a descriptor": (os, "dup"),
    "an epoll": (select, "epoll"),
    "the watch": (DisconnectWatcher, "watch"),
    "the lease": (Swapper, "lease"),
    "the prompt": (views.ChatTask, "prepare"),
    "the start": (generation, "start"),
    "the texts of the choices": (generation, "ChoiceText"),
    "the generation": (generation, "Generation"),
    "what ends it early": (Cancellation, "on_cancel"),
    "the formatter": (views.ChatTask, "formatter"),
    "the first event": (openai_format.ChatFormatter, "opening"),
    "the writer": (StreamWriter, "write"),
    "the line of log": (RequestRecord, "note_generation"),
    "the headers": (flask.Flask, "process_response"),
    "the response": (flask, "Response"),
}


def ask(served: Served, stream: bool) -> int:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        response = served.client.post(
            "/v1/chat/completions",
            json={**BODY, "stream": stream},
            environ_overrides={"gunicorn.socket": ours, "SERVER_PROTOCOL": "HTTP/1.1"},
        )
        status = response.status_code
        try:
            response.get_data()
        finally:
            response.close()
    return status


def held(served: Served) -> tuple[int, int]:
    """(places, leases)."""
    return len(served.services.admission), served.swapper.status().leases


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("point", POINTS.values(), ids=POINTS)
def test_what_a_request_took_is_given_back_wherever_it_fails(serve, monkeypatch, point, stream):
    served = serve()
    if point not in ((threading.Thread, "start"), (select, "epoll")):  # those are for the first
        assert ask(served, stream) == 200
    else:
        served.swapper.load("fake")
    before = held(served)
    owner, name = point

    def fail(*_args, **_options):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, fail)
        open_before = descriptors.held()
        for _ in range(3):
            try:
                ask(served, stream)
            except OSError:  # of what the server closes itself, when the answer is out
                assert name == "note_generation"
        assert held(served) == before
        assert descriptors.left_since(open_before) == set()
    assert ask(served, stream) == 200
    assert held(served) == before
