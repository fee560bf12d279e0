"""/inspect/* on every kind of model: each question is answered, or refused for a reason."""

from __future__ import annotations

import io

import numpy
import pytest

from tests.engine.conftest import engine_thread  # noqa: F401
from tests.fakes import fake_model
from tests.inspection.conftest import running, watch  # noqa: F401
from tests.inspection.models import ALL
from tests.repeats import slow

IDS = {"token_ids": [5, 17, 33, 60, 61, 62, 17, 33, 8, 9, 10, 11]}
N = len(IDS["token_ids"])
METHODS = ("occlusion", "gradient_x_input", "gradient_norm", "integrated_gradients")
# What others show in the same way: llama, gpt2, mixtral, gemma3 and bloom.
REPEATS = (
    "gemma2",
    "gpt-neox",
    "gptj",
    "granite",
    "mpt-alibi",
    "olmo2",
    "opt",
    "phi",
    "qwen3",
    "qwen3-moe",
)
MODES = {"tap", "hook", "legacy", "none"}


@pytest.fixture(params=[*sorted(ALL.keys() - set(REPEATS)), *slow(*REPEATS)])
def looking(request, serve, watch):  # noqa: F811
    """An application whose model is a small one of this kind."""
    watched = watch(request.param)
    served = serve()
    fields = {"engine": watched.engine, "inspector": watched.inspector}
    served.loader.build = lambda spec: fake_model(spec, **fields)
    return served


def ask(served, route, fields):
    """The answer, or None where the model cannot."""
    response = served.client.post(f"/inspect/{route}", json={**IDS, **fields})
    if response.status_code == 200:
        return response.get_json() if response.is_json else response.get_data()
    said = response.get_json()
    assert response.status_code == 422, (route, said)
    assert said["code"] in ("attention_unavailable", "model_not_capable"), (route, said)
    return None


def test_every_question_is_answered_or_refused_for_a_reason(looking):
    told = looking.client.get("/inspect/model").get_json()
    layers, attention = told["attention"]["per_layer"], told["attention"]
    assert attention["mode"] in MODES
    shown = [layer["layer"] for layer in layers if layer["available"]]
    assert (attention["mode"] == "none") == (not shown)
    for layer in layers:
        check_matrix(looking, layer)
    assert (ask(looking, "heads", {"thumb": 4}) is None) == (not shown)
    assert (ask(looking, "rollout", {}) is None) == (len(shown) < len(layers))
    lens = ask(looking, "logit_lens", {"positions": "all", "topk": 2})
    assert (lens is None) == (not told["lens"]["available"])
    states = ask(looking, "hidden_states", {"positions": "all"})
    if states is not None:
        found = numpy.load(io.BytesIO(states))["states"]
        assert found.shape == (told["layers"] + 1, N, told["hidden_size"])
    read = ask(looking, "tokens", {"logprobs": True, "topk": 2})
    assert len(read["surprisal"]) == N
    for method in METHODS:
        scores = ask(looking, "attribution", {"method": method, "steps": 2})
        if method != "occlusion":
            assert (scores is None) == (not told["gradients"]), method
        if scores is not None:
            assert len(scores["scores"]) == N
    assert looking.swapper.status().leases == 0


def check_matrix(looking, layer):
    """Lower triangular, with rows that sum to 1 less what the head leaves unread."""
    fields = {"trace_layer": layer["layer"], "head": 0}
    found = ask(looking, "full_attn", fields)
    assert (found is None) == (not layer["available"])
    if found is None:
        return
    weights = numpy.array(found["attn"])
    assert weights.shape == (N, N)
    assert not numpy.triu(weights, 1).any()
    assert numpy.allclose(weights.sum(1) + numpy.array(found["sink"] or 0.0), 1, atol=1e-3)
    mean = ask(looking, "full_attn", {**fields, "head": "mean"})["attn"]
    assert numpy.shape(mean) == (N, N)
