// What the selected token read, on the tape: shade behind the tokens, arcs to the heaviest, shares on
// the folds. Only what changes is written; boxes are read before anything is.
import { svg } from "../core/dom.js";
import { heaviest } from "./rows.js";

const LEAST = 0.003;
const ARCS = 5;
const ARC_LEAST = 0.03;

export class Shade {
  constructor(tape) {
    this.tape = tape;
    this.shaded = new Map(); // element → 0 to 100
    this.start = 0; // the first token that was read at all
    this.paths = [];
  }

  /** Shade the weights {values, start}, or nothing (null). `chipAt(position)` gives elements. */
  show(weights, chipAt) {
    const next = new Map();
    let most = 1e-9;
    if (weights) for (const value of weights.values) most = Math.max(most, value);
    if (weights) {
      weights.values.forEach((value, key) => {
        const element = value > LEAST ? chipAt(weights.start + key) : null;
        if (element) next.set(element, Math.round(100 * Math.sqrt(value / most)));
      });
    }
    for (const element of this.shaded.keys()) if (!next.has(element)) element.style.removeProperty("--a");
    for (const [element, share] of next) if (this.shaded.get(element) !== share) element.style.setProperty("--a", share);
    this.shaded = next;
    this.showFolds(weights);
    this.dim(weights?.start ?? 0);
  }

  showFolds(weights) {
    for (const { start, end, element, share } of this.tape.folds) {
      let sum = 0;
      if (weights) for (let at = start; at < end; at += 1) sum += weights.values[at - weights.start] ?? 0;
      const text = sum >= 0.005 ? `${Math.round(100 * sum)} %` : "";
      if (share.textContent !== text) share.textContent = text;
      element.style.setProperty("--a", Math.round(60 * Math.sqrt(Math.min(1, sum))));
    }
  }

  /** Dim the tokens before the window. */
  dim(start) {
    if (start === this.start) return;
    for (const [position, element] of this.tape.chips) element.classList.toggle("unread", position < start);
    this.start = start;
  }

  /** Where arcs would go: read from the layout, nothing written. */
  measure(weights, target, chipAt) {
    if (!weights || !target?.isConnected) return [];
    const base = this.tape.element.getBoundingClientRect();
    const box = (element) => {
      const word = element.querySelector(".t") ?? element;
      const rectangle = word.getClientRects()[0] ?? element.getBoundingClientRect();
      return { x: rectangle.left - base.left + rectangle.width / 2, top: rectangle.top - base.top, bottom: rectangle.bottom - base.top };
    };
    const to = box(target);
    return heaviest(weights, ARCS, ARC_LEAST)
      .map(({ position, weight }) => ({ element: chipAt(position), weight }))
      .filter(({ element }) => element?.isConnected && element !== target && element.getClientRects().length)
      .map(({ element, weight }) => ({ line: curve(box(element), to), weight }));
  }

  /** Draw what was measured; paths are used again. */
  draw(arcs) {
    while (this.paths.length > arcs.length) this.paths.pop().remove();
    arcs.forEach(({ line, weight }, at) => {
      if (!this.paths[at]) {
        this.paths[at] = svg("path");
        this.tape.arcs.append(this.paths[at]);
      }
      this.paths[at].setAttribute("d", line);
      this.paths[at].setAttribute("stroke-width", (1.5 + 6 * weight).toFixed(2));
      this.paths[at].setAttribute("opacity", (0.4 + 0.6 * Math.min(1, 2 * weight)).toFixed(2));
    });
  }
}

/** A curve from the token that was read to the one that read it. */
function curve(from, to) {
  const number = (value) => value.toFixed(1);
  if (Math.abs(from.top - to.top) < 8) {
    const height = Math.min(34, 12 + Math.abs(to.x - from.x) / 7);
    return `M${number(from.x)} ${number(from.top)}C${number(from.x)} ${number(from.top - height)} ${number(to.x)} ${number(to.top - height)} ${number(to.x)} ${number(to.top)}`;
  }
  const middle = (from.bottom + to.top) / 2;
  return `M${number(from.x)} ${number(from.bottom)}C${number(from.x)} ${number(middle + 6)} ${number(to.x)} ${number(middle - 6)} ${number(to.x)} ${number(to.top)}`;
}
