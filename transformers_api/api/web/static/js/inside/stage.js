// The left side of Inside: legend and tools, a note, the tape or two of them, branches.
import { button, h } from "../core/dom.js";
import { menu } from "../shell/menu.js";
import { inside } from "../words/inside.js";
import { comparison } from "./compare.js";
import { ForkList } from "./fork_list.js";
import { baseOf } from "./forks.js";
import { write } from "./lists.js";
import { Replay } from "./replay.js";
import { Shade } from "./shade.js";
import { Tape } from "./tape.js";

const swatches = () => h("span", { class: "sw", "aria-hidden": "true" }, ...[8, 25, 50, 100].map((share) => h("i", { vars: { "--a": share } })));
const lines = () => h("span", { class: "ul", "aria-hidden": "true" }, ...[1.5, 3, 4.5, 6].map((height) => h("i", { vars: { "--h": `${height}px` } })));

export class Stage {
  /** `actions`: onPick(node, position), onStep(step), onColour(name), onCompare(), onChoose(other), onEndCompare(), onMeasured(), fileEntries(). */
  constructor(actions) {
    this.actions = actions;
    this.node = null;
    this.tapes = [];
    this.forks = null;
    this.compared = null; // the other run
    this.colour = h("select", { class: "sel", "aria-label": inside.colour }, ...Object.entries(inside.colours).map(([value, text]) => h("option", { value, text })));
    this.colour.addEventListener("change", () => actions.onColour(this.colour.value));
    this.replay = new Replay((step) => actions.onStep(step));
    this.comparer = button(inside.compare, actions.onCompare, { cls: "ghost", glyph: "columns", shows: true, "aria-label": inside.compare, title: inside.compare });
    this.files = button(inside.tools, null, { cls: "ghost", glyph: "download", shows: true, id: "inside-files", "aria-label": inside.tools, title: inside.tools, "aria-haspopup": "menu", "aria-expanded": "false" });
    menu(this.files, actions.fileEntries);
    this.legend = h("span", { class: "key" }, this.colour, swatches());
    const head = h("div", { class: "tape-head" }, this.legend, h("span", { class: "key" }, h("span", { text: inside.surprising }), lines()),
      h("span", { class: "tools" }, this.replay.element, this.comparer, this.files));
    this.note = h("p", { class: "hint note-line", dir: "auto" });
    this.noteAction = button("", () => this.noteAct?.(), { cls: "btn small" });
    this.body = h("div", { class: "tape-body" });
    this.inner = h("div", { class: "tape-in" }, head, h("div", { class: "notes" }, this.note, this.noteAction), this.body);
    this.element = h("div", { class: "tape", tabindex: "-1" }, this.inner);
  }

  /** Show an answer, or two beside each other. */
  show(node, other, others) {
    this.node = node;
    this.compared = other;
    if (other) {
      const { onPick, onChoose, onEndCompare: onEnd, onMeasured } = this.actions;
      const { element, tapes, grow } = comparison(node, other, others, { onPick, onChoose, onEnd, onMeasured });
      this.grow = grow;
      this.tapes = tapes;
      this.forks = null;
      this.body.replaceChildren(element);
    } else {
      const tape = new Tape(node, this.actions.onPick);
      this.tapes = [tape];
      this.grow = () => tape.append();
      this.forks = new ForkList(node, this.actions.onPick);
      tape.answer.parentElement.append(this.forks.element);
      this.body.replaceChildren(tape.element);
    }
    this.shades = this.tapes.map((tape) => new Shade(tape));
    this.pressed = null;
  }

  /** True where a prompt has become known since it was drawn. */
  get isOutdated() {
    return this.tapes.some((tape) => tape.isOutdated);
  }

  /** The tape and shade in which a node's tokens stand. */
  of(node) {
    const at = Math.max(0, this.tapes.findIndex((tape) => tape.node === baseOf(node)));
    return { tape: this.tapes[at], shade: this.shades[at] };
  }

  /** The element of a token; folded ones are opened only with `opens`. */
  chipAt(node, position, { opens = false } = {}) {
    const { tape } = this.of(node);
    if (node.fork) {
      const own = this.forks?.chipAt(node, position);
      if (own) return own;
    }
    return opens ? tape.chipAt(position) : tape.chips.get(position) ?? null;
  }

  /** Mark the selected token. */
  press(node, position) {
    const element = this.chipAt(node, position, { opens: true });
    for (const tape of this.tapes) if (tape.node !== baseOf(node)) tape.press(null);
    this.of(node).tape.press(element);
    return element;
  }

  say(text, action = "", act = null) {
    write(this.note, text);
    this.noteAct = act;
    this.noteAction.hidden = !act;
    write(this.noteAction.firstChild, action);
    this.note.parentElement.hidden = !text;
  }
}
