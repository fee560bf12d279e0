"""The answers of one front share messages: nothing is lost, doubled or late for the others."""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.fakes import FakeLoader
from transformers_api.cluster import lines
from transformers_api.cluster import replica as replica_module
from transformers_api.cluster.lines import Lines
from transformers_api.cluster.messages import Caller, Outputs, Sequences, Waiting
from transformers_api.cluster.remote_model import SILENT_LOOKS, RemoteEngine
from transformers_api.cluster.replica import Replica
from transformers_api.config.settings import Settings
from transformers_api.engine.base import (
    FinishReason,
    SamplingParams,
    SequenceRequest,
    TokenOutput,
    TokenScore,
    TokenStream,
)
from transformers_api.errors import ReplicaFailed
from transformers_api.serving.limits.cancellation import Cancellation
from transformers_api.serving.models.registry import ModelRegistry
from transformers_api.serving.models.spec import ModelSpec, PathSource
from transformers_api.serving.upstream.loop import BackgroundLoop

REQUEST = SequenceRequest([1], SamplingParams(max_tokens=100))
END = TokenOutput(finish_reason=FinishReason.LENGTH, token_id=99)


class Answers:
    """The streams of one replica, as an engine writes them, and their way to a front.

    Meets ``cluster.transport.Transport`` as far as an answer needs it. ``lost`` names the streams
    of which no message arrives any more.
    """

    def __init__(self) -> None:
        self.start = BackgroundLoop("answers").start
        self.name, self.answers = "front", {}
        self.written: list[TokenStream] = []
        self.lost: set[int] = set()
        self.messages: list[Outputs] = []
        self._lines: Lines | None = None

    async def stream(self, method, place, caller, sequences: Sequences):
        self._lines = self._lines or Lines()
        number = len(self.written)
        written = TokenStream(len(sequences.requests), lambda _: None)
        self.written.append(written)
        with self._lines.line(sequences, written) as line:
            yield Outputs(outputs=())
            async for message in line.messages():
                if number not in self.lost:
                    self.messages.append(message)
                    yield message

    async def settled(self) -> None:
        for _ in range(20):
            await asyncio.sleep(0)

    def write(self, numbers, output: TokenOutput) -> None:
        """A step of the engine, and all that comes of it."""

        async def put() -> None:
            for number in numbers:
                self.written[number].put(replace(output))
            await self.settled()

        self.start(put()).result(10)


@pytest.fixture
def replica():
    replica = Answers()
    yield replica
    for answer in list(replica.answers.values()):
        answer.stream.abort()
    replica.start(replica.settled()).result(10)


def submit(replica, *requests: SequenceRequest, **options) -> TokenStream:
    spec = ModelSpec(name="one", source=PathSource(Path("/none")))
    engine = RemoteEngine(replica, Caller(spec=spec), None, Cancellation())
    return engine.submit(requests or [REQUEST], **options)


def read(stream) -> list[int]:
    ids = []
    while (output := stream.get(0)) is not None:
        ids.append(output.token_id)
    return ids


def token(number: int) -> TokenOutput:
    return TokenOutput(token_id=number)


def test_a_step_is_one_message_for_all_answers_of_a_front(replica):
    streams = [submit(replica) for _ in range(4)]
    replica.write(range(4), token(0))  # the first one goes by each answer's own stream
    before = len(replica.messages)
    for number in range(1, 6):
        replica.write(range(4), token(number))
        assert [read(stream)[-1] for stream in streams] == [number] * 4
    assert len(replica.messages) - before == 5


def test_answers_end_by_their_own_streams_with_all_that_they_have(replica):
    first, second = submit(replica), submit(replica)
    for number in range(3):
        replica.write((0, 1), token(number))
    replica.write((0, 1), END)
    for stream in (first, second):
        outputs = list(itertools.takewhile(lambda output: output, stream.read(0)))
        assert [output.token_id for output in outputs] == [0, 1, 2, 99]
        assert outputs[-1].finish_reason is FinishReason.LENGTH
    assert replica.answers == {}


def test_what_a_carrier_that_leaves_had_on_its_way_is_sent_again(replica):
    stays, leaves = submit(replica), submit(replica)
    replica.write((0, 1), token(0))
    replica.lost.add(1)
    replica.write((0, 1), token(1))
    replica.write((0, 1), token(2))
    assert read(stays) == [0]
    leaves.abort()
    replica.start(replica.settled()).result(10)
    assert read(stays) == [1, 2]
    replica.write((0,), token(3))
    assert read(stays) == [3]


def test_outputs_that_are_more_than_a_token_go_by_their_own_stream(replica):
    scored = TokenOutput(token_id=7, score=TokenScore(7, -1.0))
    first, second = submit(replica), submit(replica)
    replica.write((0, 1), token(0))
    replica.write((0, 1), token(1))
    replica.write((0, 1), scored)
    replica.write((0, 1), token(8))
    for stream in (first, second):
        outputs = list(itertools.takewhile(lambda output: output, stream.read(0)))
        assert [output.token_id for output in outputs] == [0, 1, 7, 8]
        assert [output.score is not None for output in outputs] == [False, False, True, False]


def test_answers_with_several_sequences_are_not_carried(replica):
    several, carrier = submit(replica, REQUEST, REQUEST), submit(replica)
    for number in range(3):
        replica.write((0, 1), replace(token(number), index=0))
        replica.write((0,), replace(token(number), index=1))
    outputs = list(itertools.takewhile(lambda output: output, several.read(0)))
    assert [(output.index, output.token_id) for output in outputs] == [
        (index, number) for number in range(3) for index in (0, 1)
    ]
    assert read(carrier) == [0, 1, 2]


def test_a_stream_that_has_nothing_to_send_says_so(replica, monkeypatch):
    monkeypatch.setattr(lines, "BEAT_S", 0.01)
    stream = submit(replica)
    until = time.monotonic() + 30
    while len(replica.messages) < 3:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert {(*each.outputs, *each.again) for each in replica.messages} == {()}
    replica.write((0,), token(0))
    assert read(stream) == [0]


@pytest.fixture
def loading(tmp_path, monkeypatch):
    """A coroutine's way to a replica whose model takes its time, and the end of that."""
    monkeypatch.setattr(replica_module, "PROMPT_S", 0.01)
    loader = FakeLoader()
    loader.hold["load"] = threading.Event()
    (tmp_path / "models.json").write_text('[{"name": "one", "path": "nowhere"}]')
    settings = Settings(
        model_registry_path=tmp_path / "models.json",
        include_default_models=False,
        preload_model=False,
        model_store=tmp_path / "store",
    )

    def begin():
        replica = Replica(settings, "r1", loader=loader)
        spec = ModelRegistry.from_settings(settings, lambda _: False).resolve("one")
        sequences = Sequences(requests=[REQUEST], constraints=[None], name="a")
        messages = replica.generate(Caller(spec=spec), sequences)
        return replica._engine.models, messages, loader.hold["load"].set

    return begin


def test_a_request_that_waits_for_its_model_says_so(loading):
    async def kinds() -> list[type]:
        models, messages, end_load = loading()
        found = []
        async for message in messages:
            found.append(type(message))
            end_load()
        models.close()
        return found

    first, *rest = asyncio.run(kinds())
    assert first is Waiting
    assert set(rest) <= {Waiting, Outputs}
    assert rest[-1] is Outputs


def test_whoever_leaves_as_the_model_comes_keeps_nothing_of_it(loading):
    async def leave() -> None:
        models, messages, end_load = loading()
        assert isinstance(await anext(messages), Waiting)
        (submission,) = asyncio.all_tasks() - {asyncio.current_task()}
        end_load()
        await asyncio.wait({submission}, timeout=30)  # and nobody takes what it has
        assert models.status().leases == 1
        await messages.aclose()
        assert models.status().leases == 0
        models.close()

    asyncio.run(leave())


def test_an_answer_that_is_silent_for_too_many_looks_fails(replica):
    silent, other = submit(replica), submit(replica)
    answers = list(replica.answers.values())
    for number in range(2 * SILENT_LOOKS):
        for answer in answers:
            answer.looked()
        replica.write((1,), token(number))  # by its own stream: each write is settled
    last = list(itertools.takewhile(lambda output: output, silent.read(0)))[-1]
    assert last.finish_reason is FinishReason.ERROR
    assert isinstance(last.error, ReplicaFailed)
    assert read(other) == list(range(2 * SILENT_LOOKS))


def test_an_answer_with_notes_of_an_observer_carries_nothing(replica):
    plain, observed = submit(replica), submit(replica, observe={"trace": None})
    replica.write((0, 1), token(0))
    before = len(replica.messages)
    replica.write((0, 1), token(1))
    assert [bool(message.carried) for message in replica.messages[before:]] == [False, False]
    assert read(plain) == read(observed) == [0, 1]


@pytest.mark.parametrize("seed", range(20))
def test_every_answer_is_whole_whoever_comes_and_leaves(replica, seed):
    chance = random.Random(seed)
    streams, counts, closed = [], [], set()
    for _ in range(60):
        if len(streams) - len(closed) < 4:
            streams.append(submit(replica))
            counts.append(0)
        running = [n for n in range(len(streams)) if n not in closed]
        for number in running:
            if chance.random() < 0.9:
                replica.write((number,), token(counts[number]))
                counts[number] += 1
        number = chance.choice(running)
        act = chance.random()
        if act < 0.1:  # its messages are lost, and then it leaves
            replica.lost.add(number)
        elif act < 0.2 or number in replica.lost:
            streams[number].abort()
            closed.add(number)
        elif act < 0.3:
            replica.write((number,), END)
            closed.add(number)
            assert read(streams[number]) == [*range(counts[number]), 99]
    for number in set(range(len(streams))) - closed - replica.lost:
        replica.write((number,), END)
        assert read(streams[number]) == [*range(counts[number]), 99]
