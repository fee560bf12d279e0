// Layer by layer: what the model would have said had it stopped there, equal neighbours as one.
import { editsOf } from "../chat/changed.js";
import { button, h } from "../core/dom.js";
import { visible } from "../core/format.js";
import { state } from "../core/state.js";
import { requestButton } from "../shell/request_dialog.js";
import { inside } from "../words/inside.js";
import { rowList, section, write } from "./lists.js";
import { isResident, mayAsk } from "./model.js";
import { inspect, isGivenUp } from "./queue.js";
import { idsUpTo, isGiven, promptLength } from "./tokens.js";

const CELLS = 4096; // at most in one question
const kept = new WeakMap(); // node → Map of position → readings

const readingsOf = (node) => kept.get(node) ?? kept.set(node, new Map()).get(node);

/** [{layer, id, text, p}] of a token, the last layer last; or null. A trace's own lens counts, too. */
export function readingsAt(node, position, token) {
  return readingsOf(node).get(position)
    ?? token?.lens?.map((reading) => ({ layer: reading.layer, id: reading.token_id, text: reading.token, p: reading.prob }))
    ?? null;
}

const question = (node, positions, topk) => ({
  model: node.model, ...editsOf(node, positions.at(-1)), token_ids: idsUpTo(node, positions.at(-1)), layers: "all", positions: positions.map((position) => position - 1), topk,
});

function take(node, positions, answer) {
  positions.forEach((position, row) => {
    readingsOf(node).set(position, answer.layers.map((layer, at) => {
      const [likeliest] = answer.cells[row][at].topk;
      return { layer, id: likeliest.token_id, text: likeliest.token, p: likeliest.prob };
    }));
  });
}

/** The layer from which on the token was in the first place; null where it never stayed there. */
export function decidedAt(readings, id) {
  let from = null;
  for (const reading of readings.toReversed()) {
    if (reading.id !== id) break;
    from = reading.layer;
  }
  return from;
}

/** Read all layers of every written token; `onProgress(done, all)`. */
export async function readAll(node, onProgress) {
  const start = promptLength(node);
  const missing = node.tokens.map((_, at) => start + at).filter((position) => position > 0 && !readingsOf(node).has(position));
  const step = Math.max(1, Math.min(64, Math.floor(CELLS / ((state.anatomy?.layers ?? 1) + 1))));
  for (let at = 0; at < missing.length; at += step) {
    onProgress(at, missing.length);
    const positions = missing.slice(at, at + step);
    take(node, positions, await inspect("decided", "logit_lens", question(node, positions, 1)));
  }
  onProgress(missing.length, missing.length);
}

/** Neighbours that say the same, as one; the last layer first. */
function merged(readings) {
  const runs = [];
  for (const { layer, id, text, p } of readings) {
    const run = runs.at(-1);
    if (run?.id === id) Object.assign(run, { to: layer, p: Math.max(run.p, p) });
    else runs.push({ from: layer, to: layer, id, text, p });
  }
  return runs.reverse();
}

/** The section. `show(node, position, token)` fills it; asks where it has to. */
export function lens(again) {
  const { element, more } = section(inside.byLayer, inside.byLayerMore);
  const list = rowList(inside.byLayer, "lens", makeRow, fillRow);
  const when = h("p", { class: "hint strong" });
  const note = h("p", { class: "hint", dir: "auto" });
  const retry = button(inside.askAgain, again, { cls: "btn small" });
  element.append(list.element, when, note, retry);
  const braces = requestButton("lens");
  braces.setAttribute("aria-label", inside.layersRequest);
  element.querySelector("header").append(braces);
  let current = null;

  function makeRow() {
    const row = { layer: h("span", { class: "l" }), name: h("span", { class: "name", dir: "auto" }), share: h("span", { class: "p" }) };
    row.element = h("li", {}, row.layer, row.name, row.share);
    return row;
  }

  function fillRow(row, run) {
    row.element.classList.toggle("hit", run.id === current.token.id);
    write(row.layer, run.to === -1 ? inside.embedding : inside.layers(Math.max(0, run.from), run.to));
    write(row.name, visible(run.text));
    write(row.share, `${Math.round(100 * run.p)} %`);
  }

  function fill(readings, sentence = inside.earlyLayers, mayRetry = false) {
    list.show(readings ? merged(readings.filter(({ layer }) => layer >= 0)) : []);
    const from = readings ? decidedAt(readings, current.token.id) : null;
    write(when, readings ? (from === null ? inside.neverFirst : inside.decidedAt(Math.max(0, from))) : "");
    write(note, sentence);
    retry.hidden = !mayRetry;
    element.toggleAttribute("data-asking", false);
  }

  async function show(node, position, token) {
    element.hidden = isGiven(node, position) || position === 0;
    if (element.hidden) return;
    current = { node, position, token };
    const readings = readingsAt(node, position, token);
    if (readings) return fill(readings);
    if (node.live) return fill(null, inside.lensLater);
    if (!mayAsk(node) || !isResident(node)) return fill(null, node.isSaved ? inside.rowGone : "");
    if (state.anatomy && !state.anatomy.lens?.available) return fill(null, inside.lensNone);
    write(more, inside.byLayerMore);
    element.toggleAttribute("data-asking", true);
    const asked = current;
    try {
      take(node, [position], await inspect("lens", "logit_lens", question(node, [position], 3)));
      if (current === asked) fill(readingsAt(node, position, token));
    } catch (failure) {
      if (!isGivenUp(failure) && current === asked) fill(null, failure.message, true);
    }
    return undefined;
  }
  return { element, show };
}
