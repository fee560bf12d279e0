"""Prompts that stand before texts to be embedded, chosen by a request."""

from __future__ import annotations

import struct
from typing import ClassVar

import pytest

from tests.api.test_embeddings import ask, vectors, with_encoder
from transformers_api.serving.models.spec import Prompts

PROMPTS = Prompts({"query": "Q: ", "passage": "P: ", "topic": "T: "}, default="topic")


class Skipping:
    """(tokens, first id, tokens of a prompt that are not pooled) of each row."""

    dimensions = 3
    slice_tokens = 64

    def embed(self, rows, dimensions=None, normalize=None, prompt_tokens=()):
        skipped = prompt_tokens or [0] * len(rows)
        return [
            struct.pack("<3f", len(row), row[0], n) for row, n in zip(rows, skipped, strict=True)
        ]


@pytest.fixture
def embedding(serve):
    yield from with_encoder(serve, prompts=PROMPTS)


@pytest.mark.parametrize(
    ("fields", "first", "count"),
    [
        ({}, "T", 5),
        ({"prompt_name": "query"}, "Q", 5),
        ({"prompt_name": "passage"}, "P", 5),
        ({"input_type": "query"}, "Q", 5),
        ({"input_type": "search_query"}, "Q", 5),
        ({"input_type": "passage"}, "P", 5),
        ({"input_type": "document"}, "P", 5),
        ({"input_type": "search_document"}, "P", 5),
        ({"input_type": "topic"}, "T", 5),
        ({"prompt_name": None, "input_type": None}, "T", 5),
    ],
)
def test_a_request_says_what_stands_before_its_texts(embedding, fields, first, count):
    assert vectors(ask(embedding, ["Hi", "Ho"], **fields)) == [[count, ord(first), 0]] * 2


def test_token_ids_have_no_prompt(embedding):
    assert vectors(ask(embedding, [[7, 8]], input_type="query")) == [[2, 7, 0]]


@pytest.mark.parametrize(
    ("fields", "param", "text"),
    [
        ({"prompt_name": "answer"}, "prompt_name", "query, passage, topic"),
        ({"input_type": "image"}, "input_type", "query, passage, topic, search_query, document"),
        ({"prompt_name": "query", "input_type": "query"}, "input_type", "exclude each other"),
        ({"prompt_name": 5}, "prompt_name", "string"),
    ],
)
def test_a_prompt_that_the_model_lacks_is_a_400_with_those_that_it_has(
    embedding, fields, param, text
):
    response = ask(embedding, "Hi", **fields)
    assert response.status_code == 400
    assert response.get_json()["error"]["param"] == param
    assert text in response.get_json()["error"]["message"]


def test_a_model_without_prompts_takes_either_side_of_a_search_and_no_name(serve):
    embedding = next(made := with_encoder(serve))
    assert vectors(ask(embedding, "Hi", input_type="query")) == [[2, ord("H"), 0]]
    answer = ask(embedding, "Hi", prompt_name="query")
    assert (answer.status_code, answer.get_json()["error"]["param"]) == (400, "prompt_name")
    made.close()


def test_a_prompt_is_counted_where_the_model_does_not_pool_it(serve):
    embedding = next(
        made := with_encoder(serve, prompts=PROMPTS, pools_prompts=False, embedder=Skipping())
    )
    assert vectors(ask(embedding, "Hi", prompt_name="query")) == [[5, ord("Q"), 3]]
    assert vectors(ask(embedding, [[7, 8]], prompt_name="query")) == [[2, 7, 0]]
    made.close()


def test_a_search_has_the_prompt_of_each_side_and_a_score_the_usual_one(serve):
    class Listening(Skipping):
        firsts: ClassVar[list[str]] = []

        def embed(self, rows, *options, **more):
            self.firsts += [chr(row[0]) for row in rows]
            return super().embed(rows, *options, **more)

    embedder = Listening()
    embedding = next(made := with_encoder(serve, prompts=PROMPTS, embedder=embedder))
    body = {"model": "vectors", "query": "Hi", "documents": ["Hi", "Ho"]}
    assert embedding.client.post("/v1/rerank", json=body).status_code == 200
    assert sorted(embedder.firsts) == ["P", "P", "Q"]
    embedder.firsts.clear()
    pair = {"model": "vectors", "text_1": "Hi", "text_2": "Ho"}
    assert embedding.client.post("/v1/score", json=pair).status_code == 200
    assert embedder.firsts == ["T", "T"]
    made.close()


@pytest.mark.parametrize(
    ("similarity", "expected"), [("dot", 36.0), ("euclidean", -6.0), ("manhattan", -6.0)]
)
def test_a_score_is_by_the_similarity_that_the_model_was_trained_for(serve, similarity, expected):
    class Simple(Skipping):
        def embed(self, rows, *_options, **_more):
            return [struct.pack("<2f", row[0] - 64, 3) for row in rows]

    embedding = next(made := with_encoder(serve, similarity=similarity, embedder=Simple()))
    pair = {"model": "vectors", "text_1": "C", "text_2": "I"}
    body = embedding.client.post("/v1/score", json=pair).get_json()
    assert body["scoring"] == similarity
    assert body["data"][0]["score"] == expected
    made.close()
