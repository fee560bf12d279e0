"""Steps that are captured once and repeated, with something on the CPU in the place of CUDA graphs.

It holds a step to what a graph holds it to: the addresses it was captured with, one result that
the next step overwrites. What only a GPU can show is at the end.
"""

from __future__ import annotations

import copy

import pytest
import torch

from tests import lora
from tests.engine.models import BATCHED, generate, prompts_of, tiny_model
from tests.engine.reading import GREEDY, ask, complete, read, tokens
from tests.repeats import slow
from transformers_api.engine.base import TokenStream
from transformers_api.engine.batch import Batch
from transformers_api.engine.llm_engine import BatchingEngine, EngineLimits
from transformers_api.engine.load_options import LoadOptions
from transformers_api.engine.pretrained import differentiable
from transformers_api.engine.runners.cuda_graphs import GraphRunner, PaddedCache
from transformers_api.engine.runners.edited_modules import ModuleEdit
from transformers_api.engine.runners.torch_backend import CudaGraphsBackend, TorchBackend
from transformers_api.engine.runners.verify import agrees
from transformers_api.engine.sequence import Sequence

LENGTHS = [9, 3, 14, 5, 7, 2, 11]
SLOTS = 4
PADDED = BATCHED.keys() - {"gpt-oss-sinks"}


class Graphs:
    """Captures; counts captures and repetitions."""

    def __init__(self) -> None:
        self.runner: GraphRunner | None = None
        self.captured = self.repeated = 0

    def __call__(self, step):
        result = step().clone()
        self.captured += 1
        addresses = self.runner.cache.addresses

        def repeat():
            assert self.runner.cache.addresses == addresses, "the graph writes to freed memory"
            self.repeated += 1
            return result.copy_(step())

        return repeat


@pytest.fixture
def graph_engine(engine_thread):
    """graph_engine(name, **limits): (an engine that repeats captured steps, its Graphs)."""
    engines = []

    def make(model="llama", **limits):
        def build():
            with differentiable():
                own = copy.deepcopy(tiny_model(model))
            graphs = Graphs()
            layers = own.config.get_text_config(decoder=True).num_hidden_layers
            graphs.runner = GraphRunner(own, PaddedCache(layers, SLOTS, 1024), 97, graphs)
            sizes = {"max_model_len": 1024, "vocab_size": 97, "num_slots": SLOTS} | limits
            facts = CudaGraphsBackend("cpu", LoadOptions()).describe(graphs.runner)
            engine = BatchingEngine(own, graphs.runner, EngineLimits(**sizes), engine_thread, facts)
            engine_thread.engines.append(engine)
            return engine, graphs

        engine, graphs = engine_thread.call(build).result()
        engines.append(engine)
        return engine, graphs

    yield make
    for engine in engines:
        engine.close()


@pytest.mark.parametrize("name", ["llama", "gemma3", *slow(*sorted(PADDED - {"llama", "gemma3"}))])
def test_padded_steps_give_what_generate_gives_for_each(graph_engine, name):
    engine, graphs = graph_engine(name)
    prompts = prompts_of(len(LENGTHS))
    requests = [ask(p, max_tokens=n, **GREEDY) for p, n in zip(prompts, LENGTHS, strict=True)]
    expected = [generate(tiny_model(name), p, n) for p, n in zip(prompts, LENGTHS, strict=True)]
    assert complete(engine, *requests) == expected
    assert graphs.repeated > 10


def test_rows_that_pad_leave_prompts_and_finished_rows_alone(graph_engine):
    engine, _ = graph_engine(prefill_chunk=2)
    prompts = prompts_of(3)
    prompts[2] = prompts[2] * 4  # it is still being read, in the row after those that decode
    requests = [ask(p, max_tokens=12, **GREEDY) for p in prompts]
    expected = [generate(tiny_model("llama"), p, 12) for p in prompts]
    assert complete(engine, *requests) == expected
    again = engine.stats().cached_tokens
    assert complete(engine, *requests[::-1]) == expected[::-1]  # from rows that were kept
    assert engine.stats().cached_tokens > again


def test_a_size_is_captured_once_and_again_only_when_the_cache_has_moved(graph_engine):
    engine, graphs = graph_engine()
    short, long = prompts_of(2)[0], prompts_of(2)[1] * 60
    for _ in range(3):
        complete(engine, ask(short, max_tokens=20, **GREEDY))
    assert graphs.captured == 1
    answers = complete(engine, ask(long[:300], max_tokens=5, **GREEDY))  # longer rows are needed
    assert graphs.captured == 2
    complete(engine, ask(short, max_tokens=20, **GREEDY))
    assert graphs.captured == 3  # the same size, at another place
    assert answers == [generate(tiny_model("llama"), long[:300], 5)]


def padded_steps(graphs, device="cpu"):
    """A runner and three sequences that have read their prompts: a step is padded to four."""
    model = copy.deepcopy(tiny_model("llama")).to(device)
    runner = GraphRunner(model, PaddedCache(3, SLOTS, 128), 97, graphs)
    runner.cache.reserve(SLOTS, 20)
    sequences = []
    for slot, prompt in enumerate(prompts_of(3)):
        stream = TokenStream(1, lambda _: None)
        seq = Sequence(ask(prompt), stream, 0, eos_token_ids=frozenset(), max_model_len=128)
        seq.slot = slot
        runner.forward(Batch([seq], [len(prompt) - 1]))
        seq.num_cached = len(prompt) - 1
        sequences.append(seq)
    return runner, sequences


@torch.inference_mode()
def test_a_watched_step_is_the_same_padded_step_run_uncaptured():
    """The same shapes, so the same bits on any processor; three sequences are padded to four."""
    graphs = Graphs()
    graphs.runner, sequences = padded_steps(graphs)
    runner = graphs.runner
    captured = runner.forward(Batch(sequences, [1] * len(sequences))).clone()
    repeated = graphs.repeated
    sequences[1].observe = {"trace": None}
    watched = runner.forward(Batch(sequences, [1] * len(sequences))).clone()
    assert graphs.repeated == repeated > 0
    assert torch.equal(watched, captured)
    sequences[1].observe = {}
    assert torch.equal(runner.forward(Batch(sequences, [1] * len(sequences))), captured)


def check_edited_step(runner, sequences):
    """Of a step whose second row is edited: that row alone is another, and only that time."""
    batch = Batch(sequences, [1] * len(sequences))
    plain = runner.forward(batch).clone()
    edit = ModuleEdit("model.layers.1", "out", lambda rows: rows[1].mul_(-2))
    options = LoadOptions()
    with TorchBackend(str(runner.model.device), options).editing(runner.model, [edit]):
        edited = runner.forward(batch).clone()
    assert torch.equal(edited[[0, 2]], plain[[0, 2]])
    assert not torch.allclose(edited[1], plain[1])
    assert torch.equal(runner.forward(batch), plain)


@torch.inference_mode()
def test_an_edited_step_is_run_uncaptured_and_changes_its_own_row_alone():
    graphs = Graphs()
    graphs.runner, sequences = padded_steps(graphs)
    check_edited_step(graphs.runner, sequences)
    assert graphs.repeated > 0


def test_a_watched_stream_has_the_tokens_of_one_that_is_not_and_its_scores(graph_engine):
    """To rounding: prompts are read in other shapes the second time, as parts of them are cached."""
    engine, graphs = graph_engine()
    prompts = prompts_of(3)
    requests = [ask(p, max_tokens=12, logprobs=1, temperature=1.0, seed=5) for p in prompts]

    def outputs(**options):
        by_index = read(engine.submit(requests, **options))
        return [output for index in sorted(by_index) for output in by_index[index] if output.score]

    plain, repeated = outputs(), graphs.repeated
    watched = outputs(observe={"trace": None})
    assert graphs.repeated == repeated > 0
    assert [o.token_id for o in watched] == [o.token_id for o in plain]
    for a, b in zip(watched, plain, strict=True):
        assert a.score.logprob == pytest.approx(b.score.logprob, abs=1e-4)


def test_steps_with_an_adapter_are_not_captured_and_change_no_neighbour(graph_engine, tmp_path):
    engine, graphs = graph_engine()
    prompts = prompts_of(3)
    requests = [ask(p, max_tokens=12, **GREEDY) for p in prompts]
    expected = [generate(tiny_model("llama"), p, 12) for p in prompts]
    adapted = engine.adapted(lora.source(lora.adapter(tmp_path, tiny_model("llama"))))
    alone = complete(adapted, requests[0])
    assert graphs.captured == 0
    streams = [adapted.submit(requests[:1]), engine.submit(requests)]
    assert [tokens(stream) for stream in streams] == [alone, expected]
    assert alone != expected[:1]
    assert complete(engine, *requests) == expected
    assert graphs.repeated > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_repeats_its_steps_as_graphs():
    model = copy.deepcopy(tiny_model("llama")).to("cuda")
    runner = GraphRunner(model, PaddedCache(3, SLOTS, 128), 97)
    with torch.inference_mode():
        assert agrees(runner, model, 97, 128)
    assert runner.num_captured == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.inference_mode()
def test_an_edited_step_on_a_gpu_repeats_no_graph():
    runner, sequences = padded_steps(None, "cuda")
    check_edited_step(runner, sequences)
    assert runner.num_captured > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", sorted(PADDED))
def test_a_gpu_gives_what_generate_gives_alone_and_in_company(make_engine, name):
    engine = make_engine(name, device="cuda", native=None)
    prompts = prompts_of(len(LENGTHS))
    requests = [ask(p, max_tokens=n, **GREEDY) for p, n in zip(prompts, LENGTHS, strict=True)]
    model = copy.deepcopy(tiny_model(name)).to("cuda")
    expected = [generate(model, p, n) for p, n in zip(prompts, LENGTHS, strict=True)]
    assert complete(engine, *requests) == expected
    assert [complete(engine, request)[0] for request in requests] == expected
    assert engine.describe().mode == "batching"
