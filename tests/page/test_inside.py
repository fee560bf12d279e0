"""Inside: the numbers that the page shows are those of the API, token by token."""

from __future__ import annotations

import json
import math
import re

import pytest
from playwright.sync_api import TimeoutError, expect

from tests.page.conftest import violations
from tests.page.inside import (
    ask,
    begin,
    choose,
    completion,
    inspect,
    look_inside,
    percent,
    rows,
    token,
    visible,
)
from tests.repeats import slow

QUESTION = "What is the capital of France"
MODEL = "tiny-llama"


@pytest.fixture
def page(tiny, open_page):
    """An answer of a real model, looked into through its last layer."""
    page = begin(open_page(tiny, None))
    ask(page, QUESTION)
    look_inside(page)
    slider = page.get_by_role("slider", name="Layer")
    expect(slider).to_have_attribute("max", "3")  # what the model can show is known
    slider.fill("3")
    return page


@pytest.fixture
def ids(tiny):
    prompt, written = completion(tiny, QUESTION, MODEL)
    return prompt, [*prompt, *written]


SAME = """
([weights, names, count]) => {
  const rows = [...document.querySelectorAll("ul[aria-label='Read from'] li")];
  return rows.length === count && rows.every((row, at) => {
    const place = Number(row.querySelector("small").textContent);
    const share = Number.parseFloat(row.querySelector(".p").textContent);
    const before = at ? Number.parseFloat(rows[at - 1].querySelector(".p").textContent) : 100;
    return row.querySelector(".name").textContent === names[place] && share <= before
      && Math.abs(share - 100 * weights[place]) <= 0.06; // half of the digit that is shown, and of a half float
  });
}
"""


def assert_reads(page, weights: list[float], names: list[str], *, hides_first: bool = True) -> None:
    """The list has the heaviest places, each with its own token and share; and no others."""
    if hides_first and len(weights) > 1:
        weights = [0.0, *(weight / (1 - weights[0]) for weight in weights[1:])]
    count = min(7, sum(weight > 0.002 for weight in weights))
    try:
        page.wait_for_function(
            SAME, arg=[weights, [visible(name) for name in names], count], timeout=8_000
        )
    except TimeoutError:
        pytest.fail(f"{rows(page, 'Read from')} is not of {weights}")


def test_every_number_of_the_panel_is_that_of_the_api(page, tiny, ids):
    prompt, whole = ids
    table = inspect(tiny, "tokens", model=MODEL, token_ids=whole, logprobs=True, topk=10)
    names = table["tokens"]
    for position in range(len(prompt), len(whole)):
        text = names[position]
        said = text.strip() or ("line break" if "\n" in text else "space")
        expect(token(page, position).first).to_have_attribute(
            "aria-label", f"Token {position}: {said}"
        )
    position = len(prompt) + 5
    choose(page, position)
    facts = page.locator("dl.facts dd")
    expect(facts.nth(0)).to_have_text(percent(math.exp(-table["surprisal"][position])))
    expect(facts.nth(1)).to_have_text(f"{table['surprisal'][position]:.2f} nats")
    among = math.exp(table["entropy"][position])
    expect(facts.nth(2)).to_have_text(f"{among:.1f} words" if among < 10 else f"{among:.0f} words")
    page.get_by_role("button", name="4 more").click()
    expected = [
        [visible(entry["token"]), percent(math.exp(entry["logprob"]))]
        for entry in table["topk"][position]
    ]
    assert rows(page, "Candidates") == expected
    lens = inspect(
        tiny,
        "logit_lens",
        model=MODEL,
        token_ids=whole[:position],
        layers="all",
        positions=[position - 1],
        topk=1,
    )
    expect(page.get_by_role("list", name="Layer by layer").locator("li").first).to_be_visible()
    said = [
        cell["topk"][0]
        for layer, cell in zip(lens["layers"], lens["cells"][0], strict=True)
        if layer >= 0
    ]
    runs: list[dict] = []
    for layer, cell in enumerate(said):
        if runs and runs[-1]["token_id"] == cell["token_id"]:
            runs[-1]["to"], runs[-1]["prob"] = layer, max(runs[-1]["prob"], cell["prob"])
        else:
            runs.append(cell | {"from": layer, "to": layer})
    assert rows(page, "Layer by layer") == [
        [
            str(run["from"]) if run["from"] == run["to"] else f"{run['from']} to {run['to']}",
            visible(run["token"]),
            f"{100 * run['prob']:.0f} %",
        ]
        for run in reversed(runs)
    ]


def test_weight_j_belongs_to_token_j_for_every_token_layer_and_head(page, tiny, ids):
    prompt, whole = ids
    names = inspect(tiny, "tokens", model=MODEL, token_ids=whole)["tokens"]

    def row(position: int, layer: int, head: int | str) -> list[float]:
        answer = inspect(
            tiny,
            "full_attn",
            model=MODEL,
            token_ids=whole[:position],
            trace_layer=layer,
            head=head,
            rows=[position - 1, position],
        )
        assert len(answer["attn"][0]) == position  # p weights, for positions 0 to p - 1
        return answer["attn"][0]

    for position in (
        len(prompt),
        len(prompt) + 1,
        len(whole) - 1,
    ):  # written: the trace's own row, then the exact one
        choose(page, position)
        assert_reads(page, row(position, 3, "mean"), names)
    for position in (1, 2, len(prompt) - 1):  # given
        page.get_by_role(
            "button", name=re.compile("template token")
        ).first.scroll_into_view_if_needed()
        while not token(page, position).count():
            page.locator("[aria-expanded=false]").get_by_text("template token").first.click()
        choose(page, position)
        assert_reads(page, row(position, 3, "mean"), names)
    position = len(prompt) + 4
    choose(page, position)
    page.get_by_role("checkbox", name="Hide the first token").uncheck()
    assert_reads(page, row(position, 3, "mean"), names, hides_first=False)
    page.get_by_role("slider", name="Layer").fill("1")
    assert_reads(page, row(position, 1, "mean"), names, hides_first=False)
    page.get_by_role("combobox", name="Head").select_option("2")
    assert_reads(page, row(position, 1, 2), names, hides_first=False)
    page.get_by_role("combobox", name="Head").select_option("max")
    assert_reads(page, row(position, 1, "max"), names, hides_first=False)


def test_a_given_token_says_how_expected_it_was_when_asked(page, tiny, ids):
    _, whole = ids
    spans = inspect(tiny, "tokens", model=MODEL, messages=[{"role": "user", "content": QUESTION}])[
        "spans"
    ]
    position = next(span for span in spans if span["role"] == "user")["start"] + 2
    choose(page, position)
    page.get_by_role("button", name="Ask how expected this was").click()
    table = inspect(tiny, "tokens", model=MODEL, token_ids=whole, logprobs=True, topk=10)
    expect(page.locator("dl.facts dd").nth(1)).to_have_text(
        f"{table['surprisal'][position]:.2f} nats"
    )
    assert rows(page, "Candidates")[0] == [
        visible(table["topk"][position][0]["token"]),
        percent(math.exp(table["topk"][position][0]["logprob"])),
    ]
    expect(page.get_by_role("button", name="Branch with")).to_have_count(0)


def test_the_heads_the_matrix_and_the_reasons_are_those_of_the_api(page, tiny, ids):
    prompt, whole = ids
    choose(page, len(prompt) + 3)
    page.get_by_role("tab", name="Heads").click()
    grid = inspect(tiny, "heads", model=MODEL, token_ids=whole, thumb=20)
    canvas = page.get_by_role("img", name=re.compile("Every head of every layer"))
    canvas.focus()
    canvas.press("ArrowUp")
    canvas.press("ArrowRight")
    head = grid["layers"][2]["heads"][1]
    expect(page.locator("#pane-heads")).to_contain_text(
        f"Layer 2, head 1: first {percent(head['first'])}, one before {percent(head['previous'])}"
    )
    page.get_by_role("combobox", name="Measure").select_option("entropy")
    canvas.press("Enter")
    expect(page.get_by_role("slider", name="Layer")).to_have_value("2")
    expect(page.get_by_role("combobox", name="Head")).to_have_value("1")

    page.get_by_role("tab", name="Matrix").click()
    page.get_by_role("tab", name="Matrix").press("Tab")
    matrix = inspect(tiny, "full_attn", model=MODEL, token_ids=whole, trace_layer=2, head=1)["attn"]
    canvas = page.get_by_role("img", name=re.compile("Attention of layer 2, head 1"))
    canvas.focus()
    canvas.press("ArrowLeft")
    row, column = len(prompt) + 2, len(prompt) + 1
    share = matrix[row][column] / (1 - matrix[row][0])
    shown = page.locator("#pane-matrix .readout")
    expect(shown).to_contain_text(f" {column}")
    said = re.search(r"reads (<?[\d.]+) % from", shown.inner_text())[1].lstrip("<")
    assert abs(float(said) - 100 * share) < 0.3  # a byte of the largest in the row, over the rest
    canvas.press("+")
    expect(page.locator("#pane-matrix")).not_to_contain_text(f"rows 0 to {len(whole) - 1},")

    page.get_by_role("tab", name="Why").click()
    page.get_by_role("button", name="Ask why").click()
    position = len(prompt) + 3
    scores = inspect(
        tiny,
        "attribution",
        model=MODEL,
        token_ids=whole[:position],
        target_token_id=whole[position],
    )["scores"]
    place = max(range(len(scores)), key=lambda at: abs(scores[at]))
    expect(
        page.get_by_role("list", name="What each token did").locator("li").first
    ).to_contain_text(f"{'−' if scores[place] < 0 else '+'}{abs(scores[place]):.2f}")
    expect(
        page.get_by_role("list", name="What each token did").locator("li small").first
    ).to_have_text(str(place))


def test_forks_send_token_ids_stand_beside_each_other_and_become_versions(page, ids):
    prompt, whole = ids
    bodies = []
    page.on(
        "request",
        lambda request: (
            bodies.append(json.loads(request.post_data))
            if request.url.endswith("/v1/completions")
            else None
        ),
    )
    position = len(prompt) + 2
    choose(page, position)
    branch = page.get_by_role("button", name=re.compile("^Branch with "))
    expect(branch).to_have_count(5)
    for at in (0, 1, 2):
        branch.nth(at).dispatch_event("click")
    list_ = page.get_by_role("list", name="Branches")
    expect(list_.get_by_role("listitem")).to_have_count(3)
    expect(list_.get_by_role("button", name=re.compile("^Keep the branch "))).to_have_count(3)
    assert len(bodies) == 3
    assert all(body["prompt"][:-1] == whole[:position] for body in bodies)
    assert len({body["prompt"][-1] for body in bodies} | {whole[position]}) == 4
    list_.get_by_role("button", name=re.compile("^Remove the branch ")).nth(2).click()
    expect(list_.get_by_role("listitem")).to_have_count(2)
    # What a branch wrote can be asked about, as any token.
    fork = list_.get_by_role("listitem").first
    fork.get_by_role("button", name=re.compile(rf"^Token {position + 1}: ")).click()
    expect(page.locator(".where").first).to_have_text(re.compile("^written, 4 of"))
    expect(page.get_by_role("list", name="Read from").locator("li").first).to_be_visible()
    forced = fork.get_by_role("button", name=re.compile(rf"^Token {position}: ")).get_attribute(
        "aria-label"
    )
    list_.get_by_role("button", name=re.compile("^Keep the branch ")).first.click()
    expect(page.get_by_role("button", name=forced, exact=True)).to_have_attribute(
        "aria-pressed", "true"
    )
    page.get_by_role("button", name="Compare", exact=True).click()
    expect(page.get_by_text("The first 2 tokens are the same.")).to_be_visible()
    expect(page.get_by_role("region", name="Run A")).to_be_visible()
    page.get_by_role("region", name="Run B").get_by_role(
        "button", name=re.compile(rf"^Token {position}: ")
    ).click()
    expect(page.locator("dl.facts dd").first).to_be_visible()
    page.get_by_role("button", name="End the comparison").click()
    page.get_by_role("tab", name="Chat").click()
    expect(page.get_by_role("group", name="Versions")).to_contain_text("2 / 2")


def test_everything_is_reached_by_the_keyboard_alone(page, ids):
    prompt, whole = ids
    last = len(whole) - 1
    page.get_by_role("tab", name="Inside").focus()
    page.keyboard.press("Home")
    expect(page.get_by_role("tab", name="Chat")).to_be_focused()
    page.keyboard.press("ArrowRight")
    while not page.evaluate("document.activeElement.matches('.tok')"):
        page.keyboard.press("Tab")  # the tape is one stop
    page.keyboard.press("Home")
    expect(token(page, len(prompt))).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(token(page, len(prompt) + 1)).to_have_attribute("aria-pressed", "true")
    page.keyboard.press("End")
    expect(token(page, last)).to_be_focused()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("[")
    expect(page.get_by_role("slider", name="Layer")).to_have_value("2")
    page.keyboard.press("]")
    expect(page.get_by_role("slider", name="Layer")).to_have_value("3")
    page.keyboard.press("h")
    expect(page.get_by_role("checkbox", name="Hide the first token")).not_to_be_checked()
    page.keyboard.press("m")
    expect(page.get_by_role("combobox", name="Head")).to_have_value("max")
    page.keyboard.press("m")
    expect(page.get_by_role("combobox", name="Head")).to_have_value("0")
    while not page.evaluate("document.activeElement.textContent === 'Branch'"):
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    keep = page.get_by_role("button", name=re.compile("^Keep the branch "))
    expect(keep).to_have_count(1)
    keep.focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("list", name="Branches").get_by_role("listitem")).to_have_count(0)


@pytest.mark.parametrize("scheme", [*slow("light"), "dark"])
def test_axe_finds_nothing_in_any_pane(tiny, open_page, scheme):
    page = begin(open_page(tiny, None, scheme=scheme, bypass_csp=True))
    page.get_by_role("tab", name="Inside").click()
    expect(page.get_by_role("heading", name="Nothing to look into yet")).to_be_visible()
    assert violations(page) == []
    ask(page, QUESTION)
    expect(page.get_by_role("list", name="Layer by layer").locator("li").first).to_be_visible()
    page.get_by_role("button", name=re.compile("^Branch with ")).first.dispatch_event("click")
    expect(page.get_by_role("button", name=re.compile("^Keep the branch "))).to_have_count(1)
    assert violations(page) == []
    page.get_by_role("combobox", name="Colour").select_option("decided")
    expect(page.locator(".tok[style]").first).to_be_visible()
    assert violations(page, ".tape") == []
    page.get_by_role("button", name=re.compile("^Keep the branch ")).click()
    page.get_by_role("button", name="Compare", exact=True).click()
    assert violations(page, ".tape") == []
    page.get_by_role("button", name="End the comparison").click()
    for name in ("Heads", "Matrix", "Why"):
        page.get_by_role("tab", name=name).click()
        expect(page.get_by_text(re.compile("Reading|Asking"))).to_have_count(0)
        assert violations(page, "main") == []
