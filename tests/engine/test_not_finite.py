"""Numbers that are not finite: an error for whoever asked, and nothing to anybody else."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf

from tests import lora
from tests.engine.models import generate, tiny_model
from tests.engine.reading import GREEDY, ask, read
from transformers_api.engine.cross_encoder import CrossEncoder
from transformers_api.engine.embedding import EncoderEngine, PooledEmbedder
from transformers_api.engine.pooling import Reduction
from transformers_api.errors import EngineFailed, ModelLoadFailed

PROMPT = [5, 9, 33, 71, 8, 2]
BROKEN = 95  # a token whose embedding is not finite
EVERY = ["c_attn", "c_proj", "c_fc"]


@pytest.fixture(params=["native", "torch"])
def kernels(request, native_default):
    if request.param == "native" and native_default is None:
        pytest.skip("no native kernels")
    return native_default if request.param == "native" else None


def spoiled(name="llama", value=float("nan")):
    model = copy.deepcopy(tiny_model(name))
    with torch.no_grad():
        model.get_input_embeddings().weight[BROKEN] = value
    return model


def outcomes(stream):
    """The tokens of each sequence, or its error."""
    return [
        outputs[-1].error or [output.token_id for output in outputs if output.token_id is not None]
        for outputs in read(stream).values()
    ]


@pytest.mark.parametrize(
    ("name", "layers", "alpha"),
    [
        ("llama", lora.ALL, 1e9),
        ("llama", ["gate_proj", "up_proj"], 1e9),
        ("gpt2", EVERY, -1e9),
        ("gpt-neox", ["dense_h_to_4h", "dense_4h_to_h"], 1e9),
        ("gemma2", ["up_proj", "down_proj"], 1e9),
    ],
)
def test_an_adapter_that_makes_too_large_numbers_fails_its_own_requests_only(
    make_engine, tmp_path, kernels, name, layers, alpha
):
    """Squares that are infinite make zeros in a norm, of which the head makes tokens."""
    model = tiny_model(name)
    engine = make_engine(name, native=kernels)
    parts = lora.matrices(model, lora.matching(model, layers), 4, seed=0)
    large = {path: (down * 100, up) for path, (down, up) in parts.items()}
    folder = lora.save(tmp_path / "own", large, lora_alpha=alpha)
    adapted = engine.adapted(lora.source(folder))
    streams = [
        each.submit([ask([*PROMPT, n], max_tokens=9, **GREEDY)])
        for n in range(3)
        for each in (engine, adapted)
    ]
    ended = [outcomes(stream)[0] for stream in streams]
    assert ended[::2] == [generate(model, [*PROMPT, n], 9) for n in range(3)]
    assert all(isinstance(error, EngineFailed) for error in ended[1::2])
    assert all("not finite" in error.message for error in ended[1::2])
    vectors = PooledEmbedder(engine, Reduction("mean", True), 64, reads_in_chunks=True)
    with pytest.raises(EngineFailed, match="not finite"):
        vectors.on(adapted).embed([PROMPT])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_prompt_that_is_scored_fails_wherever_its_scores_are_none(make_engine, kernels, value):
    engine = make_engine(spoiled("mistral-window-8", value), native=kernels)
    for at in (1, 20, 58):
        prompt = [*range(3, 63)]
        prompt[at] = BROKEN
        stream = engine.submit([ask(prompt, max_tokens=1, prompt_logprobs=0, **GREEDY)])
        assert isinstance(outcomes(stream)[0], EngineFailed)
    scored = ask(PROMPT, max_tokens=1, prompt_logprobs=0, **GREEDY)
    assert outcomes(engine.submit([scored])) == [
        generate(tiny_model("mistral-window-8"), PROMPT, 1)
    ]


@pytest.mark.parametrize("reads_in_chunks", [False, True])
def test_a_vector_that_is_not_finite_is_an_error(make_engine, reads_in_chunks):
    engine = make_engine(spoiled())
    vectors = PooledEmbedder(engine, Reduction("mean", True), 8, reads_in_chunks=reads_in_chunks)
    with pytest.raises(EngineFailed, match="not finite"):
        vectors.embed([[*PROMPT, BROKEN, *range(20)]])
    assert len(vectors.embed([PROMPT])) == 1


@pytest.mark.parametrize("sigmoid", [False, True])
def test_a_score_that_is_not_finite_is_an_error(engine_thread, sigmoid):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = tf.BertConfig(vocab_size=97, num_attention_heads=4, num_labels=1, **sizes)
    model = tf.BertForSequenceClassification(config).eval()
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[BROKEN] = float("nan")
    scorer = CrossEncoder(EncoderEngine(model, 64, engine_thread), 64, sigmoid=sigmoid)
    with pytest.raises(EngineFailed, match="not finite"):
        scorer.score([(PROMPT, []), ([*PROMPT, BROKEN], [])])
    assert len(scorer.score([(PROMPT, [])])) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["lm_head", "model.layers.1.mlp.down_proj"])
def test_a_model_whose_logits_are_never_finite_is_refused_for_that(
    make_engine, kernels, value, place
):
    model = copy.deepcopy(tiny_model("llama"))
    with torch.no_grad():
        model.get_submodule(place).weight[3, 5] = value
    with pytest.raises(ModelLoadFailed, match="logits are not finite"):
        make_engine(model, native=kernels)
