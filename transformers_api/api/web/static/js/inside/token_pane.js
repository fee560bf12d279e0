// The pane "Token": facts, what it nearly said, what it read, layer by layer, and what was verified.
import { button, h, icon } from "../core/dom.js";
import { percent, visible } from "../core/format.js";
import { state } from "../core/state.js";
import { inside } from "../words/inside.js";
import { candidates } from "./candidates.js";
import { lens } from "./lens.js";
import { write } from "./lists.js";
import { isResident, mayAsk } from "./model.js";
import { reads } from "./reads.js";
import { choices, isGiven, lastPosition, promptLength, tokenAt } from "./tokens.js";

/** A term of the facts, with a value and its unit. */
function fact(term, unit = "") {
  const value = h("span");
  return { value, element: h("div", {}, h("dt", { text: term }), h("dd", {}, value, unit ? h("small", { text: ` ${unit}` }) : null)) };
}

/** `actions`: onStep(-1 or 1), onLive(), onBranch(candidate), onExpected(), onPoint, onPick, onLoad, again(), showRequest(). */
export function tokenPane(actions) {
  const text = h("span", { dir: "auto" });
  const title = h("h2", {}, h("span", { class: "q", text: "“" }), text, h("span", { class: "q", text: "”" }));
  const where = h("span", { class: "where" });
  const live = button(inside.live, actions.onLive, { cls: "btn small live" });
  const previous = button(inside.previous, () => actions.onStep(-1), { cls: "icon", glyph: "left" });
  const next = button(inside.next, () => actions.onStep(1), { cls: "icon", glyph: "right" });
  const probability = fact(inside.probability);
  const surprisal = fact(inside.surprisal, inside.nats);
  const choosing = fact(inside.choosing, inside.words);
  const facts = h("dl", { class: "facts", title: inside.factsHelp }, probability.element, surprisal.element, choosing.element);
  const place = h("p", { class: "hint num" });
  const expected = button(inside.expected, actions.onExpected, { cls: "btn" });
  const head = h("div", { class: "tokhead" }, h("div", { class: "big" }, title, where, h("div", { class: "step" }, live, previous, next)), facts, place, expected);
  const nearly = candidates(actions.onBranch);
  const read = reads(actions);
  const layers = lens(actions.again);
  const proofText = h("span");
  const proof = h("p", { class: "proof" }, icon("shield"), h("span", {}, proofText, " ", h("button", { type: "button", text: inside.showRequest, onclick: actions.showRequest })));
  const body = h("div", { class: "pane-body" }, head, nearly.element, read.element, layers.element, proof);
  const waiting = h("p", { class: "hint", text: inside.onItsWay });
  const element = h("div", {}, waiting, body);

  function showFacts(node, position, token) {
    write(text, visible(token.text));
    title.classList.toggle("special", token.text.length > 12);
    const start = promptLength(node);
    write(where, token.isGiven ? inside.given(position) : inside.written(position - start + 1, node.tokens.length));
    const isKnown = token.surprisal !== null && token.surprisal !== undefined;
    facts.hidden = !isKnown;
    if (isKnown) {
      write(probability.value, percent(token.prob ?? Math.exp(-token.surprisal)));
      write(surprisal.value, token.surprisal.toFixed(2));
      write(choosing.value, choices(token.entropy));
    }
    write(place, [inside.place(position, token.id), token.forced ? inside.forced : ""].filter(Boolean).join("; "));
    expected.hidden = isKnown || position === 0 || !mayAsk(node) || !isResident(node);
    live.hidden = !(node.live && state.isPinned);
    previous.disabled = position <= 0 || (!tokenAt(node, position - 1));
    next.disabled = position >= lastPosition(node);
  }

  /** Fill it for a token, with what is known of its `attention`: {row, weights, because, load, isAsking}. */
  function show(node, position, attention) {
    const token = position === null ? null : tokenAt(node, position);
    waiting.hidden = Boolean(token);
    body.hidden = !token;
    if (!token) return;
    showFacts(node, position, token);
    const isFinished = !node.live && !state.writing;
    nearly.show(token, { mayBranch: isFinished && !isGiven(node, position) && !node.isSaved && Boolean(node.prompt) });
    read.show(node, position, attention);
    proof.hidden = node.verified === undefined || node.verified === null;
    const error = state.anatomy?.attention?.max_rel_err;
    const more = node.verified && isResident(node) && error ? ` ${inside.proofMore(error.toExponential(1))}` : "";
    write(proofText, node.verified ? inside.proof + more : inside.notProven);
    proof.toggleAttribute("data-open", !node.verified);
  }
  return { element, show, showLayers: layers.show };
}
