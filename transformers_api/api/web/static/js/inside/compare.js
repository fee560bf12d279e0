// Two runs of one question side by side: where they part, and how sure each was.
import { changedPill } from "../chat/changed.js";
import { button, h } from "../core/dom.js";
import { percent, visible } from "../core/format.js";
import { versions } from "../core/tree.js";
import { state } from "../core/state.js";
import { inside } from "../words/inside.js";
import { divergence } from "./divergence.js";
import { write } from "./lists.js";
import { Tape } from "./tape.js";
import { promptLength } from "./tokens.js";

/** The other runs that a node can be compared with: its versions, a saved trace, and what
 *  the unedited model wrote beside it. */
export function othersOf(node, saved) {
  const siblings = state.chat.nodes[node.id] === node ? versions(state.chat, node) : [];
  return [...siblings, ...(saved ? [saved] : []), ...(node.twin ? [node.twin] : [])].filter((other) => other !== node && (other.tokens?.length || other.live));
}

/** How many tokens two answers begin with in common. */
function sharedTokens(one, other) {
  let count = 0;
  while (count < Math.min(one.tokens.length, other.tokens.length) && one.tokens[count].id === other.tokens[count].id) count += 1;
  return count;
}

function mean(tokens) {
  const known = tokens.filter(({ surprisal }) => surprisal !== null && surprisal !== undefined);
  return known.length ? known.reduce((sum, { surprisal }) => sum + surprisal, 0) / known.length : 0;
}

function verdict(one, other) {
  const count = sharedTokens(one, other);
  const [a, b] = [one.tokens[count], other.tokens[count]];
  if (!a && !b) return inside.sameAll;
  const name = (token) => (token ? visible(token.text) : "∅");
  const share = (token) => (token?.prob === undefined ? "–" : percent(token.prob));
  return `${inside.sameStart(count)} ${inside.differHere(name(a), share(a), name(b), share(b))}`;
}

/** Dim the tokens that both answers begin with, and mark the first that differs. */
function markShared(tapes) {
  const shared = sharedTokens(tapes[0].node, tapes[1].node);
  const isDecided = !tapes[0].node.live || tapes.every(({ node }) => node.tokens[shared]);
  for (const tape of tapes) {
    const start = promptLength(tape.node);
    for (const [position, element] of tape.chips) {
      element.classList.toggle("shared", position - start < shared);
      element.classList.toggle("parts", isDecided && position - start === shared);
    }
  }
}

const factsOf = ({ tokens }) => inside.runFacts(tokens.length, mean(tokens).toFixed(2));

/** Point at the same step of both answers. */
function pointAt(tapes, position) {
  for (const tape of tapes) {
    tape.element.querySelector(".tok.hot")?.classList.remove("hot");
    if (position !== null) tape.chips.get(position)?.classList.add("hot");
  }
}

/** {element, tapes, grow()}: both answers as columns, the unedited one at the left of one that was edited.
 *  `onPick(node, position)`, `onChoose(other)`, `onEnd()`, `onMeasured()`. */
export function comparison(node, other, others, { onPick, onChoose, onEnd, onMeasured }) {
  const isTwin = other === node.twin;
  const tapes = [node, other].map((run) => new Tape(run, onPick, { isShort: true }));
  const names = isTwin ? [inside.editedRun, inside.uneditedRun] : [inside.run("A"), inside.run("B")];
  const facts = tapes.map((tape) => h("p", { class: "hint num", text: factsOf(tape.node) }));
  const columns = tapes.map((tape, at) => h("section", { class: "run", "aria-label": names[at] },
    h("header", {}, h("h3", { text: `${names[at]}${!isTwin && tape.node.model ? ` · ${tape.node.model}` : ""}` }), changedPill(tape.node), facts[at]), tape.element));
  markShared(tapes);
  const chooser = h("select", { class: "sel", "aria-label": inside.otherRun }, ...others.map((run, at) => h("option", {
    value: String(at), selected: run === other, text: run === node.twin ? inside.uneditedRun : run.isSaved ? inside.fromFile : `${at + 1}: ${run.text.slice(0, 40)}`,
  })));
  chooser.addEventListener("change", () => onChoose(others[Number(chooser.value)]));
  const isLive = Boolean(node.live);
  const header = h("header", { class: "between" }, h("h2", { text: isTwin ? inside.lanes : inside.comparing }), others.length > 1 && !isLive ? chooser : null,
    isLive ? null : button(inside.endCompare, onEnd, { cls: "btn small" }));
  const pushes = isTwin && !isLive ? divergence(node, { onMeasured, onPick: (position) => onPick(node, position), onPoint: (position) => pointAt(tapes, position) }).element : null;
  const element = h("div", { class: "compare" }, header, h("p", { class: "verdict", dir: "auto", text: isLive ? "" : verdict(node, other) }),
    h("div", { class: "runs" }, ...(isTwin ? columns.toReversed() : columns)), pushes);
  if (isTwin) {
    const pointed = (event) => pointAt(tapes, event.target.closest?.(".tok") ? Number(event.target.closest(".tok").dataset.p) : null);
    for (const tape of tapes) for (const kind of ["pointerover", "focusin"]) tape.element.addEventListener(kind, pointed);
  }

  /** Add what has come; returns how many tokens of the first answer. */
  function grow() {
    const [came, more] = tapes.map((tape) => tape.append());
    if (came + more > 0) {
      markShared(tapes);
      tapes.forEach((tape, at) => write(facts[at], factsOf(tape.node)));
    }
    return came;
  }
  return { element, tapes, grow };
}
