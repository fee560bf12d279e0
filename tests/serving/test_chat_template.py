from __future__ import annotations

import inspect

import pytest
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from tests import tokenizers
from tests.fakes import FakeEngine, fake_model, fake_spec
from transformers_api.errors import ChatUnavailable, InvalidRequest, ModelNotCapable
from transformers_api.serving.text import chat_template, template_renderer
from transformers_api.serving.text.model_template import ModelTemplate

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Well"}
STRICT = (
    "{% for m in messages %}"
    "{% if m['role'] != ['user', 'assistant'][loop.index0 % 2] %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{{ m['content'] }}<|im_end|>{% endfor %}"
)


# As Apertus' and Apriel's: the end of an answer is written where another turn follows.
ENDED_BY_THE_NEXT = (
    "{% for m in messages %}{% if not loop.first and messages[loop.index0 - 1]['role'] == "
    "'assistant' %}<|im_end|>{% endif %}<|im_start|>{{ m['role'] }}: {{ m['content'] }}{% endfor %}"
)
ENDED_UNLESS_LAST = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}"
    "{% if not loop.last %}<|im_end|>{% endif %}\n{% endfor %}"
)
ONLY_FROM_USERS = (
    "{% if messages[-1]['role'] == 'assistant' %}{{ raise_exception('ask something') }}{% endif %}"
    "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
)


def model_with(template=tokenizers.CHATML, mode=None, tokenizer=None):
    tokenizer = tokenizer or tokenizers.byte_level(chat_template=template)
    return fake_model(fake_spec(chat=mode), tokenizer=tokenizer)


def text_of(model, prompt):
    return chat_template.decode_ids(model, prompt.ids)


def test_messages_are_written_by_the_template_with_its_special_tokens():
    model = model_with()
    prompt = chat_template.encode(model, [{"role": "system", "content": "Be kind"}, USER])
    assert text_of(model, prompt) == (
        "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert prompt.ids[0] == tokenizers.IM_START
    assert prompt.ids.count(tokenizers.IM_END) == 2
    assert prompt.stop == ()
    assert prompt.stop_token_ids == {tokenizers.IM_END}


def test_the_template_writes_the_only_bos():
    tokenizer = tokenizers.sentencepiece()
    tokenizer.backend_tokenizer.post_processor = tokenizers.begin_with(tokenizer, "<s>")
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    model = model_with(tokenizer=tokenizer)
    assert tokenizer.encode("lo").count(tokenizer.bos_token_id) == 1
    assert chat_template.encode(model, [USER]).ids.count(tokenizer.bos_token_id) == 1


def test_text_parts_are_joined_and_null_content_is_empty():
    model = model_with()
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": " two"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": None}, USER]
    text = text_of(model, chat_template.encode(model, messages))
    assert "user\none two<|im_end|>\n<|im_start|>assistant\n<|im_end|>" in text


@pytest.mark.parametrize(
    ("template", "role"),
    [(tokenizers.CHATML, "system"), (tokenizers.CHATML + "{# developer #}", "developer")],
    ids=["unknown to the template", "known to the template"],
)
def test_developer_is_system_where_the_template_does_not_know_it(template, role):
    model = model_with(template)
    text = text_of(
        model, chat_template.encode(model, [{"role": "developer", "content": "x"}, USER])
    )
    assert text.startswith(f"<|im_start|>{role}\nx")


def test_what_the_template_refuses_is_an_invalid_request_with_its_words():
    with pytest.raises(InvalidRequest, match="Roles must alternate") as caught:
        chat_template.encode(model_with(STRICT), [USER, USER])
    assert caught.value.param == "messages"


def test_a_template_that_trips_over_a_message_is_an_invalid_request():
    template = "{% for m in messages %}{{ m['content'] + m['name'] + 1 }}{% endfor %}"
    with pytest.raises(InvalidRequest) as caught:
        chat_template.encode(model_with(template), [{**USER, "name": "Ann"}])
    assert caught.value.param == "messages"


def test_template_variables_reach_the_template():
    model = model_with("{{ messages[0]['content'] }}{% if thinking %} THINK{% endif %}")
    prompt = chat_template.encode(model, [USER], chat_template_kwargs={"thinking": True})
    assert text_of(model, prompt) == "Hi THINK"


@pytest.mark.parametrize("name", ["chat_template", "messages", "tokenize", "return_anything"])
def test_reserved_template_variables_are_refused(name):
    with pytest.raises(InvalidRequest, match=name) as caught:
        chat_template.encode(model_with(), [USER], chat_template_kwargs={name: "{{ 1 }}"})
    assert caught.value.param == "chat_template_kwargs"


def test_every_argument_of_the_renderer_is_reserved():
    for function in (PreTrainedTokenizerBase.apply_chat_template, render_jinja_template):
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.kind is not parameter.VAR_KEYWORD:
                with pytest.raises(InvalidRequest):
                    chat_template.encode(model_with(), [USER], chat_template_kwargs={name: None})


def test_the_final_message_is_continued():
    model = model_with()
    prompt = chat_template.encode(model, [USER, ASSISTANT], continue_final_message=True)
    assert text_of(model, prompt).endswith("<|im_start|>assistant\nWell")


def test_the_generation_prompt_can_be_left_out():
    model = model_with()
    prompt = chat_template.encode(model, [USER, ASSISTANT], add_generation_prompt=False)
    assert text_of(model, prompt).endswith("Well<|im_end|>\n")


def test_a_continuation_and_a_generation_prompt_exclude_each_other():
    with pytest.raises(InvalidRequest) as caught:
        chat_template.encode(
            model_with(),
            [USER, ASSISTANT],
            add_generation_prompt=True,
            continue_final_message=True,
        )
    assert caught.value.param == "continue_final_message"


@pytest.mark.parametrize("mode", ["template", "transcript"])
def test_only_an_assistant_message_can_be_continued(mode):
    with pytest.raises(InvalidRequest) as caught:
        chat_template.encode(model_with(mode=mode), [USER], continue_final_message=True)
    assert caught.value.param == "continue_final_message"


def test_no_messages_are_an_invalid_request():
    with pytest.raises(InvalidRequest):
        chat_template.encode(model_with(), [])


def test_a_model_marked_as_completion_only_has_no_chat():
    with pytest.raises(ChatUnavailable) as caught:
        chat_template.encode(model_with(mode="off"), [USER])
    assert caught.value.message == (
        "Chat completions are currently disabled; please use /v1/completions instead."
    )


def test_a_model_marked_for_a_template_that_it_lacks_is_not_capable():
    with pytest.raises(ModelNotCapable):
        chat_template.encode(model_with(None, "template"), [USER])


@pytest.mark.parametrize(
    "model",
    [model_with(None), model_with(mode="transcript")],
    ids=["no template", "by the registry"],
)
def test_a_transcript_stands_in_for_the_template(model):
    messages = [
        {"role": "system", "content": "Be kind"},
        {"role": "developer", "content": "Be short"},
        USER,
        ASSISTANT,
        {"role": "tool", "content": "42"},
    ]
    prompt = chat_template.encode(model, messages)
    assert text_of(model, prompt) == (
        "System: Be kind\nSystem: Be short\nUser: Hi\nAssistant: Well\nTool: 42\nAssistant:"
    )
    assert prompt.stop == ("\nUser:", "\nSystem:", "\nAssistant:")
    assert prompt.stop_token_ids == frozenset()


def test_a_transcript_can_be_continued():
    model = model_with(None)
    prompt = chat_template.encode(model, [USER, ASSISTANT], continue_final_message=True)
    assert text_of(model, prompt) == "User: Hi\nAssistant: Well"


def test_a_transcript_begins_as_any_text_of_the_model_does():
    tokenizer = tokenizers.sentencepiece()
    tokenizer.backend_tokenizer.post_processor = tokenizers.begin_with(tokenizer, "<s>")
    assert (
        chat_template.encode(model_with(tokenizer=tokenizer), [USER]).ids[0]
        == tokenizer.bos_token_id
    )


def test_an_unknown_role_in_a_transcript_is_an_invalid_request():
    with pytest.raises(InvalidRequest, match="wizard"):
        chat_template.encode(model_with(None), [{"role": "wizard", "content": "x"}])


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (tokenizers.CHATML, {tokenizers.IM_END}),
        ("{% for m in messages %}{{ m['content'] }} <|endoftext|>{% endfor %}", {258}),
        ("{% for m in messages %}{{ m['content'] }}\n\n### {% endfor %}", set()),
        (
            "{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}",
            {tokenizers.IM_START},
        ),
        (ENDED_BY_THE_NEXT, {tokenizers.IM_END}),
        (ENDED_UNLESS_LAST, {tokenizers.IM_END}),
        (ONLY_FROM_USERS, {tokenizers.IM_END}),
        ("{{ messages[-1]['content'] }}", set()),
        ("{{ raise_exception('never') }}", set()),
        ("{{ nothing.at.all }}", set()),
        (None, set()),
    ],
    ids=[
        "chatml",
        "end of text",
        "no token",
        "only before",
        "before the next",
        "unless last",
        "the last one is a user",
        "one message",
        "raises",
        "breaks",
        "none",
    ],
)
def test_the_token_that_closes_a_turn_is_found_by_the_template(template, expected):
    tokenizer = tokenizers.byte_level(chat_template=template)
    assert ModelTemplate(tokenizer).end_of_turn == expected


def test_added_tokens_that_are_spaces_close_no_turn():
    tokenizer = tokenizers.byte_level(chat_template="{{ messages[-1]['content'] }}\n\n### User")
    tokenizer.add_tokens(["\n\n"])
    assert ModelTemplate(tokenizer).end_of_turn == frozenset()


def test_the_template_of_a_model_is_asked_once_what_it_is_like(monkeypatch):
    model = model_with()
    render, rendered = template_renderer.renderer.render, []

    def count(source, variables):
        rendered.append(variables["messages"][-1]["content"])
        return render(source, variables)

    monkeypatch.setattr(template_renderer.renderer, "render", count)
    for _ in range(3):
        prompt = chat_template.encode(model, [{"role": "user", "content": "Hi"}])
        assert prompt.stop_token_ids == {tokenizers.IM_END}
    assert rendered == [*["qzprobeqz", "hello", "qzprobeqz", "qzprobeqz"], "Hi", "Hi", "Hi"]


def test_text_is_encoded_and_decoded_again():
    model = model_with()
    ids = chat_template.encode_text(model, "Hi 世 <|im_end|>")
    assert ids[-1] == tokenizers.IM_END
    assert chat_template.decode_ids(model, ids) == "Hi 世 <|im_end|>"
    assert chat_template.decode_ids(model, ids, skip_special_tokens=True) == "Hi 世 "


def test_special_tokens_are_added_unless_told_not_to():
    tokenizer = tokenizers.sentencepiece()
    tokenizer.backend_tokenizer.post_processor = tokenizers.begin_with(tokenizer, "<s>")
    model = model_with(tokenizer=tokenizer)
    assert chat_template.encode_text(model, "lo")[0] == tokenizer.bos_token_id
    assert tokenizer.bos_token_id not in chat_template.encode_text(
        model, "lo", add_special_tokens=False
    )


def test_half_a_surrogate_pair_is_an_invalid_request():
    with pytest.raises(InvalidRequest) as caught:
        chat_template.encode_text(model_with(), "a\ud800")
    assert caught.value.param == "prompt"
    with pytest.raises(InvalidRequest) as caught:
        chat_template.encode(model_with(), [{"role": "user", "content": "\udc00"}])
    assert caught.value.param == "messages"


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
@pytest.mark.parametrize("read", ["reasoning_content", "reasoning"])
def test_the_reasoning_of_an_earlier_answer_is_where_the_template_reads_it(name, read):
    template = (
        "{% for m in messages %}{% if m." + read + " %}<t>{{ m." + read + " }}</t>{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    earlier = {"role": "assistant", "content": "4", name: "two and<|im_end|> two"}
    model = model_with(template)
    prompt = chat_template.encode(model, [USER, earlier, USER])
    assert text_of(model, prompt) == "Hi<t>two and<|im_end|> two</t>4Hi"
    assert tokenizers.IM_END not in prompt.ids


@pytest.mark.parametrize(
    ("template", "messages"),
    [
        ("{% for m in messages %}<|u|>{{ m.content }}{% endfor %}", [USER]),
        ("{{ messages[0].content }}<|u|>", [USER]),
        # not in every conversation
        (
            "{% for m in messages %}{{ m.content }}{% if m.role == 'tool' %}<|u|>{% endif %}"
            "{% endfor %}",
            [USER, {"role": "tool", "content": "4"}],
        ),
    ],
)
def test_a_template_that_writes_tokens_beyond_the_model_is_the_models_fault(template, messages):
    tokenizer = tokenizers.byte_level(chat_template=template)
    size = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|u|>"]})
    enough = fake_model(engine=FakeEngine(vocab_size=size + 1), tokenizer=tokenizer)
    assert size in chat_template.encode(enough, messages).ids
    model = fake_model(engine=FakeEngine(vocab_size=size), tokenizer=tokenizer)
    with pytest.raises(ModelNotCapable, match=rf"writes '<\|u\|>', which is token {size}, but"):
        chat_template.encode(model, messages)
    assert chat_template.encode_text(model, "Hi") == tokenizer.encode("Hi")
    transcript = fake_model(
        fake_spec(chat="transcript"), FakeEngine(vocab_size=size), tokenizer=tokenizer
    )
    assert chat_template.encode(transcript, [USER]).ids
