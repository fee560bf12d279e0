"""Templates that cannot take much are rendered here, all others in the helper: with the same text."""

from __future__ import annotations

import gc
import weakref

import pytest

from tests.tokenizers import CHATML
from transformers_api.serving.text import template_process, template_renderer
from transformers_api.serving.text.bounded_template import MOST_NAMES, is_bounded
from transformers_api.serving.text.template_renderer import TemplateFailed, TemplateRenderer

PARTS = (
    "{% for m in messages %}{{ '<' + m.role + '>' }}{% for p in m.content %}"
    "{% if p.type == 'text' %}{{ p.text | trim }}{% endif %}{% endfor %}{% endfor %}"
)
SYSTEM = (
    "{% if messages[0].role == 'system' %}{% set start = messages[0].content %}{{ start }}"
    "{% else %}{{ 'Be kind.' }}{% endif %}{{ messages | tojson }}"
)
REFUSING = "{% for m in messages %}{{ raise_exception('no ' + m.role) }}{% endfor %}"
BOUNDED = [CHATML, PARTS, SYSTEM, REFUSING]
MESSAGES = [
    {"role": "system", "content": [{"type": "text", "text": " Bonjour "}]},
    {"role": "user", "content": [{"type": "text", "text": "été"}, {"type": "image"}]},
]
TEXTS = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]


@pytest.mark.parametrize(
    "source",
    [
        "{{ (10 ** 9) ** (10 ** 7) }}",
        "{{ '%2000000000d' % 1 }}",
        "{{ 'a' * 2000000000 }}",
        "{{ messages | center(2000000000) }}",
        "{{ messages | default('a' * 2000000000) }}",
        "{{ messages | tojson | tojson | tojson }}",
        "{% set a = messages | tojson %}{% set a = a | tojson %}",
        "{% set a = a + a %}",
        "{% set a = [a, a] %}",
        "{% for i in range(1000000000) %}{% endfor %}",
        "{% for m in messages %}{{ messages[0].content }}{% endfor %}",
        "{% for m in messages %}{% for k in messages %}x{% endfor %}{% endfor %}",
        "{% for m in messages %}{% for p in m.content %}{{ m.content }}{% endfor %}{% endfor %}",
        "{% for m in messages %}{% set ns.a = ns.a + m.content %}{% endfor %}",
        "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
        "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
        "{% set a %}{{ a }}{{ a }}{% endset %}",
        "{{ messages.__class__.__mro__() }}",
        "{{ a }}" * (MOST_NAMES + 1),
        "{% if %}",
    ],
)
def test_whatever_could_multiply_repeat_or_collect_goes_to_the_helper(source):
    assert not is_bounded(source)


@pytest.mark.parametrize("source", BOUNDED)
@pytest.mark.parametrize("messages", [MESSAGES, TEXTS], ids=["parts", "texts"])
def test_a_bounded_template_gives_the_same_here_and_in_the_helper(monkeypatch, source, messages):
    assert is_bounded(source)
    renderer = TemplateRenderer()

    def outcome():
        try:
            return renderer.render(source, {"messages": messages, "add_generation_prompt": True})
        except TemplateFailed as error:
            return error.kind, str(error)

    here = outcome()
    assert renderer._helper is None  # nothing was started for it
    monkeypatch.setattr(template_renderer, "MOST_HERE", 0)
    assert outcome() == here
    assert renderer._helper is not None
    renderer.close()


@pytest.mark.parametrize(
    "source",
    ["{{ 'a' + x }}", "{% for y in x %}{{ y.z.z }}{% endfor %}", "{{ raise_exception(1) }}"],
)
def test_nothing_that_a_failed_template_was_rendered_for_outlives_it(source):
    class Body(list):
        """What knows the request."""

    def fail(body):
        reply = template_process.answer({"source": source, "variables": {"x": [1]}})
        assert "text" not in reply
        return len(body)

    fail(Body())
    gc.disable()
    try:
        body = Body()
        reference = weakref.ref(body)
        fail(body)
        del body
        assert reference() is None
    finally:
        gc.enable()
