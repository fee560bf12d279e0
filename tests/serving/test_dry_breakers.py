"""Texts that no repetition reaches across, as tokens."""

from tests import tokenizers
from tests.fakes import FakeEngine, fake_model, fake_spec
from transformers_api.serving.text.dry_breakers import sequence_breakers


def breakers(*texts, merges):
    tokenizer = tokenizers.byte_level(merges=merges)
    names = {text: tokenizer.encode(text, add_special_tokens=False)[0] for text in merges}
    model = fake_model(fake_spec(), FakeEngine(vocab_size=len(tokenizer)), tokenizer=tokenizer)
    return names, sequence_breakers(model, texts)


def test_a_token_that_holds_the_text_breaks_alone():
    names, spellings = breakers("\n", merges=("a\n", "\nb"))
    assert spellings == {10: {()}, names["a\n"]: {()}, names["\nb"]: {()}}


def test_a_token_that_ends_as_the_text_begins_breaks_with_the_rest():
    names, spellings = breakers("abc", merges=("xa", "xab", "bc"))
    assert spellings == {
        97: {(names["bc"],)},
        names["xa"]: {(names["bc"],)},
        names["xab"]: {(99,)},
    }


def test_texts_of_one_head_are_together():
    _, spellings = breakers("zb", "zc", "z", "zb", merges=())
    assert spellings == {122: {(98,), (99,), ()}}


def test_a_text_of_several_bytes_is_cut_between_characters():
    _, spellings = breakers("é!", merges=("é",))
    assert list(spellings.values()) == [{(33,)}]
