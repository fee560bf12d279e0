"""/inspect/* on a real model, against what transformers itself computes for the same tokens."""

from __future__ import annotations

import io
import json

import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests import tokenizers
from transformers_api.api.http.services import EXTENSION
from transformers_api.app import create_app
from transformers_api.config.settings import Settings

LAYERS, HEADS = 3, 4
PROMPT = "The capital of France is"
LONG = {"prompt": "abcdefgh" * 12}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = tokenizers.byte_level()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,  # rows that are not all alike
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "models.json").write_text(
        json.dumps([{"name": "tiny", "path": str(folder / "model")}])
    )
    return folder


@pytest.fixture(scope="module")
def app(folder):
    settings = Settings(
        model_registry_path=folder / "models.json",
        include_default_models=False,
        default_model="tiny",
        preload_model=False,
        model_store=folder / "store",
        hf_home=folder / "hub",
        torch_threads=1,
        rate_limit_per_min=0,
        prefill_chunk=16,  # slices of inspections have as many tokens
    )
    app = create_app(settings)
    yield app
    app.extensions[EXTENSION].swapper.close()


@pytest.fixture
def client(app):
    return app.test_client()


@pytest.fixture(scope="module")
def eager(folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "model", attn_implementation="eager")
    return model.eval()


def ask(client, route, body, accept="*/*"):
    response = client.post(f"/inspect/{route}", json=body, headers={"Accept": accept})
    assert response.status_code == 200, response.get_data(as_text=True)
    return response.get_json() if response.is_json else numpy.load(io.BytesIO(response.get_data()))


def run(eager, ids):
    with torch.inference_mode():
        return eager(torch.tensor([ids]), output_attentions=True, output_hidden_states=True)


@pytest.fixture(scope="module")
def completion(app):
    """The id of an answer, and its tokens."""
    body = {"prompt": PROMPT, "max_tokens": 20, "temperature": 1.0, "seed": 3}
    body |= {"return_token_ids": True, "ignore_eos": True}
    answer = app.test_client().post("/v1/completions", json=body).get_json()
    (choice,) = answer["choices"]
    return answer["id"], [*PROMPT.encode(), *choice["token_ids"]]


def test_the_model_is_verified_and_everything_is_available(client):
    found = client.get("/inspect/model").get_json()
    assert (found["attention"]["mode"], found["attention"]["verified"]) == ("tap", True)
    assert found["attention"]["max_rel_err"] < 1e-4
    assert found["lens"] == {"available": True, "final_norm": "model.norm", "exact": True}
    assert found["gradients"] is True
    assert (found["layers"], found["heads"], found["kv_heads"]) == (LAYERS, HEADS, 2)


def test_the_layer_that_is_suggested_is_the_one_that_reads_most(client, eager):
    text = "The capital of France is"  # the tokenizer has no template
    found = client.get("/inspect/model").get_json()["suggested_layer"]
    rows = [layer[0, :, -1].mean(0).numpy() for layer in run(eager, [*text.encode()]).attentions]
    word = slice(text.index("France"), text.index("France") + 6)
    scores = [row[word].sum() ** 2 / (1 - row[0]) for row in rows]
    assert found == numpy.argmax(scores)


def test_the_attention_of_what_was_written_is_that_of_eager(client, eager, completion):
    name, ids = completion
    reference = run(eager, ids).attentions
    for layer in range(LAYERS):
        body = {"completion_id": name, "trace_layer": layer, "head": "all"}
        found = ask(client, "full_attn", body, "application/x-npz")
        assert found["token_ids"].tolist() == ids
        assert numpy.allclose(found["attn"], reference[layer][0].numpy(), atol=5e-4)  # float16
        found = ask(client, "full_attn", {**body, "head": 3, "rows": [5, 25], "cols": [2, 9]})
        expected = reference[layer][0, 3, 5:25, 2:9].numpy()
        assert numpy.allclose(found["attn"], expected, atol=2e-5)


def test_what_is_generated_first_is_what_a_completion_would_say(client):
    options = {"max_tokens": 12, "temperature": 1.0, "seed": 9, "return_token_ids": True}
    answer = client.post("/v1/completions", json={"prompt": PROMPT, **options}).get_json()
    wrote = answer["choices"][0]["token_ids"]
    body = {"prompt": PROMPT, "max_new_tokens": 12, "temperature": 1.0, "seed": 9}
    found = ask(client, "full_attn", {**body, "trace_layer": 0, "head": 0})
    assert found["token_ids"] == [*PROMPT.encode(), *wrote]


def test_surprisal_is_that_of_the_models_own_logits(client, eager, completion):
    name, ids = completion
    found = ask(client, "tokens", {"completion_id": name, "logprobs": True, "topk": 2})
    logprobs = run(eager, ids).logits[0].log_softmax(-1)
    expected = [-logprobs[i - 1, token].item() for i, token in enumerate(ids) if i]
    assert numpy.allclose(found["surprisal"][1:], expected, atol=1e-4)
    likeliest = logprobs[:-1].argmax(-1).tolist()
    assert [top[0]["token_id"] for top in found["topk"][1:]] == likeliest
    assert [rank == 0 for rank in found["rank"][1:]] == [
        token == best for token, best in zip(ids[1:], likeliest, strict=True)
    ]


def test_the_lens_of_the_last_layer_is_the_models_own_choice(client, eager, completion):
    name, ids = completion
    body = {"completion_id": name, "positions": "all", "topk": 1}
    found = ask(client, "logit_lens", body)
    assert found["layers"] == list(range(-1, LAYERS))
    probs = run(eager, ids).logits[0].softmax(-1)
    best = [{"token_id": row[-1]["topk"][0]["token_id"]} for row in found["cells"]]
    assert best == [{"token_id": i} for i in probs.argmax(-1).tolist()]
    shown = [row[-1]["topk"][0]["prob"] for row in found["cells"]]
    assert numpy.allclose(shown, probs.max(-1).values, atol=1e-4)


def test_hidden_states_are_those_after_each_layer(client, eager, completion):
    name, ids = completion
    body = {"completion_id": name, "layers": [-1, 0, 1], "positions": "all"}
    found = ask(client, "hidden_states", body)["states"]
    states = run(eager, ids).hidden_states  # the last one is behind the final norm
    for place in range(3):
        assert numpy.allclose(found[place], states[place][0].numpy(), atol=1e-4)


def test_the_rollout_is_the_product_of_the_layers(client, eager, completion):
    name, ids = completion
    expected = numpy.eye(len(ids))
    for layer in run(eager, ids).attentions:
        expected = (0.5 * layer[0].mean(0).numpy() + 0.5 * numpy.eye(len(ids))) @ expected
    found = ask(client, "rollout", {"completion_id": name})
    assert found["layers"] == [0, LAYERS - 1]
    assert numpy.allclose(found["attn"], expected, atol=2e-5)


def test_the_grid_says_what_the_matrices_say(client, eager, completion):
    name, ids = completion
    found = ask(client, "heads", {"completion_id": name, "thumb": 4})
    full = run(eager, ids).attentions[1][0, 2].double().numpy()
    places = numpy.arange(len(ids))
    head = found["layers"][1]["heads"][2]
    assert head["first"] == pytest.approx(full[:, 0].mean(), abs=1e-4)
    assert head["self"] == pytest.approx(numpy.diag(full).mean(), abs=1e-4)
    apart = numpy.abs(places[:, None] - places[None])
    assert head["distance"] == pytest.approx((full * apart).sum(1).mean(), abs=1e-3)
    assert found["thumb"]["shape"] == [LAYERS, HEADS, 4, 4]


@pytest.mark.parametrize("method", ["occlusion", "gradient_x_input", "gradient_norm"])
def test_attribution_gives_a_score_for_each_token(client, eager, method):
    found = ask(client, "attribution", {"prompt": PROMPT, "method": method})
    logprobs = run(eager, list(PROMPT.encode())).logits[0, -1].log_softmax(-1)
    target = found["target"]
    assert target["token_id"] == logprobs.argmax().item()
    assert target["logprob"] == pytest.approx(logprobs.max().item(), abs=1e-4)
    assert len(found["scores"]) == len(PROMPT)
    assert any(found["scores"])


def test_integrated_gradients_say_what_they_leave_unexplained(client):
    body = {"prompt": PROMPT, "method": "integrated_gradients", "steps": 4}
    assert ask(client, "attribution", body)["convergence_delta"] is not None


def test_an_answer_goes_on_between_the_slices_of_an_inspection_and_stays_the_same(app, client):
    body = {"prompt": PROMPT, "max_tokens": 400, "temperature": 0, "ignore_eos": True}
    alone = client.post("/v1/completions", json=body).get_json()["choices"][0]["text"]
    grid = ask(client, "heads", {**LONG, "thumb": 2})
    services = app.extensions[EXTENSION]
    with services.swapper.lease(services.registry.resolve("tiny")) as lease:
        stats = lease.model.engine.stats
        stream = client.post("/v1/completions", json={**body, "stream": True})
        events = iter(stream.response)
        first = next(events)
        before = stats().steps
        assert ask(app.test_client(), "heads", {**LONG, "thumb": 2}) == grid
        assert stats().running == 1, "it was over too soon to show anything"
        assert stats().steps - before >= 5  # 96 tokens in slices of 16
        frames = (first + b"".join(events)).decode().split("\n\n")
        stream.close()
    pieces = [json.loads(frame[6:]) for frame in frames if frame.startswith("data: {")]
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == alone


def test_nothing_is_left_behind(app):
    status = app.extensions[EXTENSION].swapper.status()
    assert status.leases == 0


PAIRS = [
    {"positive": "I feel calm.", "negative": "I feel angry!"},
    {"positive": "A quiet day", "negative": "A furious day"},
    {"positive": "Softly, softly", "negative": "Now, now, now"},
]


@pytest.mark.parametrize("at", ["last", "mean"])
def test_a_direction_of_pairs_is_the_mean_difference_of_their_streams(client, eager, at):
    answer = client.post("/inspect/vectors/calm/derive", json={"pairs": PAIRS, "at": at})
    assert answer.status_code in (200, 201), answer.get_data(as_text=True)
    derived = answer.get_json()

    def streams(text):
        ids = ask(client, "tokens", {"prompt": text})["token_ids"]
        hidden = torch.stack(run(eager, ids).hidden_states)[1:-1, 0]  # the last one is normed
        return hidden[:, -1] if at == "last" else hidden.mean(dim=1)

    expected = sum(streams(pair["positive"]) - streams(pair["negative"]) for pair in PAIRS) / 3
    vector = client.get("/inspect/vectors/calm").get_json()
    assert numpy.allclose(vector["vector"][: LAYERS - 1], expected, atol=1e-5)
    assert (vector["layers"], vector["source"], vector["model"]) == ([0, 1, 2], "pairs", "tiny")
    assert numpy.allclose(derived["scales"], 1)
    assert derived["best_layers"] == [0, 2]
    assert all(0 <= value <= 1 for value in vector["separation"])


def test_pairs_may_be_conversations_and_are_refused_by_name(client):
    said = [{"role": "user", "content": "hello"}]
    pairs = [{"positive": said, "negative": "goodbye"}, {"positive": "a", "negative": "b"}]
    url = "/inspect/vectors/pair/derive"
    answer = client.post(url, json={"pairs": pairs, "method": "pca", "layers": [2, 0]}).get_json()
    assert answer["layers"] == [2, 0]
    again = client.post(url, json={"pairs": pairs, "layers": [1, 1, 0, 1]}).get_json()
    assert again["layers"] == [1, 0]
    assert numpy.allclose(answer["norms"], 1)
    refusals = {
        "pairs": [{"pairs": pairs[:1]}, {"pairs": [{"positive": "a"}, pairs[1]]}],
        "layers": [{"pairs": pairs, "layers": layers} for layers in ([3], [-1], [0, -1])],
        "pairs[1].negative": [{"pairs": [pairs[0], {"positive": "a", "negative": ""}]}],
    }
    for param, bodies in refusals.items():
        for body in bodies:
            refused = client.post(url, json=body)
            assert refused.status_code == 422
            assert param in refused.get_json()["detail"]


@pytest.mark.parametrize("by", ["layer", "head", "neuron", "source"])
def test_a_logit_is_the_sum_of_its_parts(client, eager, by):
    body = {"prompt": PROMPT, "by": by, "against": "mean", "topk": 7}
    answer = ask(client, "logit_parts", body)
    ids = ask(client, "tokens", {"prompt": PROMPT})["token_ids"]
    logits = run(eager, ids).logits[0, -1]
    assert answer["target"]["token_id"] == int(logits.argmax())
    assert answer["target"]["position"] == len(ids) - 1
    assert answer["logit"] == pytest.approx(float(logits.max() - logits.mean()), abs=1e-4)
    assert answer["verified_rel"] < 1e-5
    parts = sum(part["value"] for part in answer["parts"])
    total = parts + answer["rest"] + answer["constant"] + answer["rounding"]
    assert total == pytest.approx(answer["logit"], abs=1e-4)
    assert len(answer["parts"]) == 7
    assert answer["count"] >= 7
    if by == "source":
        assert len(answer["by_token"]) == len(ids)
        read = [part for part in answer["parts"] if part["part"] == "source"]
        assert read[0]["token"] in PROMPT


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"position": 99}, "position must be in [-24, 23]"),
        ({"token": 10**6}, "token must be in [0, "),
        ({"against": -1}, "against must be in [0, "),
        ({"against": "median"}, 'must be "mean" or a token id'),
        ({"by": "expert"}, "by must be one of"),
        ({"topk": 0}, "topk must be an integer from 1 to 4 096"),
    ],
)
def test_a_logit_that_cannot_be_taken_apart_is_refused_by_name(client, body, message):
    refused = client.post("/inspect/logit_parts", json={"prompt": PROMPT, **body})
    assert refused.status_code == 422
    assert message in refused.get_json()["detail"]


def test_a_grid_leads_from_one_prompt_to_the_other(client):
    body = {"clean": "The capital of France is", "corrupt": "The capital of Israel is"}
    grid = ask(client, "patch", {**body, "positions": [-1, 0], "metric": "logprob"})
    assert (grid["layers"], grid["positions"]) == ([0, 1, 2], [23, 0])
    assert grid["tokens"] == ["s", "T"]
    assert grid["grid"][2][0] == pytest.approx(1, abs=1e-3)  # the last layer, where it is read
    assert [row[1] for row in grid["grid"]] == pytest.approx([0, 0, 0], abs=1e-3)  # as in both
    assert grid["against"] is None
    heads = ask(client, "patch", {**body, "part": "head", "layers": [1], "answer": 65})
    assert len(heads["grid"]) == 1
    assert len(heads["grid"][0]) == HEADS
    assert heads["answer"] == {"token_id": 65, "token": "A"}


def test_what_is_missed_is_the_metric_less_that_without_the_part(client):
    missed = ask(client, "ablate", {"prompt": PROMPT, "part": "mlp", "layers": [1]})
    (edit,) = [{"do": "ablate", "part": "mlp", "layer": 1}]
    ids = ask(client, "tokens", {"prompt": PROMPT})["token_ids"]
    body = {"token_ids": [*ids, missed["answer"]["token_id"]], "logprobs": True}
    plain = ask(client, "tokens", body)["surprisal"][-1]
    without = ask(client, "tokens", {**body, "intervene": {"edits": [edit]}})["surprisal"][-1]
    assert missed["plain"] == pytest.approx(-plain, abs=1e-4)
    assert missed["grid"][0][0] == pytest.approx(without - plain, abs=1e-4)


@pytest.mark.parametrize(
    ("route", "body", "message"),
    [
        ("patch", {"clean": "abc", "corrupt": "ab"}, "prompts have 3 and 2 tokens"),
        ("patch", {"clean": "abc"}, "corrupt is required"),
        ("patch", {"clean": "", "corrupt": "a"}, "must be a text or a list of messages"),
        ("patch", {"clean": "ab", "corrupt": "ac", "layers": [-1]}, "layers must be in [0, 2]"),
        ("patch", {"clean": "ab", "corrupt": "ac", "positions": [2]}, "positions must be in"),
        ("patch", {"clean": "ab", "corrupt": "ac", "layer": [1]}, "did you mean 'layers'?"),
        ("ablate", {"prompt": "ab", "layers": [3]}, "layers must be in [-1, 2]"),
        ("ablate", {"prompt": "ab", "part": "resid"}, "part must be one of"),
        ("ablate", {"prompt": "ab", "answer": -1}, "answer must be in [0, "),
    ],
)
def test_a_grid_that_cannot_be_is_refused_by_name(client, route, body, message):
    refused = client.post(f"/inspect/{route}", json=body)
    assert refused.status_code == 422
    assert message in refused.get_json()["detail"]
