"""What an engine tells of its steps: the numbers that /metrics shows, from a real tiny model."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.engine.models import prompts_of
from tests.engine.reading import ask, complete, read
from tests.metrics_app import lines_of, logged
from transformers_api import logs
from transformers_api.engine.base import EngineListener, FinishReason
from transformers_api.errors import EngineFailed
from transformers_api.metrics import Metrics
from transformers_api.serving.swap.residency import SwapperStatus

PROMPT = prompts_of(4)[-1]
GREEDY = {"temperature": 0.0, "ignore_eos": True}
LONG = "gpt-oss-sinks", 4000  # a model, and tokens that nobody waits for


@pytest.fixture
def metrics():
    return Metrics(["tiny"])


def shown(metrics, engine):
    """Samples of the model by name; of a counter without its labels."""
    if not metrics.__dict__.get("watched"):
        metrics.watched = True
        status = lambda: SwapperStatus(state="ready", model="tiny", engine=engine.stats())  # noqa: E731
        metrics.watch(status, lambda: (True, ""), lambda: 0, {}, lambda: (0, 0))
    text = metrics.page()[0].decode()
    return {
        sample.name + sample.labels.get("finished_reason", ""): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.labels.get("model_name") == "tiny" and "le" not in sample.labels
    }


@pytest.fixture
def engine(make_engine, metrics):
    return make_engine(listener=metrics.engine("tiny"))


def test_tokens_and_latencies_of_an_answer_are_counted(engine, metrics):
    complete(engine, ask(PROMPT, max_tokens=6, **GREEDY))
    seen = shown(metrics, engine)
    assert seen["vllm:prompt_tokens_total"] == len(PROMPT)
    assert seen["vllm:generation_tokens_total"] == 6
    assert seen["vllm:time_to_first_token_seconds_count"] == 1
    assert seen["vllm:inter_token_latency_seconds_count"] == 5
    assert seen["vllm:request_success_totallength"] == 1
    assert seen["vllm:request_generation_tokens_sum"] == 6
    # 17 tokens in chunks of 8, then five steps of one
    assert seen["vllm:iteration_tokens_total_sum"] == len(PROMPT) + 5
    total = seen["vllm:e2e_request_latency_seconds_sum"]
    first = seen["vllm:time_to_first_token_seconds_sum"]
    gaps = seen["vllm:inter_token_latency_seconds_sum"]
    assert 0 < first < total
    assert first + gaps == pytest.approx(total, rel=0.5)
    parts = ("queue", "prefill", "decode")
    whole = sum(seen[f"vllm:request_{part}_time_seconds_sum"] for part in parts)
    assert whole == pytest.approx(total, abs=1e-6)


def test_a_prompt_seen_before_hits_the_prefix_cache(engine, metrics):
    for _ in range(2):
        complete(engine, ask(PROMPT, max_tokens=2, **GREEDY))
    seen = shown(metrics, engine)
    assert seen["vllm:prefix_cache_queries_total"] == 2 * len(PROMPT)
    assert seen["vllm:prefix_cache_hits_total"] == len(PROMPT) - 1
    engine.call(lambda _: None).result()  # the step that told the end has ended too
    seen = shown(metrics, engine)
    assert seen["vllm:num_requests_running"] == seen["vllm:num_requests_waiting"] == 0


def test_sequences_in_one_batch_are_counted_each(engine, metrics):
    complete(engine, *[ask(prompt, max_tokens=4, **GREEDY) for prompt in prompts_of(6)])
    seen = shown(metrics, engine)
    assert seen["vllm:generation_tokens_total"] == 24
    assert seen["vllm:time_to_first_token_seconds_count"] == 6
    assert seen["vllm:inter_token_latency_seconds_count"] == 18
    assert seen["vllm:request_queue_time_seconds_count"] == 6


def test_a_scored_prompt_is_read_and_has_no_first_token(engine, metrics):
    complete(engine, ask(PROMPT, max_tokens=0, prompt_logprobs=0))
    seen = shown(metrics, engine)
    assert seen["vllm:prompt_tokens_total"] == len(PROMPT)
    assert seen["vllm:generation_tokens_total"] == 0
    assert seen["vllm:time_to_first_token_seconds_count"] == 0
    assert seen["vllm:request_success_totallength"] == 1


class Ear(EngineListener):
    def __init__(self):
        self.ends = []

    def on_finish(self, stats):
        self.ends.append(stats)


def test_a_cancelled_sequence_is_told_as_such(make_engine):
    ear = Ear()
    model, tokens = LONG
    engine = make_engine(model, listener=ear)
    stream = engine.submit([ask(PROMPT, max_tokens=tokens, **GREEDY)])
    stream.get(30)
    stream.abort()
    read(stream)
    (stats,) = ear.ends
    assert stats.finish_reason is FinishReason.ABORT
    assert 1 <= stats.generated_tokens < tokens
    assert stats.total_s >= stats.decode_s >= 0


def test_the_share_of_the_kv_cache_that_runs_is_told(make_engine):
    ear = Ear()
    model, tokens = LONG
    engine = make_engine(model, listener=ear)
    stream = engine.submit([ask(PROMPT, max_tokens=tokens, **GREEDY)])
    stream.get(30)
    used = engine.stats().kv_used_bytes
    stream.abort()
    read(stream)
    assert 0 < used <= engine.stats().kv_budget_bytes
    assert engine.stats().kv_used_bytes == 0


def test_the_budget_of_the_kv_cache_is_what_was_set(make_engine):
    engine = make_engine(kv_cache_bytes=1 << 20)
    stats = engine.stats()
    assert 0.9 * (1 << 20) < stats.kv_budget_bytes <= 1 << 20
    complete(engine, ask(PROMPT, max_tokens=4, **GREEDY))
    assert 0 < engine.stats().kv_bytes <= 1 << 20


def test_a_failed_step_is_logged_with_the_request_whose_it_was(make_engine):
    engine = make_engine()

    def fail(*_):
        raise RuntimeError("the runner broke")

    engine.runner.forward = fail
    token = logs.request_id.set("request-7")
    try:
        with logged() as text:
            output = engine.submit([ask(PROMPT, max_tokens=3)]).get(30)
    finally:
        logs.request_id.reset(token)
    assert isinstance(output.error, EngineFailed)
    (line,) = lines_of(text, "A step of the engine failed")
    assert line["request_id"] == "request-7"
    assert "the runner broke" in line["trace"]


def test_what_a_visit_of_the_engine_thread_logs_is_its_caller_s(make_engine):
    engine = make_engine()
    seen = []
    token = logs.request_id.set("request-8")
    try:
        engine.call(lambda _model: seen.append(logs.request_id.get())).result(30)
    finally:
        logs.request_id.reset(token)
    engine.call(lambda _model: seen.append(logs.request_id.get())).result(30)
    assert seen == ["request-8", logs.request_id.get()]
