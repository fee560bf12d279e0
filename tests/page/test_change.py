"""Inside, Change: edits go with the request, lanes, menus, links, directions, grids and shares."""

from __future__ import annotations

import base64
import io
import json
import re

import httpx
import numpy
import pytest
from playwright.sync_api import expect

from tests.page.conftest import violations
from tests.page.inside import ask, begin, choose, completion, look_inside, rows, visible

# Each event of an answer waits for two frames; notes which lanes had tokens while it was written.
SLOWLY = """() => {
  const plain = window.fetch;
  window.lanes = {};
  const frame = () => new Promise((done) => requestAnimationFrame(done));
  const look = () => {
    for (const name of ["Unedited", "Edited"]) {
      if (document.querySelector(`#view-inside[data-live] [aria-label="${name}"] .tok`)) lanes[name] = true;
    }
  };
  window.fetch = async (path, options) => {
    const answer = await plain(path, options);
    if (!String(path).endsWith("/chat/completions")) return answer;
    const slow = new TransformStream({ async transform(text, out) {
      for (const event of text.split(/(?<=\\n\\n)/)) { out.enqueue(event); await frame(); await frame(); look(); }
    } });
    const body = answer.body.pipeThrough(new TextDecoderStream()).pipeThrough(slow);
    return new Response(body.pipeThrough(new TextEncoderStream()), { headers: answer.headers });
  };
}"""
QUESTION = "What is the capital of France"
MODEL = "tiny-llama"
OFF = {"do": "ablate", "part": "head", "layer": 1, "heads": [2]}
HALF = {"do": "scale", "part": "mlp", "layer": 0, "by": 0.5}


@pytest.fixture
def page(tiny, open_page):
    """An answer of a real model, looked into, with the pane Change open."""
    page = begin(open_page(tiny, None, bypass_csp=True, refusals=True))
    ask(page, QUESTION)
    look_inside(page)
    page.get_by_role("tab", name="Change").click()
    return page


def values(items):
    """As a link carries them."""
    return base64.urlsafe_b64encode(json.dumps(items).encode()).decode().rstrip("=")


def add(page, kind, layer, **fields):
    page.get_by_role("combobox", name="Kind of edit").select_option(label=kind)
    page.get_by_role("spinbutton", name="Layer").fill(str(layer))
    for name, value in fields.items():
        page.get_by_role("spinbutton", name=name.capitalize(), exact=True).fill(str(value))
    page.get_by_role("button", name="Add the edit").click()


def assert_lane(page, name, ids):
    """The lane has the tokens of these ids, in their order."""
    lane = page.get_by_role("region", name=name, exact=True)
    expect(lane.get_by_role("button", name=re.compile("^Token "))).to_have_count(len(ids))


def completion_text(url):
    body = {"messages": [{"role": "user", "content": QUESTION}], "model": MODEL}
    body |= {"temperature": 0, "max_tokens": 12}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30).json()
    return answer["choices"][0]["message"]["content"]


def share(page):
    """What the page to share has of the answer."""
    page.get_by_role("button", name="Save", exact=True).click()
    with page.expect_download() as saved:
        page.get_by_role("menuitem", name="Share as one HTML page").click()
    data = re.search(r'id="data">(.*?)</script>', saved.value.path().read_text())
    return json.loads(data[1])


def write(page, name):
    with page.expect_request("**/v1/chat/completions") as sent:
        page.get_by_role("button", name=name).click()
    expect(page.get_by_role("button", name="Stop", exact=True)).to_be_hidden()
    return json.loads(sent.value.post_data)


def test_an_answer_is_written_beside_its_unedited_twin_and_the_push_of_each_token_is_measured(
    page, tiny
):
    add(page, "Switch a head off", 1, head=2)
    add(page, "Weaken or strengthen the MLP", 0)
    page.get_by_role("slider", name="How much: MLP of layer 0").fill("0.5")
    shelf = page.get_by_role("list", name="Edits").get_by_role("listitem")
    expect(shelf).to_have_text(["head 2 of layer 1 off", "MLP of layer 0 × 0.5"])
    page.evaluate(SLOWLY)
    with page.expect_response("**/v1/completions") as measured:
        body = write(page, "Write again with the edits")
    assert page.evaluate("lanes") == {"Unedited": True, "Edited": True}
    assert body["intervene"] == {"edits": [OFF, HALF], "compare": "free"}
    assert body["temperature"] == 0
    expect(page.get_by_role("region", name="Edited", exact=True)).to_contain_text(
        "changed by 2 edits"
    )
    assert_lane(page, "Unedited", completion(tiny, QUESTION, MODEL)[1])
    changed = {**body, "stream": False, "intervene": {"edits": [OFF, HALF], "compare": "forced"}}
    del changed["stream_options"]
    answer = httpx.post(f"{tiny}/v1/chat/completions", json=changed, timeout=30).json()["choices"][
        0
    ]
    assert_lane(page, "Edited", answer["token_ids"])
    assert answer["token_ids"] != completion(tiny, QUESTION, MODEL)[1]
    assert measured.value.ok
    pushes = page.get_by_role("group", name="Push of each token").get_by_role("button")
    expect(pushes).to_have_count(len(answer["token_ids"]))
    shown = [float(text) for text in pushes.locator(".num").all_inner_texts()]
    assert shown == pytest.approx([each["kl"] for each in answer["compare"]["tokens"]], abs=0.011)
    pushes.first.focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_text(re.compile(r"^Token 2, .* nats\. Unedited"))).to_be_visible()
    expect(page.locator(".tok.hot")).to_have_count(2)  # the same step of both lanes
    assert violations(page, "#view-inside") == []
    shared = share(page)
    assert shared["changed"]["names"] == ["head 2 of layer 1 off", "MLP of layer 0 × 0.5"]
    assert shared["changed"]["twin"] == completion_text(tiny)
    page.get_by_role("tab", name="Token").click()
    expect(
        page.get_by_text(re.compile(r"^The first is [\d.]+ % ahead of the second"))
    ).to_be_visible()
    page.get_by_role("tab", name="Chat").click()
    turn = page.get_by_role("article", name="Model")
    expect(turn).to_contain_text("changed by 2 edits")
    page.reload()
    page.get_by_role("button", name="Show the request").click()
    request = page.get_by_role("dialog").get_by_role("tabpanel").inner_text()
    assert json.loads(request.split("-d '")[1].removesuffix("'"))["intervene"] == body["intervene"]
    page.keyboard.press("Escape")
    page.goto(shared["changed"]["link"])
    page.get_by_role("tab", name="Change").click()
    expect(shelf).to_have_text(["head 2 of layer 1 off", "MLP of layer 0 × 0.5"])
    expect(page.get_by_text("2 edits came with the link.")).to_be_visible()


def test_every_kind_of_edit_is_what_the_api_has_and_a_refusal_stands_beside_its_edit(page):
    edge = {"place that reads": 6, "place that is not read": 5}
    add(page, "Block an edge: do not read a token", 1, head=1, **edge)
    add(page, "Let a head look wider or narrower", 2, head="")
    add(page, "Queries weaker or stronger", 0, head=3)
    kind = page.get_by_role("combobox", name="Kind of edit")
    kind.select_option(label="Patch a place from another text")
    page.get_by_role("textbox", name="The other text").fill("The story of Paris")
    page.get_by_role("spinbutton", name="Place here").fill("3")
    page.get_by_role("spinbutton", name="Place there").fill("-1")
    page.get_by_role("button", name="Add the edit").click()
    add(page, "Switch a head off", 3, head=40)
    edits = [
        {"do": "block", "layer": 1, "heads": [1], "queries": [6], "keys": [5]},
        {"do": "temper", "layer": 2, "temperature": 2},
        {"do": "scale", "part": "q", "layer": 0, "heads": [3], "by": 0},
        {
            "do": "patch",
            "layer": 0,
            "at": [3],
            "from": {"prompt": "The story of Paris", "at": [-1]},
        },
        {"do": "ablate", "part": "head", "layer": 3, "heads": [40]},
    ]
    page.get_by_text("The edits as JSON").click()
    shown = json.loads(page.locator("details pre").inner_text())["intervene"]["edits"]
    assert shown == edits
    row = page.get_by_role("list", name="Edits").get_by_role("listitem").last
    with page.expect_response("**/v1/chat/completions") as refusal:
        page.get_by_role("button", name="Write again with the edits").click()
    assert refusal.value.status == 400
    expect(row.get_by_role("alert")).to_have_text("intervene.edits[4].heads must be in [0, 3]")
    expect(page.get_by_role("button", name="Compare")).to_be_hidden()  # it is no version
    page.get_by_role("checkbox", name="Use: head 40 of layer 3 off").uncheck()
    expect(row.get_by_role("alert")).to_have_count(0)
    write(page, "Write again with the edits")
    expect(page.get_by_role("region", name="Edited", exact=True)).to_contain_text("4 edits")
    assert_cells_have_a_menu_by_key_and_pointer(page)


def assert_cells_have_a_menu_by_key_and_pointer(page):
    page.get_by_role("tab", name="Heads").click()
    cells = page.get_by_role("img", name=re.compile("^Every head of every layer"))
    cells.focus()
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Shift+F10")
    expect(page.get_by_role("menuitem")).to_have_count(3)
    page.get_by_role("menuitem", name="Switch this head off").press("Enter")
    shelf = page.get_by_role("list", name="Edits").get_by_role("listitem")
    expect(shelf.last).to_have_text(re.compile(r"^head \d of layer \d off$"))
    page.get_by_role("tab", name="Matrix").click()
    matrix = page.get_by_role("img", name=re.compile("^Attention of layer"))
    size = matrix.bounding_box()
    matrix.click(button="right", position={"x": size["width"] * 0.4, "y": size["height"] * 0.8})
    page.get_by_role("menuitem", name="Block this edge").click()
    expect(shelf.last).to_have_text(re.compile(r"^place \d+ does not read place \d+ in all heads"))
    page.get_by_role("tab", name="Matrix").click()
    page.get_by_role("button", name="Change it…").click()
    page.get_by_role("menuitem", name="Look at this token").click()
    expect(page.get_by_role("menu")).to_be_hidden()


def test_a_direction_comes_from_pairs_and_a_patch_from_a_grid_that_fills(page, tiny):
    pairs = [("The capital of France", "The story of Paris"), ("What is", "once the")]
    for at, texts in enumerate(pairs, 1):
        for side, text in zip(("More", "Less"), texts, strict=True):
            page.get_by_role("textbox", name=f"{side} of this, pair {at}").fill(text)
    page.get_by_role("button", name="Find the direction").click()
    expect(page.get_by_text(re.compile("tell the columns apart best"))).to_be_visible()
    shelf = page.get_by_role("list", name="Edits").get_by_role("listitem")
    expect(shelf).to_have_text([re.compile(r"^ours, layer [1-2] \+ [\d.]+ norms$")])
    vector = httpx.get(f"{tiny}/inspect/vectors/ours", timeout=30).json()
    assert (vector["source"], vector["model"]) == ("pairs", MODEL)
    position = len(completion(tiny, QUESTION, MODEL)[0])
    choose(page, position)
    page.get_by_role("textbox", name="In place of").fill("France")
    page.get_by_role("textbox", name="Put instead").fill("no such length of a text")
    page.get_by_role("button", name="Fill the grid").click()
    expect(page.get_by_text(re.compile("they must have as many"))).to_be_visible()
    page.get_by_role("textbox", name="Put instead").fill("Paris")
    with page.expect_request("**/inspect/patch") as sent:
        page.get_by_role("button", name="Fill the grid").click()
    body = json.loads(sent.value.post_data)
    expect(page.get_by_text(re.compile("^0 is “.*”, 1 is “.*”"))).to_be_visible()
    grid = httpx.post(f"{tiny}/inspect/patch", json={**body, "job": False}, timeout=30).json()
    cells = page.get_by_role("img", name=re.compile("^Grid of layers"))
    cells.focus()
    page.keyboard.press("ArrowDown")
    value = f"{grid['grid'][1][0]:.2f}".replace("-0.00", "0.00").replace("-", "−")
    expect(page.locator("p.readout:visible").last).to_have_text(
        f"Layer 1, “·France” {body['positions'][0]}: {value}"
    )
    page.keyboard.press("Enter")
    expect(shelf.last).to_have_text(re.compile(r"^place \d+ in layer 1 from place \d+ of"))
    assert violations(page, "#view-inside") == []
    assert_grid_fills_and_is_cancelled(page, grid)


def assert_grid_fills_and_is_cancelled(page, grid):
    """A job that goes on: its cells are shown as they come, and it ends when it is told to."""
    result = {**grid, "grid": [[1.0, *[None] * (len(row) - 1)] for row in grid["grid"]]}
    job = {"id": "job-1", "state": "running", "done": 4, "total": 40, "left_s": 9.2}
    sent = []

    def answer(route):
        sent.append(route.request.method)
        state = "cancelled" if "DELETE" in sent else "running"
        route.fulfill(json={**job, "state": state, "error": None, "result": result})

    page.route("**/inspect/patch", lambda route: route.fulfill(json={"id": "job-1"}))
    page.route("**/inspect/jobs/*", answer)
    page.get_by_role("button", name="Fill the grid").click()
    expect(page.get_by_text("4 of 40 cells; about 10 s more")).to_be_visible()
    expect(page.get_by_role("progressbar", name="Cells of the grid")).to_have_attribute("max", "40")
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("progressbar")).to_be_hidden()
    assert sent.count("DELETE") == 1


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
    assert httpx.put(f"{tiny}/inspect/vectors/calm", timeout=30, json=numbers).status_code < 300
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
            f"{tiny}/inspect/logit_parts",
            json={**body, "model": MODEL, "by": by, "topk": 12},
            timeout=30,
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


GARBAGE = (
    "%%%",
    "e30",  # {}
    "eA" * 4000,
    values([None, ["constructor", 1], ["head", 1, 0], ["head", 1, -1, 0], ["head", 1, 0, "0"]]),
    values([["mlp", 1, 0, 99], ["vector", 1, 0, "../x", 0.2], ["patch", 1, 0, 1, 7, "", 1]]),
)


def test_a_link_with_anything_else_than_edits_is_no_link_with_edits(open_page, tiny):
    page = begin(open_page(tiny, None))
    for number, packed in enumerate((*GARBAGE, values([["head", 1, 0, 1]]))):
        page.goto(f"/ui?{number}#inside?edits={packed}")
        expect(page.get_by_role("heading", name="Nothing to look into yet")).to_be_visible()
        expect(page.get_by_text("edits of the link")).to_have_count(int(packed not in GARBAGE))


def test_questions_about_an_edited_answer_ask_the_model_that_wrote_it(page, tiny):
    add(page, "Switch a head off", 1, head=2)
    write(page, "Write again with the edits")
    page.get_by_role("button", name="End the comparison").click()
    prompt, _ = completion(tiny, QUESTION, MODEL)
    position = len(prompt) + 1
    choose(page, position)
    said = page.get_by_text("Asked of the model with the edit of this answer.")
    page.get_by_role("tab", name="Why").click()
    expect(said.locator("visible=true")).to_have_count(1)
    assert asked(page, "attribution", "Ask why")["intervene"] == {"edits": [OFF]}
    page.get_by_role("tab", name="Change").click()
    expect(said.locator("visible=true")).to_have_count(2)  # of the parts, of the grid
    body = asked(page, "logit_parts", "Take the logit apart")
    assert body["intervene"] == {"edits": [OFF]}
    shown = rows(page, "Shares of the logit")
    answer = httpx.post(f"{tiny}/inspect/logit_parts", json=body, timeout=30).json()
    values = sorted((part["value"] for part in answer["parts"]), key=abs, reverse=True)
    assert [row[-1].replace("−", "-") for row in shown] == [f"{value:+.2f}" for value in values]
    assert [row[0] for row in shown if "edit" in row[0]] == ["the edit of heads of layer 1"]
    page.get_by_role("textbox", name="In place of").fill("France")
    page.get_by_role("textbox", name="Put instead").fill("Paris")
    assert asked(page, "patch", "Fill the grid")["intervene"] == {"edits": [OFF]}
    page.get_by_role("tab", name="Token").click()
    with page.expect_request("**/v1/completions") as sent:
        page.get_by_role("button", name=re.compile("^Branch with ")).nth(1).click()
    assert sent.value.post_data_json["intervene"] == {"edits": [OFF]}
    branches = page.get_by_role("list", name="Branches")
    expect(branches).to_contain_text("changed by 1 edit")
    page.get_by_role("button", name=re.compile("^Keep the branch ")).click()
    page.get_by_role("tab", name="Why").click()
    choose(page, position)
    assert asked(page, "attribution", "Ask why")["intervene"] == {"edits": [OFF]}


def asked(page, route, button):
    """The body of the question that a button asks, once it is answered."""
    with page.expect_response(f"**/inspect/{route}") as answered:
        page.get_by_role("button", name=button).click()
    assert answered.value.ok, answered.value.text()
    return answered.value.request.post_data_json


def test_a_feature_is_set_and_a_place_is_patched_from_a_stored_run(page, tiny):
    saved = io.BytesIO()
    numbers = numpy.random.default_rng(0).normal(size=(32, 64)).astype(numpy.float32)
    zeros = {"b_enc": numpy.zeros(64, numpy.float32), "b_dec": numpy.zeros(32, numpy.float32)}
    numpy.savez(saved, W_enc=numbers, W_dec=numbers.T / 32, **zeros)
    put = httpx.put(f"{tiny}/inspect/saes/words?layer=2", content=saved.getvalue(), timeout=30)
    assert put.status_code < 300, put.text
    resid = {"part": "resid", "layers": [1], "format": "stored"}
    body = {"model": MODEL, "prompt": "once the story of Paris", "max_tokens": 4}
    body["trace"] = {"activations": [resid]}
    run = httpx.post(f"{tiny}/inspect/runs", json=body, timeout=30).json()["id"]
    kind = page.get_by_role("combobox", name="Kind of edit")
    kind.select_option(label="Set a feature of an autoencoder")
    page.get_by_role("combobox", name="Autoencoder").select_option("words")
    page.get_by_role("spinbutton", name="Feature").fill("64")
    page.get_by_role("spinbutton", name="Feature").press("Tab")
    expect(page.get_by_text("feature must be in [0, 63]")).to_be_visible()
    page.get_by_role("spinbutton", name="Feature").fill("7")
    page.get_by_role("spinbutton", name="Feature").press("Tab")
    raised = httpx.get(f"{tiny}/inspect/saes/words/features/7", timeout=30).json()["raised"]
    expect(page.get_by_text(f"Makes likelier: “{visible(raised[0]['token'])}”")).to_be_visible()
    page.get_by_role("button", name="Add the edit").click()
    page.get_by_role("slider", name="How much: feature 7 of words").fill("20")
    kind.select_option(label="Patch a place from another text")
    page.get_by_role("spinbutton", name="Layer").fill("1")
    page.get_by_role("combobox", name="From").select_option(run)
    expect(page.get_by_text("It has kept layer 1.")).to_be_visible()
    page.get_by_role("spinbutton", name="Place here").fill("3")
    page.get_by_role("spinbutton", name="Place there").fill("2")
    page.get_by_role("button", name="Add the edit").click()
    shelf = page.get_by_role("list", name="Edits").get_by_role("listitem")
    expect(shelf).to_have_text(
        ["feature 7 of words = 20", f"place 3 in layer 1 from place 2 of {run}"]
    )
    edits = write(page, "Write again with the edits")["intervene"]["edits"]
    assert edits == [
        {"do": "feature", "sae": "words", "feature": 7, "value": 20},
        {"do": "patch", "layer": 1, "at": [3], "from": {"run": run, "at": [2]}},
    ]
    expect(page.get_by_role("region", name="Edited", exact=True)).to_contain_text("2 edits")
    assert violations(page, "#view-inside") == []
