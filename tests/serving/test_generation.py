from __future__ import annotations

import threading
from itertools import cycle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tokenizers
from tests.fakes import EOS, FakeEngine, fake_model, say
from transformers_api.engine.base import FinishReason, SamplingParams, TokenOutput, TokenScore
from transformers_api.errors import (
    ClientGone,
    EngineFailed,
    InvalidRequest,
    ModelUnloaded,
    Overloaded,
)
from transformers_api.serving.generation import (
    Generation,
    GenerationRequest,
    Usage,
    collect,
    start,
)
from transformers_api.serving.limits.cancellation import Cancellation

PROMPT = list(b"Say: ")
PATIENCE_S = 30


def begin(
    engine,
    *,
    prompts=(PROMPT,),
    n=1,
    best_of=None,
    stop=(),
    quiet_s=None,
    tokenizer=None,
    stream=False,
    cancellation=None,
    **params,
) -> Generation:
    params = SamplingParams(**{"max_tokens": 200, **params})
    request = GenerationRequest(prompts, params, n, best_of, tuple(stop), quiet_s)
    model = fake_model(engine=engine, tokenizer=tokenizer)
    return start(model, request, cancellation or Cancellation(), stream=stream)


def complete(engine, **options):
    return collect(begin(engine, **options))


def endless(letters="abc"):
    return lambda *_: cycle(letters.encode())


def by_index(*texts):
    """The i-th sequence says the i-th text."""
    return lambda _prompt, _params, index: list(texts[index].encode())


# --- texts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["plain", "né 世界 👩‍🚀🇩🇪 ok", ""])
def test_a_choice_has_the_whole_text_and_ends_with_the_models_own_token(text):
    generation = begin(FakeEngine(say(text)))
    deltas = list(generation)
    assert "".join(delta.text for delta in deltas) == text
    assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + ["stop"]
    assert deltas[-1].stop_reason is None
    assert generation.usage == Usage(len(PROMPT), len(text.encode()) + 1, 0)


def test_characters_of_several_tokens_come_whole():
    deltas = list(begin(FakeEngine(say("世👩‍🚀"))))
    assert [delta.text for delta in deltas] == ["世", "👩", "\u200d", "🚀", ""]
    assert [len(delta.token_ids) for delta in deltas] == [3, 4, 3, 4, 1]


def test_byte_fallback_tokens_become_characters():
    tokenizer = tokenizers.sentencepiece()
    hello, world = tokenizer.convert_tokens_to_ids(["▁Hello", "▁world"])
    ids = [hello, *(3 + byte for byte in "🚀".encode()), world]
    engine = FakeEngine(lambda *_: ids, eos_token_ids=[2], vocab_size=400)
    prompt = tokenizer.encode("the", add_special_tokens=False)
    [choice] = complete(engine, tokenizer=tokenizer, prompts=[prompt])
    assert choice.text == " Hello🚀 world"


def test_max_tokens_ends_with_length_and_shows_an_unfinished_character():
    [choice] = complete(FakeEngine(say("a世")), max_tokens=3)
    assert (choice.text, choice.finish_reason) == ("a�", "length")
    assert len(choice.token_ids) == 3


def test_a_stop_token_ends_the_text_and_is_told():
    [choice] = complete(FakeEngine(say("ab.cd")), stop_token_ids=frozenset({ord(".")}))
    assert (choice.text, choice.finish_reason, choice.stop_reason) == ("ab", "stop", ord("."))
    assert choice.token_ids == tuple(b"ab.")


def test_special_tokens_are_not_part_of_the_text():
    engine = FakeEngine(lambda *_: [*b"ab", EOS, *b"cd"])
    [choice] = complete(engine, ignore_eos=True, max_tokens=5)
    assert (choice.text, choice.token_ids) == ("abcd", (*b"ab", EOS, *b"cd"))


# --- stop strings ---------------------------------------------------------------------------------


def test_a_stop_string_across_tokens_is_never_sent_and_ends_the_sequence():
    engine = FakeEngine(say("one two END three"))
    generation = begin(engine, stop=["END"])
    deltas = list(generation)
    assert "".join(delta.text for delta in deltas) == "one two "
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", "END")
    assert engine.aborted == [0]
    assert generation.usage.completion_tokens == len("one two END")


def test_a_stop_string_that_does_not_become_complete_is_text():
    [choice] = complete(FakeEngine(say("the EN")), stop=["END"])
    assert (choice.text, choice.finish_reason, choice.stop_reason) == ("the EN", "stop", None)
    [choice] = complete(FakeEngine(endless("EN")), stop=["END"], max_tokens=4)
    assert (choice.text, choice.finish_reason) == ("ENEN", "length")


def test_a_stop_string_in_the_last_token_is_a_stop():
    [choice] = complete(FakeEngine(say("abcdef")), stop=["c"], max_tokens=3)
    assert (choice.text, choice.finish_reason, choice.stop_reason) == ("ab", "stop", "c")


def test_stop_strings_are_not_looked_for_before_min_tokens():
    [choice] = complete(FakeEngine(say("a.b.c.d")), stop=["."], min_tokens=4)
    assert choice.text == "a.b.c"


def test_one_choice_that_stops_leaves_the_others_running():
    engine = FakeEngine(by_index("aXb", "cccccc"))
    choices = complete(engine, n=2, stop=["X"])
    assert [choice.text for choice in choices] == ["a", "cccccc"]
    assert engine.aborted == [0]


@given(
    texts=st.lists(st.text("abX世🚀\n", max_size=12), min_size=1, max_size=4),
    stop=st.lists(st.text("abX世", min_size=1, max_size=3), max_size=2),
    max_tokens=st.integers(1, 30),
    wants=st.sampled_from([None, 0, 2]),
)
@settings(deadline=None)
def test_streamed_and_collected_are_the_same(texts, stop, max_tokens, wants):
    options = {"n": len(texts), "stop": stop, "max_tokens": max_tokens, "logprobs": wants}
    streamed = begin(FakeEngine(by_index(*texts)), **options)
    deltas = list(streamed)
    collected = begin(FakeEngine(by_index(*texts)), **options)
    for choice in collect(collected):
        own = [delta for delta in deltas if delta.index == choice.index]
        assert "".join(delta.text for delta in own) == choice.text
        assert sum((delta.token_ids for delta in own), ()) == choice.token_ids
        assert sum((delta.logprobs for delta in own), ()) == choice.logprobs
        assert [d.finish_reason for d in own if d.finish_reason] == [choice.finish_reason]
        assert own[-1].finish_reason
        assert not any(s in choice.text for s in stop)
        assert texts[choice.index].startswith(choice.text.rstrip("�"))
    assert streamed.usage == collected.usage
    assert streamed.usage.completion_tokens == sum(len(delta.token_ids) for delta in deltas)


# --- scores ---------------------------------------------------------------------------------------


def test_each_token_of_the_text_has_its_score_when_asked_for():
    [choice] = complete(FakeEngine(say("ab")), logprobs=2)
    assert [(d.token_id, d.text, d.bytes, d.logprob) for d in choice.logprobs] == [
        (97, "a", b"a", -0.5),
        (98, "b", b"b", -0.5),
    ]
    assert choice.logprobs[0].top == ((97, "a", b"a", -0.5), (98, "b", b"b", -1.5))
    assert choice.token_ids == (97, 98, EOS), "the end has no score: it is not text"


def test_no_scores_unless_asked_for():
    [choice] = complete(FakeEngine(say("ab")))
    assert choice.logprobs == ()
    assert choice.prompt_scores is None


def test_scores_come_with_the_piece_that_carries_their_text():
    deltas = list(begin(FakeEngine(say("a世ENb")), stop=["END"], logprobs=0))
    assert [(d.text, "".join(chr(t.token_id) for t in d.logprobs)) for d in deltas] == [
        ("a", "a"),
        ("世", "世".encode().decode("latin-1")),
        ("ENb", "ENb"),
        ("", ""),
    ]
    assert [t.text for t in deltas[1].logprobs] == ["bytes:\\xe4", "bytes:\\xb8", "bytes:\\x96"]


def test_a_token_that_is_half_held_back_comes_with_its_second_half():
    tokenizer = tokenizers.byte_level(("to EN",))
    [merged] = tokenizer.encode("to EN")
    engine = FakeEngine(lambda *_: [ord("a"), merged, *b"x"])
    deltas = list(begin(engine, tokenizer=tokenizer, stop=["END"], logprobs=0))
    assert [(d.text, d.token_ids, len(d.logprobs)) for d in deltas] == [
        ("a", (97,), 1),
        ("to ", (), 0),
        ("ENx", (merged, 120), 2),
        ("", (EOS,), 0),
    ]


def test_scores_beyond_a_stop_string_are_dropped():
    tokenizer = tokenizers.byte_level(("to EN",))
    [merged] = tokenizer.encode("to EN")
    engine = FakeEngine(lambda *_: [ord("a"), merged, *b"D more"])
    [choice] = complete(engine, tokenizer=tokenizer, stop=["END"], logprobs=0)
    assert choice.text == "ato "
    assert [detail.text for detail in choice.logprobs] == ["a", "to EN"]
    assert choice.token_ids == (ord("a"), merged, ord("D"))


def test_a_prompt_can_be_scored_without_generating():
    generation = begin(FakeEngine(), max_tokens=0, prompt_logprobs=1)
    [delta] = list(generation)
    assert (delta.text, delta.token_ids, delta.finish_reason) == ("", (), "length")
    assert [d.text for d in delta.prompt_scores] == list("Say: ")
    assert [d.logprob for d in delta.prompt_scores] == [None, -0.5, -0.5, -0.5, -0.5]
    assert delta.prompt_scores[1].top == ((97, "a", b"a", -0.5),)
    assert generation.usage == Usage(len(PROMPT), 0, 0)


def test_prompt_scores_come_with_the_first_piece_of_each_choice_only():
    deltas = list(begin(FakeEngine(say("世b")), n=2, prompt_logprobs=0, stream=True))
    for index in range(2):
        own = [delta for delta in deltas if delta.index == index]
        assert [delta.prompt_scores is not None for delta in own] == [True] + [False] * (
            len(own) - 1
        )


# --- several choices ------------------------------------------------------------------------------


def test_choices_are_in_order_of_prompts_and_come_interleaved():
    engine = FakeEngine(by_index("aa", "bb", "cc", "dd"), cached_tokens=1)
    generation = begin(engine, prompts=[[1, 2], [3, 4, 5]], n=2)
    deltas = list(generation)
    assert [delta.index for delta in deltas[:4]] == [0, 1, 2, 3]
    texts = ["".join(d.text for d in deltas if d.index == i) for i in range(4)]
    assert texts == ["aa", "bb", "cc", "dd"]
    assert [request.prompt_ids for request in engine.submitted[0]] == [[1, 2]] * 2 + [[3, 4, 5]] * 2
    assert generation.usage == Usage(prompt_tokens=5, completion_tokens=12, cached_tokens=2)


def test_choices_have_seeds_of_their_own_that_follow_the_seed():
    engine = FakeEngine()
    choices = complete(engine, prompts=[[1], [2]], n=3, seed=7)
    assert [r.params.seed for r in engine.submitted[0]] == [7, 8, 9, 7, 8, 9]
    assert len({choice.text for choice in choices}) == 6
    assert choices == complete(FakeEngine(), prompts=[[1], [2]], n=3, seed=7)


@pytest.mark.parametrize("seed", [2**63 - 1, -1])
def test_seeds_at_the_bounds_stay_within_them(seed):
    engine = FakeEngine()
    complete(engine, n=2, seed=seed)
    assert [r.params.seed for r in engine.submitted[0]] == [seed, 0]


def test_without_a_seed_none_is_made_up():
    engine = FakeEngine()
    complete(engine, n=2)
    assert [r.params.seed for r in engine.submitted[0]] == [None, None]


class ScriptedEngine(FakeEngine):
    """Gives each sequence one token with a logprob of its own."""

    def __init__(self, *logprobs):
        super().__init__(by_index(*"abcdefgh"[: len(logprobs)]))
        self.logprobs = logprobs

    def submit(self, requests, **options):
        stream = super().submit(requests, **options)
        put = [stream.get() for _ in range(2 * len(requests))]
        for output in put:
            score = TokenScore(output.token_id, self.logprobs[output.index])
            stream.put(
                TokenOutput(
                    index=output.index,
                    token_id=output.token_id,
                    score=score if output.score else None,
                    finish_reason=output.finish_reason,
                )
            )
        return stream


def test_of_best_of_the_most_likely_are_kept():
    engine = ScriptedEngine(-3.0, -1.0, -2.0, -1.0, -9.0, -0.5)
    generation = begin(engine, prompts=[[1], [2]], n=2, best_of=3)
    choices = collect(generation)
    assert [(choice.index, choice.text) for choice in choices] == [
        (0, "b"),
        (1, "c"),
        (2, "d"),
        (3, "f"),
    ]
    assert all(choice.logprobs == () for choice in choices), "they were not asked for"
    assert generation.usage.completion_tokens == 12, "also of those that were not kept"


def test_best_of_keeps_the_scores_that_were_asked_for():
    [choice] = complete(ScriptedEngine(-3.0, -1.0), best_of=2, logprobs=0)
    assert [detail.logprob for detail in choice.logprobs] == [-1.0]


@pytest.mark.parametrize(("n", "best_of", "stream"), [(1, 2, True), (3, 2, False)])
def test_best_of_cannot_be_streamed_or_less_than_n(n, best_of, stream):
    engine = FakeEngine()
    with pytest.raises(InvalidRequest) as caught:
        begin(engine, n=n, best_of=best_of, stream=stream)
    assert caught.value.param == "best_of"
    assert engine.submitted == []


def test_best_of_as_large_as_n_can_be_streamed():
    assert [d.text for d in begin(FakeEngine(say("a")), n=1, best_of=1, stream=True)] == ["a", ""]


# --- early ends -----------------------------------------------------------------------------------


def test_silence_is_told():
    gate = threading.Semaphore(0)
    generation = begin(FakeEngine(say("ab"), gate=gate), quiet_s=0.01)
    assert next(generation) is None
    gate.release()
    assert next(delta for delta in generation if delta is not None).text == "a"
    gate.release(2)
    assert [delta.text for delta in generation if delta is not None] == ["b", ""]


def test_an_error_of_one_choice_aborts_the_others_and_is_raised():
    class Breaking(FakeEngine):
        def submit(self, requests, **options):
            stream = super().submit(requests, **options)
            boom = TokenOutput(
                index=1, finish_reason=FinishReason.ERROR, error=EngineFailed("boom")
            )
            stream.put(boom)
            return stream

    gate = threading.Event()
    engine = Breaking(endless(), gate=gate)
    with pytest.raises(EngineFailed, match="boom"):
        list(begin(engine, n=2))
    assert engine.aborted == [None]
    engine.close()


def test_text_before_an_error_is_given():
    generation = begin(FakeEngine(say("abc"), error=EngineFailed("boom"), error_after=2))
    assert [next(generation).text, next(generation).text] == ["a", "b"]
    with pytest.raises(EngineFailed, match="boom"):
        next(generation)


def test_an_abort_by_somebody_else_is_an_error():
    engine = FakeEngine(endless(), gate=threading.Semaphore(2))
    generation = begin(engine)
    assert [next(generation).text, next(generation).text] == ["a", "b"]
    generation._stream.abort()  # as the engine does, when it ends its sequences
    with pytest.raises(ModelUnloaded):
        next(generation)


def test_a_closing_engine_is_told():
    engine = FakeEngine(endless(), gate=threading.Semaphore(1))
    generation = begin(engine)
    assert next(generation).text == "a"
    engine.close(ModelUnloaded("gone"))
    with pytest.raises(ModelUnloaded, match="gone"):
        next(generation)


def test_cancellation_ends_the_sequences_and_the_reading():
    cancellation = Cancellation()
    engine = FakeEngine(endless(), gate=threading.Semaphore(1))
    generation = begin(engine, n=2, cancellation=cancellation)
    assert next(generation).text == "a"
    reader_done = threading.Event()
    caught = []

    def read():
        try:
            next(generation)
        except ClientGone as error:
            caught.append(error)
        reader_done.set()

    threading.Thread(target=read, daemon=True).start()
    cancellation.cancel()
    assert reader_done.wait(PATIENCE_S)
    assert len(caught) == 1
    assert engine.aborted == [None]
    engine.close()
    assert engine.stats().running == 0


def test_nothing_is_submitted_for_a_client_that_has_left():
    engine, cancellation = FakeEngine(), Cancellation()
    cancellation.cancel()
    with pytest.raises(ClientGone):
        begin(engine, cancellation=cancellation)
    assert engine.submitted == []


def test_closing_before_the_end_aborts_and_closing_after_does_not():
    gate = threading.Semaphore(1)
    engine = FakeEngine(endless(), gate=gate)
    generation = begin(engine)
    next(generation)
    generation.close()
    assert engine.aborted == [None]
    with pytest.raises(ClientGone):
        next(generation)

    engine = FakeEngine(say("a"))
    generation = begin(engine)
    list(generation)
    generation.close()
    assert engine.aborted == []
    assert list(generation) == []


def test_closing_before_the_first_piece_aborts():
    engine = FakeEngine(endless(), gate=threading.Event())
    begin(engine).close()
    assert engine.aborted == [None]
    engine.close()


def test_what_the_engine_refuses_is_raised_at_the_start():
    with pytest.raises(Overloaded):
        begin(FakeEngine(refusal=Overloaded("full")))
