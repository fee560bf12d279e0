"""Vectors against plain forward passes of transformers, and what they cost those who decode."""

from __future__ import annotations

import copy
import functools
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from tests.engine.models import BATCHED, tiny_model
from tests.engine.reading import ask
from transformers_api.engine import embedding
from transformers_api.engine.base import SamplingParams, SequenceRequest
from transformers_api.engine.embedding import EncoderEngine, Line, PooledEmbedder
from transformers_api.engine.encoder import load_encoder
from transformers_api.engine.load_options import LoadOptions
from transformers_api.engine.pooling import Reduction
from transformers_api.errors import ModelLoadFailed, ModelNotCapable, ModelUnloaded

SIZE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
ENCODERS = {
    "bert": lambda: tf.BertConfig(**SIZE),
    "roberta": lambda: tf.RobertaConfig(**SIZE, pad_token_id=1),
    "mpnet": lambda: tf.MPNetConfig(**SIZE, pad_token_id=1),
    "distilbert": lambda: tf.DistilBertConfig(
        vocab_size=97, dim=32, hidden_dim=64, n_layers=2, n_heads=4, max_position_embeddings=64
    ),
    "modernbert": lambda: tf.ModernBertConfig(**SIZE, pad_token_id=0),
    "qwen3": lambda: tf.Qwen3Config(**SIZE, head_dim=8, num_key_value_heads=2),
}
ROWS = [[5, 6, 7], [8] * 12, list(range(20, 50)), [9]]


@functools.cache
def tiny_encoder(name):
    torch.manual_seed(0)
    return tf.AutoModel.from_config(ENCODERS[name]()).eval()


def numbers(vectors):
    return torch.stack([torch.frombuffer(bytearray(v), dtype=torch.float32) for v in vectors])


def plain(model, row, mode, normalize):
    """One text in one forward pass, without padding or a mask."""
    with torch.inference_mode():
        hidden = model.base_model(input_ids=torch.tensor([row])).last_hidden_state[0]
    vector = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[mode]
    return torch.nn.functional.normalize(vector, dim=0) if normalize else vector


def encoder_of(thread, name, mode="mean", normalize=True):
    engine = EncoderEngine(copy.deepcopy(tiny_encoder(name)), 64, thread)
    return PooledEmbedder(engine, Reduction(mode, normalize), 64, reads_in_chunks=False)


def causal(engine, mode="mean", normalize=True, slice_tokens=8):
    return PooledEmbedder(
        engine,
        Reduction(mode, normalize),
        slice_tokens,
        reads_in_chunks=engine.describe().mode == "batching",
    )


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("mode", ["mean", "cls", "last"])
def test_vectors_are_the_pooled_states_of_transformers_whoever_pads_them(engine_thread, name, mode):
    embedder = encoder_of(engine_thread, name, mode)
    wanted = torch.stack([plain(tiny_encoder(name), row, mode, True) for row in ROWS])
    torch.testing.assert_close(numbers(embedder.embed(ROWS)), wanted, atol=1e-5, rtol=0)
    alone = torch.cat([numbers(embedder.embed([row])) for row in ROWS])
    torch.testing.assert_close(alone, wanted, atol=1e-5, rtol=0)
    assert embedder.dimensions == 32


def test_without_normalisation_vectors_keep_their_length(engine_thread):
    embedder = encoder_of(engine_thread, "bert", normalize=False)
    wanted = torch.stack([plain(tiny_encoder("bert"), row, "mean", False) for row in ROWS])
    torch.testing.assert_close(numbers(embedder.embed(ROWS)), wanted, atol=1e-5, rtol=0)
    assert (wanted.norm(dim=1) - 1).abs().min() > 0.1


@pytest.mark.parametrize("normalize", [False, True])
def test_a_request_says_whether_vectors_have_length_one(engine_thread, normalize):
    other = encoder_of(engine_thread, "bert", normalize=not normalize)
    same = encoder_of(engine_thread, "bert", normalize=normalize)
    assert other.embed(ROWS[:1], normalize=normalize) == same.embed(ROWS[:1])
    assert other.embed(ROWS[:1]) != same.embed(ROWS[:1])


def test_a_text_alone_has_the_same_bits_always_and_beside_others_nearly(engine_thread):
    embedder = encoder_of(engine_thread, "bert")
    beside = numbers(embedder.embed(ROWS))
    alone = [embedder.embed([row]) for row in ROWS]
    embedder.embed(ROWS[::-1])
    assert [embedder.embed([row]) for row in ROWS] == alone
    assert (torch.cat(list(map(numbers, alone))) - beside).abs().max() <= 1e-6


def test_fewer_dimensions_are_the_first_ones_at_length_one(engine_thread):
    embedder = encoder_of(engine_thread, "bert")
    whole, cut = numbers(embedder.embed(ROWS)), numbers(embedder.embed(ROWS, dimensions=5))
    assert cut.shape == (4, 5)
    wanted = torch.nn.functional.normalize(whole[:, :5], dim=1)
    torch.testing.assert_close(cut, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", ["max", "mean_sqrt_len_tokens", "weightedmean", ("cls", "max")])
def test_pieces_of_a_long_text_pool_as_the_whole_of_it(make_engine, mode):
    engine, row = make_engine("llama"), list(range(20, 57))
    whole, pieces = causal(engine, mode, slice_tokens=64), causal(engine, mode, slice_tokens=8)
    torch.testing.assert_close(
        numbers(pieces.embed([row])), numbers(whole.embed([row])), atol=1e-5, rtol=0
    )
    assert whole.dimensions == (64 if isinstance(mode, tuple) else 32)


@pytest.mark.parametrize("name", [*BATCHED, "bloom-alibi", "gpt-1-without-cache"])
def test_a_causal_model_gives_its_last_states_long_texts_in_chunks(make_engine, name):
    engine = make_engine(name)
    for mode in ("mean", "cls", "last"):
        embedder = causal(engine, mode)
        wanted = torch.stack([plain(tiny_model(name), row, mode, True) for row in ROWS])
        alone = torch.cat([numbers(embedder.embed([row])) for row in ROWS])
        torch.testing.assert_close(alone, wanted, atol=1e-5, rtol=0)
        torch.testing.assert_close(numbers(embedder.embed(ROWS)), wanted, atol=1e-5, rtol=0)


def test_a_long_text_is_read_a_slice_per_visit(make_engine):
    engine = make_engine("llama")
    embedder = causal(engine, slice_tokens=8)
    visits = []
    call = engine.call
    embedder._engine = SimpleNamespace(call=lambda visit: visits.append(1) or call(visit))
    embedder.embed([list(range(3, 33))])
    assert len(visits) == 4 + 1  # 30 tokens; and the pooling


def test_decoding_goes_on_between_the_slices(make_engine):
    engine = make_engine("llama")
    embedder = causal(engine)
    stream = engine.submit([ask([3, 4, 5], max_tokens=100, ignore_eos=True)])
    slices = 0
    while slices == 0 or engine.stats().running:
        embedder.embed([[5, 6, 7]])
        slices += 1
        assert slices < 2000, "the embeddings keep the engine from decoding"
    assert sum(output.token_id is not None for output in stream.read()) == 100


def test_never_do_two_slices_lie_in_the_inbox_together(engine_thread):
    embedder = encoder_of(engine_thread, "bert")
    call, open_calls, most = embedder._engine.call, [], []

    def counted(visit):
        open_calls.append(1)
        most.append(len(open_calls))
        future = call(visit)
        future.add_done_callback(lambda _: open_calls.pop())
        return future

    embedder._engine.call = counted
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda row: embedder.embed([row]), ROWS * 10))
    assert len(most) == 40
    assert max(most) == 1


def test_a_text_of_many_slices_lets_others_between():
    line, order = Line(), []
    waiting = threading.Event()

    def read(name, slices):
        for _ in range(slices):
            with line.turn():
                order.append(name)
                assert waiting.wait(30)

    with ThreadPoolExecutor(2) as pool:
        readings = [pool.submit(read, "long", 3)]
        while not order:
            pass
        readings.append(pool.submit(read, "short", 1))
        while len(line) < 2:
            pass
        waiting.set()
        for reading in readings:
            reading.result(30)
    assert order == ["long", "short", "long", "long"]


def test_a_closed_encoder_says_so_and_gives_its_model_away(engine_thread):
    embedder = encoder_of(engine_thread, "bert")
    engine = embedder._engine
    engine.close()
    engine.close()
    with pytest.raises(ModelUnloaded):
        embedder.embed([[5]])
    assert not hasattr(engine, "model")


def test_an_encoder_generates_nothing(engine_thread):
    engine = encoder_of(engine_thread, "bert")._engine
    with pytest.raises(ModelNotCapable):
        engine.submit([SequenceRequest([5], SamplingParams())])
    assert engine.stats().mode == "encoder"
    assert engine.vocab_size == 97


@pytest.fixture
def folder(tmp_path):
    tiny_encoder("bert").save_pretrained(tmp_path)
    return tmp_path


def load(folder, thread, **options):
    return thread.call(lambda: load_encoder(folder, LoadOptions(**options), thread)).result()


def edit_weights(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def test_an_encoder_is_loaded_from_its_folder_within_its_limits(folder, engine_thread):
    engine = load(folder, engine_thread, max_context_tokens=16)
    assert engine.max_model_len == 16
    assert load(folder, engine_thread).max_model_len == 64
    embedder = PooledEmbedder(engine, Reduction("mean", True), 64, reads_in_chunks=False)
    wanted = torch.stack([plain(tiny_encoder("bert"), row, "mean", True) for row in ROWS])
    torch.testing.assert_close(numbers(embedder.embed(ROWS)), wanted, atol=1e-5, rtol=0)


def test_a_missing_weight_is_named_but_the_pooler_is_not_needed(folder, engine_thread):
    edit_weights(folder, lambda weights: weights.pop("pooler.dense.weight"))
    edit_weights(folder, lambda weights: weights.update({"cls.extra": torch.zeros(2)}))
    load(folder, engine_thread)
    edit_weights(folder, lambda weights: weights.pop("encoder.layer.1.attention.self.query.weight"))
    with pytest.raises(ModelLoadFailed, match=r"layer\.1\.attention\.self\.query\.weight"):
        load(folder, engine_thread)


def test_a_folder_that_transformers_cannot_read_is_a_failed_load(folder, engine_thread):
    (folder / "config.json").write_text("{}")
    with pytest.raises(ModelLoadFailed, match="cannot be loaded"):
        load(folder, engine_thread)


def test_a_model_without_hidden_states_is_refused(engine_thread):
    class Silent(torch.nn.Module):
        config, device = SimpleNamespace(pad_token_id=None), torch.device("cpu")

        @property
        def base_model(self):
            return lambda **inputs: SimpleNamespace(logits=None)

    engine = SimpleNamespace(call=lambda visit: engine_thread.call(lambda: visit(Silent())))
    with pytest.raises(ModelNotCapable, match="Silent does not show its hidden states"):
        PooledEmbedder(engine, Reduction("mean", True), 8, reads_in_chunks=False)


def test_half_precision_is_pooled_in_float32():
    hidden = torch.randn(2, 40, 16).to(torch.bfloat16)
    model = SimpleNamespace(
        config=SimpleNamespace(pad_token_id=0),
        device=torch.device("cpu"),
        base_model=lambda **inputs: SimpleNamespace(last_hidden_state=hidden),
    )
    pooled = embedding._pooled(model, [[1] * 40, [1] * 40], Reduction("mean", False))
    torch.testing.assert_close(pooled, hidden.float().mean(1))
