"""Inside, Change: edits go with the request, the answers stand side by side, shares are the API's."""

from __future__ import annotations

import json
import re

import httpx
import pytest
from playwright.sync_api import expect

from tests.page.conftest import violations
from tests.page.inside import ask, begin, choose, completion, look_inside, rows

QUESTION = "What is the capital of France"
MODEL = "tiny-llama"
OFF = {"do": "ablate", "part": "head", "layer": 1, "heads": [2]}
HALF = {"do": "scale", "part": "mlp", "layer": 0, "by": 0.5}


@pytest.fixture
def page(tiny, open_page):
    """An answer of a real model, looked into, with the pane Change open."""
    page = begin(open_page(tiny, None, bypass_csp=True))
    ask(page, QUESTION)
    look_inside(page)
    page.get_by_role("tab", name="Change").click()
    return page


def add(page, kind, layer, **fields):
    page.get_by_role("combobox", name="Kind of edit").select_option(label=kind)
    page.get_by_role("spinbutton", name="Layer").fill(str(layer))
    for name, value in fields.items():
        page.get_by_role("spinbutton", name=name.capitalize()).fill(str(value))
    page.get_by_role("button", name="Add the edit").click()


def write(page, name):
    with page.expect_request("**/v1/chat/completions") as sent:
        page.get_by_role("button", name=name).click()
    expect(page.get_by_role("button", name="Stop", exact=True)).to_be_hidden()
    return json.loads(sent.value.post_data)


def test_an_answer_is_written_again_by_a_changed_model_and_stands_beside_the_first(page, tiny):
    add(page, "Switch a head off", 1, head=2)
    add(page, "Weaken or strengthen the MLP", 0)
    page.get_by_role("slider", name="How much: MLP of layer 0").fill("0.5")
    shelf = page.get_by_role("list", name="Edits").get_by_role("listitem")
    expect(shelf).to_have_text(["head 2 of layer 1 off", "MLP of layer 0 × 0.5"])
    body = write(page, "Write again with the edits")
    assert body["intervene"] == {"edits": [OFF, HALF]}
    assert body["temperature"] == 0
    expect(page.get_by_role("region", name="Run A")).to_contain_text("changed by 2 edits")
    expect(page.get_by_role("region", name="Run B")).not_to_contain_text("changed")
    changed = {**body, "stream": False}
    del changed["stream_options"]
    answer = httpx.post(f"{tiny}/v1/chat/completions", json=changed, timeout=30).json()
    page.get_by_role("tab", name="Chat").click()
    turn = page.get_by_role("article", name="Model")
    expect(turn).to_contain_text("changed by 2 edits")
    assert answer["choices"][0]["token_ids"] != completion(tiny, QUESTION, MODEL)[1]
    page.reload()
    page.get_by_role("button", name="Show the request").click()
    shown = page.get_by_role("dialog").get_by_role("tabpanel").inner_text()
    assert json.loads(shown.split("-d '")[1].removesuffix("'"))["intervene"] == body["intervene"]


def test_edits_are_switched_off_and_removed_and_outlive_a_reload(page):
    add(page, "Switch a head off", 1, head=2)
    add(page, "Set a neuron", 2, neuron=5)
    page.get_by_role("checkbox", name="Use: head 2 of layer 1 off").uncheck()
    page.get_by_role("button", name="Remove: neuron 5 of layer 2").click()
    page.reload()
    page.get_by_role("tab", name="Change").click()
    shelf = page.get_by_role("list", name="Edits").get_by_role("listitem")
    expect(shelf).to_have_text(["head 2 of layer 1 off"])
    assert "intervene" not in write(page, "Write again without edits")


def test_a_direction_is_chosen_among_those_of_the_server(page, tiny):
    numbers = {"vector": [0.5] * 64}
    assert httpx.put(f"{tiny}/inspect/vectors/calm", json=numbers).status_code < 300
    add(page, "Add a direction", 1)
    expect(page.get_by_role("list", name="Edits")).to_contain_text("calm, layer 1 + 0.2 norms")


def test_shares_are_those_of_the_api_and_what_said_it_is_switched_off(page, tiny):
    prompt, written = completion(tiny, QUESTION, MODEL)
    position = len(prompt) + 1
    choose(page, position)
    body = {"token_ids": [*prompt, *written][:position], "token": written[1], "against": "mean"}
    for by, name in (("head", "Heads"), ("layer", "Attention and MLPs")):
        page.get_by_role("combobox", name="Parts").select_option(label=name)
        page.get_by_role("button", name="Take the logit apart").click()
        expect(page.get_by_text(re.compile("all others together"))).to_be_visible()
        answer = httpx.post(
            f"{tiny}/inspect/logit_parts", json={**body, "model": MODEL, "by": by, "topk": 12}
        ).json()
        values = sorted((part["value"] for part in answer["parts"]), key=abs, reverse=True)
        shown = [row[-1].replace("−", "-") for row in rows(page, "Shares of the logit")]
        assert shown == [f"{value:+.2f}" for value in values]
    page.get_by_role("button", name=re.compile("^Switch off: ")).first.click()
    expect(page.get_by_role("list", name="Edits").get_by_role("listitem")).to_have_count(1)
    assert violations(page, "#view-inside") == []


@pytest.mark.parametrize("edits", ["{}", '[null, 1, {"kind": "constructor"}, {"kind": {}}]'])
def test_edits_that_are_none_are_left_out(open_page, tiny, edits):
    page = open_page(tiny, None)
    garbage = f"localStorage.setItem('transformers-api.edits', {json.dumps(edits)});"
    page.add_init_script(garbage + "localStorage.setItem('transformers-api.drafts', '7');")
    ask(begin(page), QUESTION)
    look_inside(page)
    page.get_by_role("tab", name="Change").click()
    expect(page.get_by_text("No edit yet")).to_be_visible()
