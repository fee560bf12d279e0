"""Traces of real models, small and random, through the whole application."""

from __future__ import annotations

import base64
import json
import threading

import httpx2
import numpy
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.test_end_to_end import save_tiny
from transformers_api.app import create_app
from transformers_api.config.settings import Settings

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Größe?"}]
GREEDY = {"temperature": 0, "max_tokens": 12}
KINDS = ["llama", "gpt2"]
pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("traces")
    entries = [{"name": kind, "path": str(save_tiny(folder / kind, kind))} for kind in KINDS]
    (folder / "models.json").write_text(json.dumps(entries))
    return folder


@pytest.fixture(scope="module")
def app(folder):
    """Of gpt2 the default, of both one at a time."""
    settings = Settings(
        default_model="gpt2",
        preload_model=False,
        include_default_models=False,
        model_registry_path=folder / "models.json",
        model_store=folder / "store",
        hf_home=folder / "hub",
        torch_threads=1,
        swap_after_s=0.1,
    )
    app = create_app(settings)
    yield app
    app.extensions["transformers_api"].swapper.close()


@pytest.fixture(scope="module")
def sdk(app):
    with openai.OpenAI(
        base_url="http://testserver/v1",
        api_key="none",
        max_retries=0,
        http_client=httpx2.Client(transport=httpx2.WSGITransport(app)),
    ) as client:
        yield client


def ask(sdk, model, trace, **options):
    return sdk.chat.completions.create(
        model=model,
        messages=MESSAGES,
        extra_body={"trace": trace, "return_token_ids": True},
        **{**GREEDY, **options},
    )


def reference(folder, kind, ids):
    """What transformers itself says of ``ids``: attentions (L, H, n, n), logits (n, V)."""
    model = AutoModelForCausalLM.from_pretrained(folder / kind, attn_implementation="eager").eval()
    with torch.no_grad():
        seen = model(torch.tensor([ids]), output_attentions=True, output_hidden_states=True)
    attentions = torch.stack([layer[0] for layer in seen.attentions]).numpy()
    return attentions, seen.logits[0].double(), seen.hidden_states


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_is_that_of_transformers_itself(sdk, folder, kind):
    trace = {"layers": [0, 1], "attn": "json64", "topk": 3, "resid_norms": True}
    choice = ask(sdk, kind, trace).choices[0]
    prompt = choice.trace["header"]["prompt"]["token_ids"]
    written = choice.token_ids
    attentions, logits, hidden = reference(folder, kind, prompt + written)
    steps = choice.trace["steps"]
    assert [step["token_id"] for step in steps] == written[: len(steps)]
    for number, step in enumerate(steps):
        query = len(prompt) + number - 1  # predicts this token
        assert step["position"] == query + 1
        for layer, shown in enumerate(step["attn"]):
            assert (shown["layer"], shown["key_start"], shown["state"]) == (layer, 0, "exact")
            expected = attentions[layer, :, query, : query + 1]
            numpy.testing.assert_allclose(shown["weights"], expected, atol=2e-5)
        scores = logits[query].log_softmax(-1)
        assert step["logprob"] == pytest.approx(float(scores[step["token_id"]]), abs=1e-4)
        assert step["surprisal"] == -step["logprob"]
        assert step["entropy"] == pytest.approx(-float(scores.exp() @ scores), abs=1e-4)
        assert [top["token_id"] for top in step["topk"]] == scores.topk(3).indices.tolist()
        assert step["sampled"] == {"prob": 1.0, "entropy": 0.0}
        norm = float(hidden[1][0, query].norm())
        assert step["resid_norms"][0] == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampled", [{}, {"temperature": 1.3, "seed": 5, "n": 2}])
def test_an_answer_is_the_same_with_and_without_trace(sdk, kind, sampled):
    wishes = {
        "layers": "all",
        "heads": "mean",
        "topk": 20,
        "lens": {"layers": "all"},
        "resid_norms": True,
    }
    plain, traced = (ask(sdk, kind, trace, **sampled) for trace in (None, wishes))
    for one, other in zip(plain.choices, traced.choices, strict=True):
        assert one.message.content == other.message.content
        assert one.token_ids == other.token_ids
        assert len(other.trace["steps"]) >= len(other.token_ids) - 1


def test_a_stream_and_a_whole_answer_have_the_same_traces(sdk):
    trace = {"layers": [1], "attn": "f16", "lens": {"layers": [-1, 1], "topk": 2}}
    whole = ask(sdk, "gpt2", trace).choices[0].trace
    header, *steps = [
        chunk.trace for chunk in ask(sdk, "gpt2", trace, stream=True) if hasattr(chunk, "trace")
    ]
    assert header == whole["header"]
    assert steps == whole["steps"]
    shown = steps[0]["attn"][0]
    row = numpy.frombuffer(base64.b64decode(shown["data"]), "<f2").reshape(shown["shape"])
    assert row.astype(numpy.float64).sum(axis=1) == pytest.approx([1] * 4, abs=2e-3)
    assert [reading["layer"] for reading in steps[0]["lens"]] == [-1, 1]
    last = steps[0]["lens"][1]  # the last layer says what the model says
    assert (last["token_id"], last["rank_of_sampled"]) == (steps[0]["token_id"], 0)


def test_the_header_says_whose_words_the_prompt_has(sdk):
    prompt = ask(sdk, "gpt2", {}).choices[0].trace["header"]["prompt"]
    said = {
        span["role"]: bytes(prompt["token_ids"][span["start"] : span["end"]]).decode()
        for span in prompt["spans"]
    }
    assert said == {"system": "Be brief.", "user": "Größe?"}


def test_traced_answers_in_company_are_those_alone(sdk):
    trace = {"layers": [0], "attn": "json64", "topk": 2}
    alone = ask(sdk, "gpt2", trace).choices[0]
    answers = {}

    def run(name, **options):
        answers[name] = ask(sdk, "gpt2", **options).choices[0]

    threads = [
        threading.Thread(target=run, args=(i,), kwargs={"trace": trace if i < 2 else None})
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {answer.message.content for answer in answers.values()} == {alone.message.content}
    for i in (0, 1):
        for one, other in zip(alone.trace["steps"], answers[i].trace["steps"], strict=True):
            numpy.testing.assert_allclose(
                one["attn"][0]["weights"], other["attn"][0]["weights"], atol=2e-5
            )


def test_completions_trace_lists_of_prompts(sdk):
    answer = sdk.completions.create(
        model="llama",
        prompt=["Once", "Twice upon"],
        extra_body={"trace": {"layers": [1], "attn": "topk", "attn_topk": 2}},
        **GREEDY,
    )
    for choice, length in zip(answer.choices, (4, 10), strict=True):
        first = choice.trace["steps"][0]
        assert (first["position"], first["attn"][0]["shape"]) == (length, [4, length])
        assert [len(row) for row in first["attn"][0]["idx"]] == [2] * 4
