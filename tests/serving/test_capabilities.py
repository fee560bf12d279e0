"""What a model can do, told by its entry and its small files; nothing is loaded."""

import json

import pytest

from tests.fakes import fake_spec
from tests.model_folders import model_files, write_files
from transformers_api.serving.models.capabilities import (
    FileFacts,
    capabilities,
    context_length,
    read_facts,
)
from transformers_api.serving.models.spec import Pooling

WRITES = ["chat", "completion", "trace"]
PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %}"
WITH_TOOLS = PLAIN + "{% if tools %}{{ tools }}{% endif %}"
WITH_THOUGHT = PLAIN + "{% if enable_thinking is false %}<think></think>{% endif %}"


def able(spec=None, facts=None, **options):
    defaults = {"refused": False, "embeds": True, "inspects": True}
    return capabilities(spec or fake_spec(), facts or FileFacts(), **(defaults | options))


def folder(tmp_path, **files):
    """A folder whose other files are those of ``model_files``."""
    named = {name.replace("__", "."): content for name, content in files.items()}
    return write_files(tmp_path / "model", model_files() | named)


@pytest.mark.parametrize(
    ("spec", "options", "expected"),
    [
        (fake_spec(), {}, WRITES),
        (fake_spec(chat="off"), {}, ["completion", "trace"]),
        (fake_spec(chat="transcript"), {}, WRITES),
        (fake_spec(), {"inspects": False}, ["chat", "completion"]),
        (fake_spec(), {"refused": True}, []),
        (fake_spec(embedding="encoder"), {}, ["embedding", "rerank"]),
        (fake_spec(embedding="encoder"), {"embeds": False}, []),
        (fake_spec(embedding="cross_encoder"), {}, ["rerank"]),
        (fake_spec(embedding="cross_encoder"), {"embeds": False}, []),
        (fake_spec(embedding="cross_encoder"), {"refused": True}, []),
        (fake_spec(reasoning=("<t>", "</t>")), {}, ["chat", "completion", "reasoning", "trace"]),
        (
            fake_spec(reasoning=("", "</t>"), chat="transcript"),
            {},
            ["chat", "completion", "reasoning", "trace"],
        ),
        (fake_spec(reasoning=("", "</t>"), chat="off"), {}, ["completion", "trace"]),
        (
            fake_spec(embedding=Pooling("mean")),
            {},
            ["chat", "completion", "embedding", "rerank", "trace"],
        ),
        (fake_spec(embedding=Pooling("mean")), {"embeds": False}, WRITES),
    ],
)
def test_the_entry_says_much(spec, options, expected):
    assert able(spec, **options) == expected


def test_a_sentence_encoder_of_the_hub_is_known_by_its_files():
    spec, facts = fake_spec("owner/name", registered=False), FileFacts(is_encoder=True)
    assert able(spec, facts, refused=True) == ["embedding", "rerank"]
    assert able(fake_spec("named"), facts, refused=True) == []


@pytest.mark.parametrize(
    ("template", "more"),
    [
        (PLAIN, []),
        (WITH_TOOLS, ["tools"]),
        (WITH_THOUGHT, ["reasoning"]),
        (PLAIN + "{# [THINK] #}", ["reasoning"]),
        (PLAIN + "<|channel|>final", ["reasoning"]),
        (WITH_TOOLS + WITH_THOUGHT, ["tools", "reasoning"]),
        ("{{ toolset }}", []),
    ],
)
def test_the_template_shows_tools_and_thoughts(tmp_path, template, more):
    config = json.dumps({"chat_template": template}).encode()
    facts = read_facts(folder(tmp_path, tokenizer_config__json=config))
    assert [name for name in able(facts=facts) if name not in WRITES] == more
    assert able(fake_spec(chat="transcript"), facts) == WRITES  # it is not used
    in_our_form = able(fake_spec(tools="prompt"), facts)
    assert [name for name in in_our_form if name not in WRITES] == [n for n in more if n != "tools"]


def test_a_template_may_lie_in_a_file_of_its_own_or_be_one_of_several(tmp_path):
    beside = folder(tmp_path, chat_template__jinja=WITH_TOOLS.encode())
    assert "tools" in able(facts=read_facts(beside))
    listed = [{"name": "default", "template": PLAIN}, {"name": "tool_use", "template": WITH_TOOLS}]
    config = json.dumps({"chat_template": listed}).encode()
    several = folder(tmp_path / "other", tokenizer_config__json=config)
    assert "tools" in able(facts=read_facts(several))


@pytest.mark.parametrize("broken", [b"", b"[]", b"{", b'{"chat_template": [1]}', b"\xff"])
def test_files_that_cannot_be_read_say_nothing(tmp_path, broken):
    path = folder(tmp_path, tokenizer_config__json=broken, tokenizer__json=broken)
    assert able(facts=read_facts(path)) == WRITES


@pytest.mark.parametrize(
    ("tokens", "has"),
    [
        (["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"], True),
        (["▁<PRE>", "▁<SUF>", "▁<MID>"], True),
        (["<fim_prefix>", "<fim_suffix>"], False),
        (["x<fim_prefix>", "x<fim_suffix>", "x<fim_middle>"], False),
        ([], False),
    ],
)
@pytest.mark.parametrize("escaped", [True, False])
def test_tokens_for_a_text_in_the_middle_are_named_in_the_tokenizer(tmp_path, tokens, has, escaped):
    text = json.dumps({"model": {"vocab": dict.fromkeys(tokens, 1)}}, ensure_ascii=escaped)
    facts = read_facts(folder(tmp_path, tokenizer__json=text.encode()))
    assert ("fill-in-the-middle" in able(facts=facts)) is has


def test_the_size_is_that_of_the_weights_and_changes_with_the_files(tmp_path):
    path = folder(tmp_path)
    weights = path / "model.safetensors"
    assert read_facts(path).size_bytes == weights.stat().st_size
    (path / "other.safetensors").write_bytes(b"not named")
    assert read_facts(path).size_bytes == weights.stat().st_size
    weights.unlink()
    assert read_facts(path).size_bytes is None
    assert read_facts(tmp_path / "nowhere") == FileFacts()


def test_a_file_to_convert_has_its_own_size(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF but broken")
    assert read_facts(path) == FileFacts(15)
    other = tmp_path / "model.pt"
    other.write_bytes(b"abc")
    assert read_facts(other) == FileFacts(3)


@pytest.mark.parametrize(
    ("config", "limit", "expected"),
    [
        ({"max_position_embeddings": 128}, None, 128),
        ({"n_positions": 1024}, 512, 512),
        ({"max_position_embeddings": 128}, 512, 128),
        ({"text_config": {"max_position_embeddings": 64}}, None, 64),
        ({"block_size": 32}, None, 32),
        ({"max_position_embeddings": "many"}, None, None),
        ({"max_position_embeddings": True}, None, None),
        ({}, 16, 16),
        ({}, None, None),
    ],
)
def test_the_context_is_what_the_files_say_or_less(config, limit, expected):
    assert context_length(fake_spec(max_context_tokens=limit), config) == expected
