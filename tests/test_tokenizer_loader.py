from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer

from tests.tokenizers import byte_level
from transformers_api.serving.models.spec import ModelFiles, ModelSpec, PathSource
from transformers_api.tokenizer_loader import read_tokenizer


@pytest.fixture
def folder(tmp_path):
    tokenizer = byte_level(("hello", "wörld"))
    tokenizer.add_tokens(["plain"])
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def loaded(folder):
    spec = ModelSpec(name="m", source=PathSource(folder))
    sizes = {"weight_bytes": 0, "parameters": 0, "created": 0}
    files = ModelFiles(folder=folder, stored_dtype="float32", **sizes)
    return read_tokenizer(spec, files)


def read(folder):
    return loaded(folder).tokenizer


def change(file, **fields):
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | fields))


def same(one, other):
    text = one.backend_tokenizer.to_str(), one.init_kwargs, repr(one)
    return text == (other.backend_tokenizer.to_str(), other.init_kwargs, repr(other))


def test_a_tokenizer_is_the_one_that_transformers_reads(folder):
    tokenizer = read(folder)
    assert same(tokenizer, AutoTokenizer.from_pretrained(folder))
    assert {token.content for token in tokenizer.added_tokens_decoder.values()} >= {"plain"}


def test_its_file_may_have_its_parts_in_any_order(folder):
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(dict(reversed(content.items())), indent=3))
    assert same(read(folder), AutoTokenizer.from_pretrained(folder))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("added_tokens.json", {"<more>": 300}),
        ("special_tokens_map.json", {"eos_token": "<|endoftext|>"}),
    ],
)
def test_what_other_files_say_of_its_tokens_is_heard(folder, name, content):
    (folder / name).write_text(json.dumps(content))
    assert same(read(folder), AutoTokenizer.from_pretrained(folder))


def test_what_its_configuration_says_of_its_tokens_is_heard(folder):
    token = {"content": "<|im_start|>", "special": True, "lstrip": True}
    change(folder / "tokenizer_config.json", added_tokens_decoder={"256": token})
    assert same(read(folder), AutoTokenizer.from_pretrained(folder))


@pytest.mark.parametrize("highest", [None, 300, 1000])
def test_its_size_is_one_more_than_the_largest_id_also_where_ids_have_gaps(folder, highest):
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    if highest is not None:
        first = next(token for token in content["added_tokens"] if token["content"] == "plain")
        content["added_tokens"].append(first | {"id": highest, "content": "far"})
        content["model"]["vocab"]["far"] = highest
        file.write_text(json.dumps(content))
    tokenizer, size = loaded(folder)
    assert size == max(tokenizer.get_vocab().values()) + 1
    assert highest is None or size == highest + 1
