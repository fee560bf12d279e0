"""Whose words the tokens of a prompt are."""

import pytest

from tests import tokenizers
from tests.fakes import fake_model, fake_spec, fake_tokenizer
from transformers_api.serving.text import chat_template
from transformers_api.serving.text.spans import Span, spans

TALK = [
    {"role": "system", "content": "Be ☺ kind"},
    {"role": "user", "content": "user"},
    {"role": "assistant", "content": ""},
    {"role": "user", "content": "Hi\n"},
]


def found(model, messages, **options):
    """(role, text) of each span."""
    ids = chat_template.encode(model, messages, **options).ids
    return [
        (span.role, chat_template.decode_ids(model, ids[span.start : span.end]))
        for span in spans(model, messages, ids, **options)
    ]


def said(messages):
    return [(message["role"], message["content"]) for message in messages]


@pytest.mark.parametrize("mode", ["template", "transcript"])
def test_each_message_is_where_it_stands(mode):
    assert found(fake_model(fake_spec(chat=mode)), TALK) == said(TALK)


def test_a_span_is_positions_and_the_rest_is_the_templates():
    model = fake_model()
    ids = chat_template.encode(model, TALK[1:2]).ids
    assert ids[:6] == [256, *b"user\n"]
    assert spans(model, TALK[1:2], ids) == [Span("user", 6, 10, "content")]


def test_the_same_words_in_the_template_do_not_confuse():
    talk = [{"role": "user", "content": "assistant\n"}, {"role": "user", "content": "user"}]
    assert found(fake_model(), talk) == said(talk)


def test_a_message_in_parts_is_one_span():
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    talk = [{"role": "user", "content": parts}]
    assert found(fake_model(), talk) == [("user", "one two")]


@pytest.mark.parametrize(
    "options", [{"continue_final_message": True}, {"add_generation_prompt": False}]
)
def test_options_of_the_prompt_are_followed(options):
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "The sea"}]
    assert found(fake_model(), talk, **options) == said(talk)


def with_template(template):
    tokenizer = fake_tokenizer()
    tokenizer.chat_template = template
    return fake_model(tokenizer=tokenizer)


ADDS_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are kind.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)


def test_the_system_turn_that_a_template_adds_has_a_span_of_its_own():
    model, talk = with_template(ADDS_SYSTEM), [{"role": "user", "content": "Hi"}]
    assert found(model, talk) == [("system", "You are kind."), ("user", "Hi")]
    ids = chat_template.encode(model, talk).ids
    assert [span.section for span in spans(model, talk, ids)] == ["template", "content"]


def test_a_system_turn_of_ones_own_is_content_and_nothing_is_added():
    model = with_template(ADDS_SYSTEM)
    talk = [{"role": "system", "content": "Be rude."}, {"role": "user", "content": "Hi"}]
    assert found(model, talk) == said(talk)
    ids = chat_template.encode(model, talk).ids
    assert {span.section for span in spans(model, talk, ids)} == {"content"}


DATED = (
    "{% set own = messages[0].content if messages[0].role == 'system' else '' %}"
    "<|im_start|>system\nToday is 1 May.\n\n{{ own }}<|im_end|>\n"
    "{% for m in messages if m.role != 'system' %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)


@pytest.mark.parametrize("own", [[], [{"role": "system", "content": "Be rude."}]])
def test_words_that_a_template_puts_before_a_system_turn_are_its_own(own):
    model, talk = with_template(DATED), [*own, {"role": "user", "content": "the system"}]
    assert found(model, talk) == [("system", "Today is 1 May.\n\n"), *said(talk)]
    ids = chat_template.encode(model, talk).ids
    sections = [span.section for span in spans(model, talk, ids)]
    assert sections == ["template"] + ["content"] * len(talk)


def test_a_system_turn_alone_has_no_other_to_be_compared_with():
    talk = [{"role": "system", "content": "Be rude."}]
    assert found(with_template(DATED), talk) == said(talk)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}",
        "{% for m in messages %}{{ m.content }}{% endfor %}",
        "Talk:{% for m in messages %}\n{{ m.role }}: {{ m.content }}{% endfor %}",
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "Say {{ m.content }}{% endfor %}",
        "{% for m in messages %}{% if m.role != 'system' %}({{ m.content }}){% endif %}{% endfor %}",
    ],
    ids=["marks", "bare", "a heading", "refuses a system turn", "drops a system turn"],
)
def test_what_only_marks_turns_is_no_system_turn(template):
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    assert found(with_template(template), talk) == said(talk)


def test_white_space_that_a_template_cuts_off_is_in_no_span():
    model = with_template("{% for m in messages %}[{{ m.content | trim }}]{% endfor %}")
    talk = [{"role": "user", "content": " Hi "}, {"role": "user", "content": "Ho\n"}]
    assert found(model, talk) == [("user", "Hi"), ("user", "Ho")]


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
        "{% for m in messages | reverse %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",
    ],
    ids=["another case", "another order", "twice"],
)
def test_what_cannot_be_known_is_left_open(template):
    talk = [{"role": "user", "content": "Hello"}, {"role": "user", "content": "World"}]
    assert found(with_template(template), talk) == []


def test_a_template_that_refuses_a_word_of_ours_leaves_it_open():
    model = with_template(
        "{% for m in messages %}{% if m.content != 'Hi' %}{{ raise_exception('no') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    assert found(model, [{"role": "user", "content": "Hi"}]) == []


def test_ids_of_another_prompt_leave_it_open():
    assert spans(fake_model(), TALK, [1, 2, 3]) == []


@pytest.mark.parametrize("kind", tokenizers.all_kinds())
def test_every_kind_of_tokenizer_shows_the_messages_or_leaves_them_open(kind):
    model = fake_model(fake_spec(chat="transcript"), tokenizer=tokenizers.all_kinds()[kind])
    talk = [{"role": "user", "content": "a é b"}, {"role": "assistant", "content": "世"}]
    shown = [(role, text.strip()) for role, text in found(model, talk)]
    assert shown == ([] if kind in ("metaspace", "wordpiece") else said(talk))
