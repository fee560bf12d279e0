// The tape: the exact tokens of the prompt and of the answer as running text, in rows by role. What a
// template wrote is folded. Tokens that come are appended; nothing is built again.
import { h, svg } from "../core/dom.js";
import { inside } from "../words/inside.js";
import { addChips, chip } from "./chips.js";
import { hasFacts, lastPosition, promptLength, rowsOf, tokenAt, level } from "./tokens.js";

export class Tape {
  /** `onPick(node, position)`; with `isShort` the answer alone. */
  constructor(node, onPick, { isShort = false } = {}) {
    this.node = node;
    this.onPick = onPick;
    this.isShort = isShort;
    this.chips = new Map(); // position → element
    this.folds = []; // {start, end, element, share, open()}
    this.prompted = promptLength(node);
    this.arcs = svg("svg", { class: "arcs", "aria-hidden": "true" });
    this.rows = h("div", { role: "group", "aria-label": inside.tokens, class: "rows" });
    this.element = h("div", { class: "tape-tokens" }, this.arcs, this.rows);
    this.pressed = null;
    this.drawn = promptLength(node);
    this.build();
    this.element.addEventListener("click", (event) => this.picked(event));
    this.element.addEventListener("pointerover", (event) => this.pointed(event.target.closest(".tok")));
    this.element.addEventListener("keydown", (event) => {
      if ((event.key === "Enter" || event.key === " ") && this.picked(event)) event.preventDefault();
    });
  }

  /** Say of a token that is pointed at where it stands; only then, as there are thousands. */
  pointed(element) {
    if (!element || element.title || element.closest(".forks")) return;
    const position = Number(element.dataset.p);
    const { id, surprisal } = tokenAt(this.node, position);
    element.title = inside.pointed(position, id, surprisal);
  }

  picked(event) {
    const element = event.target.closest(".tok");
    if (!element || element.closest(".forks")) return false;
    this.onPick(this.node, Number(element.dataset.p));
    return true;
  }

  row(role, isCurrent = false) {
    const box = h("div", { class: "toks", dir: "auto" });
    this.rows.append(h("div", { class: `seg${isCurrent ? " cur" : ""}` }, h("div", { class: "role", text: inside.role(role) }), box));
    return box;
  }

  build() {
    const { rows, introduction } = this.isShort ? { rows: [], introduction: [] } : rowsOf(this.node);
    for (const { role, runs } of rows) {
      const box = this.row(role);
      for (const run of runs) this.addRun(box, run);
    }
    this.answer = this.row("assistant", true);
    for (const run of introduction) this.addRun(this.answer, run);
    this.append();
  }

  addRun(box, { role, start, end }) {
    if (role === "template") this.fold(box, start, end);
    else addChips(box, this.make(start, end));
  }

  make(start, end, isFresh = false) {
    const made = [];
    for (let position = start; position < end; position += 1) {
      const token = tokenAt(this.node, position);
      if (!token) break;
      const element = chip(token, position, isFresh);
      this.chips.set(position, element);
      made.push(element);
    }
    return made;
  }

  /** A template's tokens behind a button, which says how much attention they take. */
  fold(box, start, end) {
    const inner = h("span", { class: "folded", hidden: true });
    const share = h("span", { class: "share" });
    const opener = h("button", { type: "button", "aria-expanded": "false", text: inside.templateTokens(end - start) });
    const element = h("span", { class: "tpl", dir: "ltr" }, opener, share); // its words do not set the line's direction
    const open = (isOpen) => {
      if (isOpen && !inner.childElementCount) inner.append(...this.make(start, end));
      inner.hidden = !isOpen;
      opener.setAttribute("aria-expanded", String(isOpen));
      this.onFold?.();
    };
    opener.addEventListener("click", () => open(inner.hidden));
    box.append(h("span", { class: "block" }, element, inner)); // what it introduces goes on in this block
    this.folds.push({ start, end, element, share, open });
  }

  /** Add the tokens that have come since. They fade in where they come one by one; many fades at once
   *  are as many layers. */
  append() {
    const end = lastPosition(this.node) + 1;
    const came = end - this.drawn;
    if (came > 0) addChips(this.answer, this.make(this.drawn, end, came === 1 && Boolean(this.node.live)));
    this.drawn = Math.max(end, this.drawn);
    return came;
  }

  /** True where the prompt has become known since the tape was made. */
  get isOutdated() {
    return this.prompted !== promptLength(this.node);
  }

  /** Show how expected the given tokens were. */
  refreshGiven() {
    if (!hasFacts(this.node)) return;
    for (const [position, element] of this.chips) element.dataset.s = level(tokenAt(this.node, position)?.surprisal);
  }

  chipAt(position) {
    if (!this.chips.has(position)) this.folds.find(({ start, end }) => position >= start && position < end)?.open(true);
    return this.chips.get(position) ?? null;
  }

  /** Mark the token that is asked about; it alone can be reached by Tab. */
  press(element) {
    if (this.pressed === element) return;
    this.pressed?.setAttribute("aria-pressed", "false");
    if (this.pressed) this.pressed.tabIndex = -1;
    this.pressed = element;
    if (!element) return;
    element.setAttribute("aria-pressed", "true");
    element.tabIndex = 0;
  }

  /** Dim what comes after `position`, or nothing (null). */
  hideAfter(position) {
    for (const [place, element] of this.chips) element.classList.toggle("later", position !== null && place > position);
  }
}
