"""What is shown of what a model writes: Markdown, hostile text, calls, thoughts, numbers, print."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from playwright.sync_api import expect

from tests.page.chatting import answered_with, model_turn, send, side, stored

HOSTILE = """<script>document.title = 'owned'</script>
<img src=x onerror="document.title='owned'"> <iframe srcdoc="<script>parent.document.title='owned'</script>"></iframe>
<svg onload=document.title='owned'> <a href="javascript:document.title='owned'">raw</a> <form id=log><input name=body></form>

[script](javascript:document.title='owned') [data](data:text/html,<script>1</script>) [mail](mailto:a@b.example) [web](https://example.org/?a=1&b=2)
![picture](http://evil.example/p.png) <style>body{display:none}</style> [x]: <b style="position:fixed">

$\\href{javascript:alert(1)}{x}$ $\\includegraphics{http://evil.example/q.png}$ $\\color{red}{y}$

```html"onmouseover=document.title='owned'
</code></pre><script>document.title = 'owned'</script>
```
"""


def test_what_a_model_and_a_user_write_is_inert_before_and_after_a_reload(scripted, open_page):
    page = open_page(scripted)
    send(page, HOSTILE)
    for _ in range(2):
        turn = model_turn(page)
        expect(turn).to_contain_text("<script>document.title = 'owned'</script>")
        expect(turn).to_contain_text('<img src=x onerror="document.title')
        expect(
            page.get_by_role("article", name="You").locator("*:not(button, svg, path, div)")
        ).to_have_count(0)
        assert (
            turn.locator("script, img, iframe, form, style, svg:not([aria-hidden]), object").count()
            == 0
        )
        assert (
            turn.locator("[style], [onerror], [onload], [onmouseover], [srcdoc], [id]").count() == 0
        )
        links = {link.inner_text(): link for link in turn.locator("a[href]").all()}
        assert set(links) == {"mail", "web", "picture"}
        assert links["web"].get_attribute("href") == "https://example.org/?a=1&b=2"
        assert links["web"].get_attribute("rel") == "noopener noreferrer nofollow"
        assert links["web"].get_attribute("target") == "_blank"
        assert "owned" not in page.title().replace(
            side(page).locator("[aria-current]").inner_text(), ""
        )
        page.reload()


def test_markdown_is_drawn_with_tables_tasks_code_and_formulas(scripted, open_page):
    page = open_page(scripted)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    send(
        page,
        "## Two\n\n|left|right|\n|:--|--:|\n|1|2|\n\n3. three\n4. four\n\n- [x] done\n- [ ] open\n\n> quoted **bold** ~~gone~~\n\n"
        "```py\nprint('hi')  # note\n```\n\nIt costs $5 and $6, $E = mc^2$, \\(a_1\\)\n\n$$\n\\frac{1}{2}\n$$\n\nand a line\nbreak",
    )
    turn = model_turn(page)
    expect(turn.get_by_role("heading", level=4)).to_have_text("Two")
    expect(turn.get_by_role("cell", name="2")).to_have_css("text-align", re.compile("right"))
    expect(turn.locator("ol")).to_have_attribute("start", "3")
    expect(turn.get_by_role("checkbox")).to_have_count(2)
    expect(turn.get_by_role("checkbox").first).to_be_checked()
    expect(turn.locator("blockquote strong")).to_have_text("bold")
    expect(turn.locator("math")).to_have_count(3)
    expect(turn.locator("math mfrac")).to_have_count(1)
    expect(turn).to_contain_text("It costs $5 and $6,")
    expect(turn.locator("p").last.locator("br")).to_have_count(1)
    expect(turn.locator("code .hljs-string")).to_have_text("'hi'")
    turn.get_by_role("button", name="Copy code").click()
    assert page.evaluate("navigator.clipboard.readText()") == "print('hi')  # note"
    turn.get_by_role("button", name="Copy", exact=True).click()
    assert page.evaluate("navigator.clipboard.readText()").startswith("## Two")


def test_a_text_that_streams_is_drawn_as_it_would_be_at_once(scripted, open_page):
    text = "# A\n\npara *one*\ncont\n\n- a\n- b\n\n  more of b\n\n1. x\n\n2. y\n\n```js\nlet a = `1`;\n\nb\n```\n|a|b|\n|-|-|\n|1|2|\n\n---\nend [l](https://e.example)\n> q\nlazy\n\n***"
    page = open_page(scripted)
    shapes = page.evaluate(
        """async (text) => {
          const {Markdown} = await import(document.querySelector('script[type=module]').src.replace('app.js', 'chat/markdown.js'));
          const shape = (box) => box.innerHTML.replaceAll(/<span class="hljs[^>]*>|<\\/span>/g, '').replaceAll(/ data-[a-z]+="[^"]*"/g, '');
          const whole = document.createElement('div'), grown = document.createElement('div');
          new Markdown(whole).draw(text);
          const markdown = new Markdown(grown);
          for (let i = 1; i <= text.length; i += 1) markdown.draw(text.slice(0, i), {live: true});
          let live = shape(grown);
          for (let n = 0; n < 300 && live !== shape(whole); n += 1) {  // a slow machine is behind
            await new Promise(requestAnimationFrame);
            markdown.draw(text, {live: true});
            live = shape(grown);
          }
          markdown.draw(text);
          return [shape(whole), live, shape(grown)];
        }""",
        text,
    )
    assert shapes[0].count("<li>") == 4
    assert shapes[1] == shapes[2] == shapes[0]


def test_calls_are_cards_that_the_reader_answers(scripted, open_page):
    page = open_page(scripted)
    page.get_by_role("button", name="Settings").click()
    dialog = page.get_by_role("dialog", name="Settings")
    dialog.get_by_text("More", exact=True).click()
    dialog.get_by_role("textbox", name="Tools").fill(
        '{"name": "weather", "parameters": {"type": "object"}}'
    )
    dialog.get_by_role("button", name="Done").click()
    calls = [
        {"index": 0, "id": "c1", "function": {"name": "weather", "arguments": '{"city": '}},
        {"index": 0, "function": {"arguments": '"<b>Lisbon</b>"}'}},
        {"index": 1, "id": "c2", "function": {"name": "weather", "arguments": "{}"}},
    ]
    bodies = answered_with(
        page,
        {"role": "assistant"},
        *({"tool_calls": [call]} for call in calls),
        finish="tool_calls",
    )
    send(page, "What is the weather?")
    assert bodies[0]["tools"] == [
        {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    ]
    cards = page.get_by_role("region", name="Call of weather")
    expect(cards).to_have_count(2)
    expect(cards.first).to_contain_text('"city": "<b>Lisbon</b>"')
    page.reload()
    bodies = answered_with(page, {"content": "It is sunny."})
    fields = page.get_by_role("textbox", name="Result of weather")
    fields.nth(0).fill("<i>sun</i>")
    expect(page.get_by_role("button", name="Send the results")).to_be_disabled()
    fields.nth(1).fill("rain")
    page.get_by_role("button", name="Send the results").click()
    expect(model_turn(page)).to_contain_text("It is sunny.")
    expect(page.get_by_role("article", name="Result of weather").first).to_contain_text(
        "<i>sun</i>"
    )
    asked, *results = bodies[0]["messages"][1:]
    assert [call["function"]["arguments"] for call in asked["tool_calls"]] == [
        '{"city": "<b>Lisbon</b>"}',
        "{}",
    ]
    assert asked["content"] is None
    assert results == [
        {"role": "tool", "tool_call_id": "c1", "content": "<i>sun</i>"},
        {"role": "tool", "tool_call_id": "c2", "content": "rain"},
    ]
    expect(page.get_by_role("button", name="Send the results")).to_have_count(0)


def test_thoughts_are_folded_and_sent_back(scripted, open_page):
    page = open_page(scripted)
    answered_with(
        page, {"reasoning_content": "hm <b>"}, {"reasoning_content": "so"}, {"content": "Yes."}
    )
    send(page, "Is it?")
    turn = model_turn(page)
    expect(turn.locator(".prose")).to_have_text("Yes.")
    expect(turn.get_by_text("hm <b>so")).to_be_hidden()
    turn.get_by_text(re.compile("^Thought for 1 s")).click()
    expect(turn.get_by_text("hm <b>so")).to_be_visible()
    page.unroute("**/v1/chat/completions")
    bodies = answered_with(page, {"content": "Why."})
    send(page, "Why?")
    assert bodies[0]["messages"][1] == {
        "role": "assistant",
        "content": "Yes.",
        "reasoning_content": "hm <b>so",
    }


def test_numbers_are_those_of_the_api_and_the_ribbon_leads_inside(tiny, open_page):
    page = open_page(tiny)
    expect(page.get_by_role("combobox", name="Model")).to_have_value("tiny-llama")
    page.get_by_role("button", name="Settings").click()
    for name, value in (("Temperature", "0"), ("Longest answer", "12")):
        page.get_by_role("spinbutton", name=name).fill(value)
    page.get_by_role("button", name="Done").click()
    with page.expect_response("**/v1/chat/completions") as caught:
        send(page, "The capital of France is")
    lines = [
        json.loads(line[6:])
        for line in caught.value.text().splitlines()
        if line.startswith("data: {")
    ]
    traces = [line["trace"] for line in lines if "token_id" in line.get("trace", {})]
    usage = lines[-1]["usage"]
    turn = model_turn(page)
    expect(turn).to_contain_text(f"{usage['completion_tokens']} tokens")
    expect(turn).to_contain_text(f"{usage['prompt_tokens']} read")
    node = stored(page)[-1]
    assert [(t["id"], t["surprisal"], t["entropy"], t["rank"]) for t in node["tokens"]] == [
        (t["token_id"], t["surprisal"], t["entropy"], t["rank"]) for t in traces
    ]
    assert [t["position"] for t in node["tokens"]] == [t["position"] for t in traces]
    assert node["tokens"][0]["position"] == len(node["prompt"]["token_ids"])
    assert not any("attn" in token for token in node["tokens"])
    page.get_by_role("button", name=f"Surprisal of {len(traces)} tokens: look inside").click(
        position={"x": 30, "y": 10}
    )
    expect(page.get_by_role("tab", name="Inside", exact=True)).to_have_attribute(
        "aria-selected", "true"
    )


def test_an_answer_without_a_trace_says_so_and_can_still_be_looked_into(scripted, open_page):
    page = open_page(scripted)

    def blind(route: Any) -> None:
        chunks = [
            {
                "choices": [
                    {"index": 0, "delta": {"role": "assistant"}, "prompt_token_ids": [1, 2, 3]}
                ],
                "trace": {"noted": False, "code": "trace_busy", "reason": "busy"},
            },
            {"choices": [{"index": 0, "delta": {"content": "He"}, "token_ids": [7]}]},
            {"choices": [{"index": 0, "delta": {"content": "y"}, "token_ids": [8, 9]}]},
            {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
        ]
        text = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)
        route.fulfill(content_type="text/event-stream", body=f"{text}data: [DONE]\n\n")

    page.route("**/v1/chat/completions", blind)
    send(page, "hello")
    turn = model_turn(page)
    expect(turn).to_contain_text("Written without a trace: others are being looked into")
    expect(turn.get_by_role("button", name=re.compile("^Surprisal"))).to_have_count(0)
    expect(turn.get_by_role("button", name="Look inside")).to_be_visible()
    tokens = stored(page)[-1]["tokens"]
    assert [(token["id"], token["position"], token["surprisal"]) for token in tokens] == [
        (7, 3, None),
        (8, 4, None),
        (9, 5, None),
    ]


@pytest.mark.parametrize("direction", ["rtl"])
def test_text_from_right_to_left_stands_right_and_numbers_stay_whole(
    scripted, open_page, direction
):
    page = open_page(scripted)
    send(page, "مرحبا بالعالم 12 %")
    expect(model_turn(page).locator(".prose")).to_have_css("direction", direction)
    expect(page.get_by_role("article", name="You").locator(".bubble")).to_have_css(
        "direction", direction
    )
    expect(page.locator("html")).to_have_css("direction", "ltr")


def test_print_has_the_whole_conversation_and_nothing_else(scripted, open_page):
    page = open_page(scripted, scheme="dark")
    for i in range(12):
        send(page, f"**bold {i}**\n\n" + "\n\n".join("line" for _ in range(12)))
    page.reload()
    expect(model_turn(page).locator("strong")).to_have_text("bold 11")
    assert page.locator(".prose strong").count() < 12  # the first ones are far above
    page.emulate_media(media="print", color_scheme="dark")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    expect(page.locator(".prose strong")).to_have_count(12)
    for name in ("navigation", "form", "tablist"):
        expect(page.get_by_role(name)).to_have_count(0)
    expect(page.locator("body")).to_have_css("color", "rgb(28, 27, 24)")
    assert page.locator("canvas").first.is_visible()
