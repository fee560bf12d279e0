// What the model nearly said: its likeliest tokens, each a way to branch.
import { button, h, icon } from "../core/dom.js";
import { percent, spoken, visible } from "../core/format.js";
import { requestButton } from "../shell/request_dialog.js";
import { inside } from "../words/inside.js";
import { rowList, section, write } from "./lists.js";

const FEW = 6;
const CERTAIN = 0.99;

/** The section; `onBranch(candidate)`. Its `show(token, {mayBranch, panel})` fills it, or hides it. */
export function candidates(onBranch) {
  const { element, heading, more } = section(inside.nearly, inside.nearlyMore);
  let shown = null; // {token, mayBranch}
  let isOpen = false;
  const list = rowList(inside.candidates, "cands", makeRow, fillRow);
  const opener = button("", () => { isOpen = !isOpen; show(shown.token, shown); }, { cls: "link", "aria-expanded": "false" });
  const others = h("span");
  const doubts = h("p", { class: "hint num" });
  const certain = h("p", { class: "hint", text: inside.nearlyCertain });
  element.append(list.element, h("p", { class: "else" }, opener, others), certain, doubts);

  function makeRow() {
    const row = { candidate: null, tick: icon("tick", "tick"), name: h("span", { class: "name", dir: "auto" }), share: h("span", { class: "p" }), mark: h("span", { class: "sr" }) };
    row.go = h("button", { type: "button", class: "go", text: inside.branch, onclick: () => onBranch(row.candidate) });
    row.element = h("li", { class: "cand" }, row.tick, row.name, row.go, row.mark, row.share);
    return row;
  }

  function fillRow(row, candidate) {
    const isChosen = candidate.id === shown.token.id;
    row.candidate = candidate;
    row.element.classList.toggle("on", isChosen);
    row.element.style.setProperty("--w", (100 * candidate.p).toFixed(2));
    write(row.name, visible(candidate.text));
    write(row.share, percent(candidate.p));
    write(row.mark, isChosen ? inside.chosen : "");
    row.go.hidden = isChosen || !shown.mayBranch;
    if (!row.go.hidden) row.go.setAttribute("aria-label", inside.branchWith(spoken(candidate.text)));
  }

  /** How far the first is ahead, and if the others are alike. */
  function doubt({ margin, varentropy, entropy }) {
    if (typeof margin !== "number" || typeof varentropy !== "number") return "";
    const kind = entropy > 1 ? (varentropy < entropy ? inside.manyAlike : inside.fewAndTail) : "";
    return [inside.ahead(percent(margin)), kind].filter(Boolean).join(" ");
  }

  function show(token, { mayBranch }) {
    shown = { token, mayBranch };
    const all = token?.topk ?? [];
    element.hidden = all.length === 0;
    if (element.hidden) return;
    const some = isOpen ? all : all.slice(0, FEW);
    write(heading, token.isGiven ? inside.wouldHave : inside.nearly);
    write(more, mayBranch ? inside.nearlyMore : "");
    list.show(some);
    opener.hidden = all.length <= FEW;
    opener.setAttribute("aria-expanded", String(isOpen));
    write(opener.firstChild, isOpen ? inside.fewer : inside.more(all.length - FEW));
    write(others, inside.rest(percent(Math.max(0, 1 - some.reduce((sum, { p }) => sum + p, 0)))));
    write(doubts, doubt(token));
    certain.hidden = !(all[0]?.p > CERTAIN);
  }

  element.querySelector("header").append(requestButton("answer"));
  element.querySelector(".braces").setAttribute("aria-label", inside.candidatesRequest);
  return { element, show };
}
