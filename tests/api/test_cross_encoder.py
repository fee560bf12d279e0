"""/v1/rerank and /v1/score with cross encoders: tiny random ones, whole, against transformers."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from tests import tokenizers
from tests.fakes import FakeEngine, fake_model
from transformers_api.api.http.services import EXTENSION
from transformers_api.app import create_app
from transformers_api.config.settings import Settings
from transformers_api.errors import ClientGone
from transformers_api.serving import pairs
from transformers_api.serving.limits.cancellation import Cancellation

WINDOW = 48
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.5,  # scores that differ
    "vocab_size": 300,
}
BERT = (BertConfig, BertForSequenceClassification, {"max_position_embeddings": WINDOW})
IDENTITY = {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}
MODELS = {
    "bert": (*BERT, {}),
    "logits": (*BERT, IDENTITY),
    "roberta": (
        *(RobertaConfig, RobertaForSequenceClassification),
        {"max_position_embeddings": WINDOW + 2, "pad_token_id": 1},
        {},
    ),
    "unpadded": (
        *(LlamaConfig, LlamaForSequenceClassification),
        {"max_position_embeddings": WINDOW},
        {},
    ),
}
QUERY = "the world"
DOCUMENTS = ["hello", "a cat naps on the sofa", "the", "x", "hello world " * 9, "é ü"]


def framed(has_types: bool):
    """A tokenizer that puts two texts between special tokens, and says which is which."""
    tokenizer = tokenizers.byte_level(chat_template=None)
    start, end = "<|im_start|>", "<|im_end|>"
    kinds = ("0", "1") if has_types else ("0", "0")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}",
        pair=f"{start}:0 $A:0 {end}:0 $B:{kinds[1]} {end}:{kinds[1]}",
        special_tokens=[(start, tokenizers.IM_START), (end, tokenizers.IM_END)],
    )
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    if has_types:
        tokenizer.model_input_names.append("token_type_ids")
    return tokenizer


def saved(folder, labels, config_type, model_type, options, more):
    torch.manual_seed(1)
    model = model_type(config_type(**SHAPE, **options, num_labels=labels))
    model.save_pretrained(folder)
    framed(config_type is BertConfig).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | more))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scoring")
    made = {name: saved(folder / name, 1, *parts) for name, parts in MODELS.items()}
    made["three"] = saved(folder / "three", 3, *MODELS["bert"])
    made["two"] = saved(folder / "two", 2, *MODELS["bert"])
    tanh = {"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Tanh"}}
    made["tanh"] = saved(folder / "tanh", 1, *BERT, tanh)
    return made


@pytest.fixture(scope="module")
def whole(tmp_path_factory, folders):
    folder = tmp_path_factory.mktemp("models")
    entries = [
        {"name": name, "path": str(path), "embedding": "cross_encoder"}
        for name, path in folders.items()
    ]
    (folder / "models.json").write_text(json.dumps(entries))
    app = create_app(
        Settings(
            preload_model=False,
            enable_embeddings_backend=True,
            model_registry_path=folder / "models.json",
            model_store=folder,
            hf_home=folder,
            allow_download=False,
            torch_threads=1,
            max_inflight=2,
            kv_cache_gib=0.01,
            prefill_chunk=64,  # several slices
        )
    )
    yield app
    app.extensions[EXTENSION].drain(0.0)


@pytest.fixture
def ask(whole):
    def asked(route, status=200, **fields):
        response = whole.test_client().post(route, json=fields)
        assert response.status_code == status, response.json
        return response.json

    return asked


def by_transformers(folder, pairs, limit=WINDOW):
    """(Scores, tokens) of each pair alone, in plain forward passes."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scores, tokens = [], 0
    for pair in pairs:
        inputs = tokenizer(*pair, truncation="longest_first", max_length=limit, return_tensors="pt")
        with torch.inference_mode():
            logit = model(**inputs).logits[0, 0]
        scores.append((logit if folder.name == "logits" else logit.sigmoid()).item())
        tokens += inputs["input_ids"].numel()
    return scores, tokens


def near(scores):
    return pytest.approx(scores, abs=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_transformers_alone_and_in_company(ask, folders, name):
    expected, tokens = by_transformers(folders[name], [(QUERY, text) for text in DOCUMENTS])
    body = ask("/v1/rerank", model=name, query=QUERY, documents=DOCUMENTS)
    results = body["results"]
    scores = {result["index"]: result["relevance_score"] for result in results}
    assert [scores[index] for index in range(len(DOCUMENTS))] == near(expected)
    assert [*scores.values()] == sorted(scores.values(), reverse=True)
    assert (body["scoring"], body["usage"]["prompt_tokens"]) == ("cross_encoder", tokens)
    assert max(expected) - min(expected) > 1e-3
    for index in (0, 4):
        alone = ask("/score", model=name, text_1=QUERY, text_2=DOCUMENTS[index])
        assert alone["data"][0]["score"] == near(expected[index])
        assert alone["scoring"] == "cross_encoder"


@pytest.mark.parametrize("limit", [5, 6, 9, 14, 15, 47, 48, 4000])
@pytest.mark.parametrize("texts", [("a" * 20, "b" * 7), ("a" * 7, "b" * 20), ("a" * 60, "b" * 60)])
def test_pairs_are_cut_as_transformers_cuts_them(ask, folders, limit, texts):
    expected, tokens = by_transformers(folders["bert"], [texts], min(limit, WINDOW))
    fields = {"text_1": texts[0], "text_2": texts[1], "truncate_prompt_tokens": limit}
    body = ask("/v1/score", model="bert", **fields)
    assert body["data"][0]["score"] == near(expected[0])
    assert body["usage"]["total_tokens"] == tokens


def test_documents_are_cut_where_that_is_asked(ask):
    cut = {"query": QUERY, "documents": ["abcdef", "xy"], "max_tokens_per_doc": 3}
    plain = {"query": QUERY, "documents": ["abc", "xy"]}
    short, same = (ask("/rerank", model="bert", **fields) for fields in (cut, plain))
    assert short["usage"] == same["usage"]
    scores = [[r["relevance_score"] for r in body["results"]] for body in (short, same)]
    assert scores[0] == scores[1]


def test_many_with_as_many_are_pairs_in_their_order(ask, folders):
    firsts, seconds = ["a", "the cat", "sofa " * 20], ["xyz " * 20, "b", "world"]
    expected, _ = by_transformers(folders["bert"], list(zip(firsts, seconds, strict=True)))
    body = ask("/v1/score", model="bert", text_1=firsts, text_2=seconds)
    assert [item["score"] for item in body["data"]] == near(expected)


def test_logits_stay_where_the_files_say_so(ask):
    fields = {"query": QUERY, "documents": DOCUMENTS}
    logits, scores = (
        {r["index"]: r["relevance_score"] for r in ask("/rerank", model=n, **fields)["results"]}
        for n in ("logits", "bert")
    )
    assert [torch.tensor(logits[i]).sigmoid().item() for i in scores] == near([*scores.values()])


@pytest.mark.parametrize(
    ("route", "fields"),
    [
        ("/v1/embeddings", {"input": "Hi"}),
        ("/api/embed", {"input": "Hi"}),
        ("/api/embeddings", {"prompt": "Hi"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
    ],
)
def test_a_cross_encoder_makes_neither_vectors_nor_text(ask, route, fields):
    error = ask(route, 400, model="bert", **fields)["error"]
    message = error if isinstance(error, str) else error["message"]
    assert "cross encoder" in message or "makes scores" in message


@pytest.mark.parametrize(("name", "labels"), [("two", 2), ("three", 3)])
def test_more_labels_than_one_are_a_400_and_listed_as_such(ask, whole, name, labels):
    error = ask("/v1/rerank", 400, model=name, query="a", documents=["b"])["error"]
    assert f"has {labels} labels" in error["message"]
    assert error["code"] == "model_not_servable"
    listed = whole.test_client().get(f"/v1/models/{name}").json
    assert (listed["servable"], listed["capabilities"]) == (False, [])


def test_another_activation_is_refused(ask):
    error = ask("/v1/rerank", 503, model="tanh", query="a", documents=["b"])["error"]
    assert "Tanh" in error["message"]


def test_a_pair_needs_room_for_its_special_tokens(ask):
    fields = {"model": "bert", "query": "a", "documents": ["b"], "truncate_prompt_tokens": 4}
    error = ask("/v1/rerank", 400, **fields)["error"]
    assert error["param"] == "truncate_prompt_tokens"
    assert "at least 5 tokens" in error["message"]


def test_a_request_has_at_most_256_documents(ask):
    most = ask("/v1/rerank", model="bert", query="a", documents=["b"] * 256, top_n=2)
    assert [result["index"] for result in most["results"]] == [0, 1]
    error = ask("/v1/rerank", 400, model="bert", query="a", documents=["b"] * 257)["error"]
    assert error["param"] == "documents"


class Leaving:
    """A scorer whose client leaves after its first slice."""

    slice_tokens = 8

    def __init__(self):
        self.cancellation, self.slices = Cancellation(), 0

    def score(self, pairs):
        self.slices += 1
        self.cancellation.cancel()
        return [0.5] * len(pairs)


def test_no_slice_is_read_for_a_client_that_has_left():
    scorer = Leaving()
    model = fake_model(engine=FakeEngine(), scorer=scorer)
    with pytest.raises(ClientGone):
        pairs.score(model, [([1] * 8, [])] * 3, scorer.cancellation)
    assert scorer.slices == 1


def test_a_cross_encoder_is_listed_with_what_it_can(whole):
    listed = whole.test_client().get("/v1/models/bert").json
    assert (listed["capabilities"], listed["context_length"]) == (["rerank"], WINDOW)
