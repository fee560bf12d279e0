from __future__ import annotations

import copy
import threading
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from tests.engine.models import generate, prompts_of, tiny_model
from tests.engine.reading import GREEDY, ask, complete, read
from transformers_api.engine.base import FinishReason
from transformers_api.engine.thread import EngineThread
from transformers_api.errors import (
    ContextLengthExceeded,
    EngineDead,
    EngineFailed,
    InvalidRequest,
    ModelUnloaded,
    Overloaded,
)

PROMPT = prompts_of(4)[-1]


class Gate:
    """Wraps a runner: every forward waits for a permit, so that a test decides when steps happen."""

    def __init__(self, inner):
        self.inner, self.permits = inner, threading.Semaphore(0)
        self.reached = threading.Semaphore(0)
        self.widths: list[tuple[int, int]] = []  # (sequences, largest width) of each forward
        self.fail: BaseException | None = None

    @property
    def cache(self):
        return self.inner.cache

    def forward(self, batch, keep=1):
        self.reached.release()
        assert self.permits.acquire(timeout=30)
        self.widths.append((len(batch.sequences), max(batch.widths)))
        if self.fail is not None:
            error, self.fail = self.fail, None
            raise error
        return self.inner.forward(batch, keep)

    def clear(self):
        self.inner.clear()

    def open(self):
        self.permits.release(100_000)


@pytest.fixture
def gated(make_engine):
    gates = []

    def make(*args, **options):
        engine = make_engine(*args, **options)
        engine.runner = Gate(engine.runner)
        gates.append(engine.runner)
        return engine, engine.runner

    yield make
    for gate in gates:
        gate.open()


def test_sampled_tokens_are_the_same_alone_and_in_company_and_again(make_engine):
    engine = make_engine(num_slots=4)
    params = {"max_tokens": 20, "temperature": 1.0, "ignore_eos": True}
    requests = [
        ask(p, seed=i, top_p=0.9 if i % 2 else 1.0, **params) for i, p in enumerate(prompts_of(9))
    ]
    alone = [complete(engine, request)[0] for request in requests]
    assert complete(engine, *requests) == alone
    assert complete(engine, *reversed(requests)) == alone[::-1]


def test_without_a_seed_two_answers_differ(make_engine):
    engine = make_engine()
    request = ask(PROMPT, max_tokens=30, temperature=1.5, ignore_eos=True)
    one, two = complete(engine, request, request)
    assert one != two


def test_the_end_of_sequence_token_ends_the_sequence_unless_ignored(make_engine):
    model = tiny_model("llama")
    expected = generate(model, PROMPT, 20)
    stop = next(token for token in expected if expected.index(token) >= 4)
    engine = make_engine(eos_token_ids=frozenset({stop}))
    outputs = read(engine.submit([ask(PROMPT, max_tokens=20, temperature=0.0)]))[0]
    assert [output.token_id for output in outputs] == expected[: expected.index(stop) + 1]
    assert outputs[-1].finish_reason is FinishReason.STOP
    assert complete(engine, ask(PROMPT, max_tokens=20, **GREEDY)) == [expected]


def test_a_stop_token_of_the_request_ends_it(make_engine):
    expected = generate(tiny_model("llama"), PROMPT, 20)
    stop = expected[5]
    outputs = read(
        make_engine().submit(
            [ask(PROMPT, max_tokens=20, stop_token_ids=frozenset({stop}), **GREEDY)]
        )
    )[0]
    assert len(outputs) == expected.index(stop) + 1
    assert outputs[-1].finish_reason is FinishReason.STOP


def test_the_length_is_the_reason_at_max_tokens(make_engine):
    outputs = read(make_engine().submit([ask(PROMPT, max_tokens=3, **GREEDY)]))[0]
    assert [output.finish_reason for output in outputs] == [None, None, FinishReason.LENGTH]


def test_tokens_that_the_tokenizer_lacks_are_never_sampled(make_engine):
    engine = make_engine(tokenizer_size=50)
    assert engine.vocab_size == 50
    (ids,) = complete(engine, ask([3, 4], max_tokens=100, temperature=5.0, ignore_eos=True))
    assert max(ids) < 50


def test_tokens_that_the_generation_config_suppresses_are_never_sampled(make_engine):
    model = copy.deepcopy(tiny_model("llama"))
    (plain,) = complete(make_engine(model), ask(PROMPT, max_tokens=10, **GREEDY))
    model.generation_config.suppress_tokens = [plain[0], 500]
    (ids,) = complete(make_engine(model), ask(PROMPT, max_tokens=10, **GREEDY))
    assert plain[0] not in ids
    assert ids == generate(model, PROMPT, 10)


def test_a_second_turn_reads_only_what_is_new(make_engine):
    engine = make_engine()
    first = complete(engine, ask(PROMPT, max_tokens=10, **GREEDY))[0]
    conversation = [*PROMPT, *first, 11, 12, 13]
    outputs = read(engine.submit([ask(conversation, max_tokens=5, **GREEDY)]))[0]
    assert outputs[0].cached_tokens == len(PROMPT) + len(first) - 1
    assert [o.token_id for o in outputs] == generate(tiny_model("llama"), conversation, 5)


def test_a_running_sequence_shares_its_beginning(gated):
    engine, gate = gated()
    long = prompts_of(7)[-1]
    one = engine.submit([ask(long, max_tokens=8, **GREEDY)])
    gate.permits.release(6)
    assert one.get(30) is not None
    two = engine.submit([ask([*long[:20], 5, 6], max_tokens=8, **GREEDY)])
    gate.open()
    outputs = read(two)[0]
    assert outputs[0].cached_tokens == 20
    assert [o.token_id for o in outputs] == generate(tiny_model("llama"), [*long[:20], 5, 6], 8)
    assert [o.token_id for o in read(one)[0]] == generate(tiny_model("llama"), long, 8)[1:]


def test_reused_prefixes_never_change_a_token(make_engine):
    """Many conversations, more than there are slots, each continued several times in turn."""
    engine = make_engine(num_slots=3)
    talks = [list(prompt) for prompt in prompts_of(6)]
    for turn in range(4):
        answers = complete(engine, *(ask(talk, max_tokens=4, **GREEDY) for talk in talks))
        assert answers == [generate(tiny_model("llama"), talk, 4) for talk in talks]
        talks = [[*talk, *answer, 20 + turn] for talk, answer in zip(talks, answers, strict=True)]
    assert engine.stats().cached_tokens > 0


def test_a_long_prompt_does_not_starve_those_who_decode(gated):
    engine, gate = gated(prefill_chunk=4)
    decoding = engine.submit([ask([3, 4], max_tokens=30, **GREEDY)])
    gate.permits.release(2)
    assert decoding.get(30) is not None
    engine.submit([ask(list(range(3, 43)), max_tokens=1, **GREEDY)])
    gate.open()
    read(decoding)
    prefills = [i for i, (_, width) in enumerate(gate.widths) if width > 1]
    assert len(prefills) >= 10
    alone = [i for i in prefills[1:] if gate.widths[i][0] == 1]  # those who decode take no part
    assert all(b - a >= 2 for a, b in pairwise(alone))


def test_short_prompts_are_read_together_before_the_next_decode_step(gated):
    engine, gate = gated(prefill_chunk=8)
    engine.submit([ask([3, 4, 5, 6], max_tokens=4, **GREEDY) for _ in range(2)])
    last = engine.submit([ask([9, 8, 7], max_tokens=2, **GREEDY)])
    gate.open()
    read(last)
    assert [width for _, width in gate.widths[:3]] in ([4, 1, 1], [4, 4, 1], [4, 1, 3])


@pytest.mark.parametrize("when", ["prefill", "decode"])
def test_an_aborted_sequence_leaves_within_two_steps(gated, when):
    engine, gate = gated(prefill_chunk=2)
    stream = engine.submit([ask(list(range(3, 33)), max_tokens=50, **GREEDY)])
    steps = 3 if when == "prefill" else 17
    gate.permits.release(steps)
    for _ in range(steps + 1):
        assert gate.reached.acquire(timeout=30)
    before = len(gate.widths)
    stream.abort()
    gate.open()
    assert read(stream)[0][-1].finish_reason is FinishReason.ABORT
    assert len(gate.widths) - before <= 2


def test_an_aborted_sequence_that_waits_costs_no_step(gated):
    engine, gate = gated(num_slots=1)
    running = engine.submit([ask(PROMPT, max_tokens=3, **GREEDY)])
    waiting = engine.submit([ask(PROMPT, max_tokens=3, **GREEDY)])
    assert gate.reached.acquire(timeout=30)
    waiting.abort()
    gate.open()
    assert read(waiting)[0][-1].finish_reason is FinishReason.ABORT
    assert len(read(running)[0]) == 3
    assert [width for _, width in gate.widths] == [8, 8, 1, 1, 1]


def test_one_sequence_of_a_request_can_be_aborted(gated):
    engine, gate = gated()
    stream = engine.submit([ask(PROMPT, max_tokens=90, **GREEDY) for _ in range(3)])
    assert gate.reached.acquire(timeout=30)
    stream.abort(1)
    gate.open()
    outputs = read(stream)
    assert outputs[1][-1].finish_reason is FinishReason.ABORT
    assert len(outputs[0]) == len(outputs[2]) == 90


def test_a_step_that_fails_ends_its_sequences_and_the_engine_lives_on(gated, caplog):
    engine, gate = gated()
    gate.fail = ValueError("broken on purpose")
    stream = engine.submit([ask(PROMPT, max_tokens=5, **GREEDY)])
    gate.open()
    (last,) = read(stream)[0]
    assert last.finish_reason is FinishReason.ERROR
    assert isinstance(last.error, EngineFailed)
    assert "broken on purpose" not in last.error.message
    assert complete(engine, ask(PROMPT, max_tokens=5, **GREEDY)) == [
        generate(tiny_model("llama"), PROMPT, 5)
    ]
    assert engine.stats().running == 0


def test_memory_that_cannot_be_had_fails_who_waits_and_not_the_engine(
    make_engine, monkeypatch, caplog
):
    engine = make_engine()

    def no_memory(rows, length):
        raise MemoryError

    monkeypatch.setattr(engine.scheduler.cache, "_resize", no_memory)
    both = [ask(PROMPT, max_tokens=100, ignore_eos=True) for _ in range(2)]
    (last,) = read(engine.submit(both))[1]
    assert isinstance(last.error, EngineFailed)
    monkeypatch.undo()
    assert complete(engine, ask(PROMPT, max_tokens=5, **GREEDY)) == [
        generate(tiny_model("llama"), PROMPT, 5)
    ]


def test_a_nan_in_one_sequence_reaches_no_other(make_engine):
    """The model breaks for one token; its row of the cache is used again."""
    model = copy.deepcopy(tiny_model("llama"))
    with torch.no_grad():
        model.model.embed_tokens.weight[95] = float("nan")
    engine = make_engine(model, num_slots=2)
    broken = ask([*PROMPT, 95, 9, 9], max_tokens=3)
    (last,) = read(engine.submit([broken]))[0]
    assert isinstance(last.error, EngineFailed)
    short, long = prompts_of(7)[0], prompts_of(7)[-1]  # attention sees as far as the longest
    assert complete(engine, *(ask(p, max_tokens=8, **GREEDY) for p in (short, long))) == [
        generate(model, p, 8) for p in (short, long)
    ]


def test_a_reader_that_does_not_keep_up_is_ended(make_engine):
    engine = make_engine()
    stream = engine.submit([ask(PROMPT, max_tokens=90, **GREEDY)])
    stream.limit = 20
    last = read(stream)[0][-1]
    assert last.finish_reason in (FinishReason.ERROR, FinishReason.LENGTH)


def test_more_than_may_wait_is_refused_and_leaves_no_trace(gated):
    engine, gate = gated(num_slots=2, max_waiting=1)
    streams = [engine.submit([ask(PROMPT, max_tokens=2, **GREEDY)]) for _ in range(3)]
    with pytest.raises(Overloaded):
        engine.submit([ask(PROMPT, max_tokens=2, **GREEDY)])
    with pytest.raises(Overloaded):
        engine.submit([ask(PROMPT, max_tokens=2, **GREEDY) for _ in range(4)])
    gate.open()
    for stream in streams:
        read(stream)
    assert len(complete(engine, *[ask(PROMPT, max_tokens=2, **GREEDY)] * 3)) == 3


def test_prompts_that_cannot_be_served_are_refused_at_once(make_engine):
    engine = make_engine()
    with pytest.raises(ContextLengthExceeded, match="128"):
        engine.submit([ask([3] * 128, max_tokens=1)])
    with pytest.raises(InvalidRequest):
        engine.submit([ask([], max_tokens=1)])
    with pytest.raises(InvalidRequest, match="96"):
        engine.submit([ask([97], max_tokens=1)])
    with pytest.raises(InvalidRequest):
        engine.submit([ask([-1], max_tokens=1)])


def test_the_registry_may_shorten_the_context_but_not_stretch_it(make_engine):
    assert make_engine(max_context_tokens=50).max_model_len == 50
    assert make_engine(max_context_tokens=5000).max_model_len == 128


def test_kv_memory_bounds_how_many_run_together(make_engine):
    small = make_engine(num_slots=4, kv_cache_bytes=1)
    assert small.max_model_len == 128
    assert complete(small, *(ask(p, max_tokens=60, **GREEDY) for p in prompts_of(6))) == [
        generate(tiny_model("llama"), p, 60) for p in prompts_of(6)
    ]
    stats = small.stats()
    assert 0 < stats.kv_bytes <= stats.kv_budget_bytes


def test_prompt_scores_are_the_models_log_probabilities(make_engine):
    prompt = prompts_of(7)[-1]
    outputs = read(
        make_engine().submit([ask(prompt, max_tokens=2, prompt_logprobs=2, logprobs=1, **GREEDY)])
    )[0]
    with torch.inference_mode():
        logits = tiny_model("llama")(torch.tensor([prompt])).logits[0].log_softmax(-1)
    scores = outputs[0].prompt_scores
    assert scores[0] is None
    assert [score.token_id for score in scores[1:]] == prompt[1:]
    for position, score in enumerate(scores[1:]):
        assert score.logprob == pytest.approx(logits[position, score.token_id].item(), abs=1e-4)
        assert score.top[0][0] == logits[position].argmax().item()
    assert outputs[0].score.logprob == pytest.approx(logits[-1].max().item(), abs=1e-4)
    assert outputs[1].prompt_scores is None


def test_prompts_that_share_the_engine_get_what_they_get_alone(make_engine, gated):
    """Tokens and scores to the bit: long ones and short ones, scored ones, of several clients."""
    prompts = [[(7 * place + 3 * i) % 50 + 4 for i in range(10 + 20 * place)] for place in range(6)]
    scored = {1: 2, 3: 0}
    asks = [
        replace(
            ask(prompt, max_tokens=6, logprobs=1, prompt_logprobs=scored.get(place), **GREEDY),
            client=str(place % 3),
        )
        for place, prompt in enumerate(prompts)
    ]
    options = {"kv_cache_bytes": 1 << 22, "num_slots": 8, "max_waiting": 8}
    lone = make_engine(**options)
    alone = [read(lone.submit([each]))[0] for each in asks]
    engine, gate = gated(**options)
    streams = [engine.submit([each]) for each in asks]
    gate.open()
    for stream, expected in zip(streams, alone, strict=True):
        outputs = read(stream)[0]
        assert [each.token_id for each in outputs] == [each.token_id for each in expected]
        assert [each.score for each in outputs] == [each.score for each in expected]
        assert outputs[0].prompt_scores == expected[0].prompt_scores


def test_scoring_alone_generates_nothing(make_engine):
    (last,) = read(make_engine().submit([ask(PROMPT, max_tokens=0, prompt_logprobs=0)]))[0]
    assert last.finish_reason is FinishReason.LENGTH
    assert last.token_id is None
    assert len(last.prompt_scores) == len(PROMPT)


def test_a_visit_runs_between_two_steps_on_the_engine_thread(make_engine, engine_thread):
    engine = make_engine()
    name, kind = engine.call(lambda model: (threading.current_thread().name, type(model))).result(
        30
    )
    assert name == "engine"
    assert kind is type(tiny_model("llama"))


def test_closing_ends_what_runs_with_the_reason(gated):
    engine, gate = gated()
    stream = engine.submit([ask(PROMPT, max_tokens=90, **GREEDY)])
    assert gate.reached.acquire(timeout=30)
    closing = threading.Thread(
        target=engine.close, args=(ModelUnloaded("another model is loaded"),)
    )
    closing.start()
    gate.open()
    last = read(stream)[0][-1]
    closing.join(30)
    assert last.finish_reason is FinishReason.ERROR
    assert isinstance(last.error, ModelUnloaded)
    late = read(engine.submit([ask(PROMPT, max_tokens=1)]))[0][-1]
    assert isinstance(late.error, ModelUnloaded)
    engine.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_when_the_engine_thread_dies_everyone_is_told(make_engine, caplog):
    thread = EngineThread(1)
    engine = make_engine(thread=thread)
    engine.runner = gate = Gate(engine.runner)
    gate.fail = SystemExit()
    stream = engine.submit([ask(PROMPT, max_tokens=5)])
    pending = thread.call(lambda: 1)
    gate.open()
    assert isinstance(read(stream)[0][-1].error, EngineDead)
    assert isinstance(pending.exception(30), EngineDead) or pending.result() == 1
    assert not thread.is_alive
    with pytest.raises(EngineDead):
        engine.submit([ask(PROMPT, max_tokens=5)])
    with pytest.raises(EngineDead):
        thread.call(lambda: 1).result(30)
