// The branches under an answer: the share of the forced token, the beginning that they have in common,
// and what follows. Rows and tokens that are there stay.
import { changedPill } from "../chat/changed.js";
import { button, h } from "../core/dom.js";
import { isSpecial, spoken } from "../core/format.js";
import { inside } from "../words/inside.js";
import { addChips, chip } from "./chips.js";
import { forksOf, keepFork, liveForks, odds, removeFork, stopForks } from "./forks.js";
import { promptLength } from "./tokens.js";

const SHARED = 40; // letters of the common beginning
const LONG = 400; // letters from which on branches stand in columns

/** The list below `node`; `onPick(node, position)`. */
export class ForkList {
  constructor(node, onPick) {
    this.node = node;
    this.rows = new Map(); // fork → {element, chips, drawn, toks}
    this.list = h("ul", { "aria-label": inside.branches, class: "forks" });
    this.stop = button(inside.stopBranches, () => stopForks(node), { cls: "btn small" });
    this.element = h("div", { class: "forkbox" }, this.list, this.stop);
    this.list.addEventListener("click", (event) => this.picked(event, onPick));
    this.list.addEventListener("keydown", (event) => {
      if ((event.key === "Enter" || event.key === " ") && event.target.matches(".tok")) {
        event.preventDefault();
        this.picked(event, onPick);
      }
    });
    this.draw();
  }

  picked(event, onPick) {
    const element = event.target.closest(".tok");
    if (!element) return;
    const [fork] = [...this.rows].find(([, row]) => row.element.contains(element));
    onPick(fork.node, Number(element.dataset.p));
  }

  /** The element of a branch's own token. */
  chipAt(node, position) {
    return this.rows.get(node.fork)?.chips.get(position) ?? null;
  }

  draw() {
    const forks = forksOf(this.node);
    for (const [fork, row] of this.rows) {
      if (!forks.includes(fork)) {
        row.element.remove();
        this.rows.delete(fork);
      }
    }
    for (const fork of forks) {
      if (!this.rows.has(fork)) this.add(fork);
      this.fill(fork, this.rows.get(fork));
    }
    this.element.hidden = forks.length === 0;
    this.stop.hidden = liveForks(this.node).length === 0;
    this.list.classList.toggle("columns", forks.length > 1 && forks.some(({ node }) => node.text.length > LONG));
  }

  add(fork) {
    const name = spoken(fork.candidate.text);
    const before = fork.source.tokens.slice(0, fork.index).filter(({ text }) => !isSpecial(text)).map(({ text }) => text).join("").replaceAll("\n", " ");
    const shared = before.length > SHARED ? `…${before.slice(2 - SHARED)}` : before;
    const tokens = h("span", { class: "follows" });
    const keep = button(inside.keep, () => keepFork(fork), { cls: "btn small", "aria-label": inside.keepBranch(name) });
    const remove = button(inside.removeBranch(name), () => removeFork(fork), { cls: "icon", glyph: "x" });
    const state = h("span", { class: "hint" });
    const element = h("li", { class: "fork" }, h("span", { class: "odds", text: odds(fork) }),
      h("div", { class: "toks", dir: "auto" }, h("span", { class: "shared", text: shared }), tokens, state, changedPill(fork.node)), h("div", { class: "row" }, keep, remove));
    this.rows.set(fork, { element, tokens, keep, state, chips: new Map(), drawn: fork.index });
    this.list.append(element);
  }

  fill(fork, row) {
    const start = promptLength(fork.node);
    const made = [];
    for (; row.drawn < fork.node.tokens.length; row.drawn += 1) {
      const token = fork.node.tokens[row.drawn];
      if (isSpecial(token.text) && !token.forced) continue; // what ends it has no text
      const element = chip(token, start + row.drawn, row.drawn > fork.index);
      if (token.forced) element.title = inside.forced;
      row.chips.set(start + row.drawn, element);
      made.push(element);
    }
    addChips(row.tokens, made);
    row.keep.hidden = Boolean(fork.node.live);
    row.element.toggleAttribute("data-live", Boolean(fork.node.live));
    row.state.textContent = fork.node.finish === "stopped" ? inside.branchStopped : "";
  }
}
