"""POST /v1/rerank and /v1/score: by fakes to the letter, and whole with the embedded encoder."""

from __future__ import annotations

import math
import struct

import pytest

from tests.api.test_embeddings import MINILM, OFF, embedding, tiny, whole
from transformers_api.serving import embeddings

__all__ = ["embedding", "tiny", "whole"]
RERANK = {"model": "vectors", "query": "Hi", "documents": ["AA", "Hi", {"text": "B"}]}
SCORE = {"model": "vectors", "text_1": "Hi", "text_2": ["Hi", "AA"]}


def answered(response):
    assert response.status_code == 200, response.json
    return response.json


def cosine(one, other):
    return embeddings.similarity(
        "cosine", *(struct.pack("<3f", *vector) for vector in (one, other))
    )


@pytest.mark.parametrize("route", ["/v1/rerank", "/rerank"])
def test_the_nearest_document_comes_first(embedding, route):
    body = answered(embedding.client.post(route, json=RERANK))
    query = (2, 72, 0)  # tokens, first id, none: as the fake has it
    near = {0: cosine(query, (2, 65, 0)), 1: 1.0, 2: cosine(query, (1, 66, 0))}
    order = sorted(near, key=lambda index: -near[index])
    assert [result["index"] for result in body["results"]] == order
    for result in body["results"]:
        assert result["relevance_score"] == pytest.approx(near[result["index"]])
    assert body["results"][0]["document"] == {"text": "Hi"}
    assert (body["scoring"], body["model"]) == ("cosine", "vectors")
    assert body["usage"] == {"prompt_tokens": 7, "total_tokens": 7}


def test_results_are_as_many_and_as_long_as_asked(embedding):
    for most, count in ((1, 1), (2, 2), (9, 3)):
        fields = {**RERANK, "top_n": most, "return_documents": False}
        results = answered(embedding.client.post("/rerank", json=fields))["results"]
        assert [set(result) for result in results] == [{"index", "relevance_score"}] * count


@pytest.mark.parametrize("route", ["/v1/score", "/score"])
def test_pairs_are_scored_in_their_order(embedding, route):
    body = answered(embedding.client.post(route, json=SCORE))
    scores = [item["score"] for item in body["data"]]
    assert scores == pytest.approx([1, cosine((2, 72, 0), (2, 65, 0))])
    assert [item["index"] for item in body["data"]] == [0, 1]
    assert (body["object"], body["scoring"]) == ("list", "cosine")
    pairs = {**SCORE, "text_1": ["AA", "Hi"]}
    crossed = answered(embedding.client.post(route, json=pairs))["data"]
    assert [item["score"] for item in crossed] == pytest.approx([scores[1], scores[1]])
    single = answered(embedding.client.post(route, json={**SCORE, "text_2": "Hi"}))["data"]
    assert [item["score"] for item in single] == pytest.approx([1])


def test_long_texts_are_cut_only_where_that_is_asked(embedding):
    long = {**RERANK, "documents": ["x", "x" * 33]}
    error = embedding.client.post("/rerank", json=long).json["error"]
    assert (error["param"], error["code"]) == ("documents[1]", "context_length_exceeded")
    for cut, tokens in (
        ({"truncate_prompt_tokens": -1}, 2 + 1 + 32),
        ({"truncate_prompt_tokens": 1}, 3),
        ({"max_tokens_per_doc": 4096}, 2 + 1 + 32),
        ({"max_tokens_per_doc": 5}, 2 + 1 + 5),
    ):
        body = answered(embedding.client.post("/rerank", json=long | cut))
        assert body["usage"]["prompt_tokens"] == tokens


@pytest.mark.parametrize(
    ("one", "other", "angle"),
    [((1, 0, 0), (-2, 0, 0), math.pi), ((3, 0, 0), (0, 4, 0), math.pi / 2), ((1, 1, 0), (5, 0, 0), math.pi / 4)],
)  # fmt: skip
def test_a_score_is_the_cosine_of_an_angle_whatever_the_lengths(one, other, angle):
    assert cosine(one, other) == pytest.approx(math.cos(angle), abs=1e-7)


def test_a_vector_of_zeros_is_near_nothing():
    assert cosine((0, 0, 0), (1, 2, 3)) == cosine((0, 0, 0), (0, 0, 0)) == 0


BAD = [
    ("rerank", {"query": None}, "query"),
    ("rerank", {"query": ""}, "query"),
    ("rerank", {"query": ["a"]}, "query"),
    ("rerank", {"query": "x" * 33}, "query"),
    ("rerank", {"documents": None}, "documents"),
    ("rerank", {"documents": []}, "documents"),
    ("rerank", {"documents": "a"}, "documents"),
    ("rerank", {"documents": ["a"] * 257}, "documents"),
    ("rerank", {"documents": ["a", 5]}, "documents[1]"),
    ("rerank", {"documents": ["a", {"title": "b"}]}, "documents[1]"),
    ("rerank", {"documents": ["a", ""]}, "documents[1]"),
    ("rerank", {"top_n": 0}, "top_n"),
    ("rerank", {"return_documents": 1}, "return_documents"),
    ("rerank", {"rank_fields": ["title"]}, "rank_fields"),
    ("rerank", {"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ("rerank", {"model": "fake"}, "model"),
    ("score", {"text_1": None}, "text_1"),
    ("score", {"text_1": []}, "text_1"),
    ("score", {"text_1": ["a", "b", "c"]}, "text_1"),
    ("score", {"text_2": ["a", 5]}, "text_2[1]"),
    ("score", {"text_2": ["a", "x" * 33]}, "text_2[1]"),
    ("score", {"text_2": ""}, "text_2"),
]


@pytest.mark.parametrize(("route", "fields", "name"), BAD)
def test_a_wrong_field_is_a_400_that_names_it(embedding, route, fields, name):
    right = RERANK if route == "rerank" else SCORE
    response = embedding.client.post(f"/v1/{route}", json={**right, **fields})
    assert response.status_code == 400, response.json
    assert response.json["error"]["param"] == name


def test_an_unknown_model_is_a_404_and_without_a_backend_all_is_a_501(embedding, serve):
    assert embedding.client.post("/rerank", json={**RERANK, "model": "none"}).status_code == 404
    for route in ("/v1/rerank", "/rerank", "/v1/score", "/score"):
        response = serve().client.post(route, json={})
        assert (response.status_code, response.json) == (501, OFF)


def test_the_embedded_encoder_puts_the_cat_first(whole):
    fields = {
        "model": MINILM,
        "query": "Where do cats sleep?",
        "documents": ["The stock market fell.", "A cat naps on the sofa.", "It rains."],
    }
    results = answered(whole.test_client().post("/v1/rerank", json=fields))["results"]
    assert results[0]["index"] == 1
    assert results[0]["relevance_score"] > 0.4 > 0.2 > results[1]["relevance_score"]
