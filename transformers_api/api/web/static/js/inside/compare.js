// Two runs of one question side by side: where they part, and how sure each was.
import { changedPill } from "../chat/changed.js";
import { button, h } from "../core/dom.js";
import { percent, visible } from "../core/format.js";
import { versions } from "../core/tree.js";
import { state } from "../core/state.js";
import { inside } from "../words/inside.js";
import { Tape } from "./tape.js";
import { promptLength } from "./tokens.js";

/** The other runs that a node can be compared with: its versions, and a saved trace. */
export function othersOf(node, saved) {
  const siblings = state.chat.nodes[node.id] === node ? versions(state.chat, node) : [];
  return [...siblings, ...(saved ? [saved] : [])].filter((other) => other !== node && other.tokens?.length);
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

/** {element, tapes}: both answers as columns; `onPick(node, position)`, `onChoose(other)`, `onEnd()`. */
export function comparison(node, other, others, { onPick, onChoose, onEnd }) {
  const shared = sharedTokens(node, other);
  const tapes = [node, other].map((run) => new Tape(run, onPick, { isShort: true }));
  const columns = tapes.map((tape, at) => {
    const start = promptLength(tape.node);
    for (const [position, element] of tape.chips) element.classList.toggle("shared", position - start < shared);
    tape.chips.get(start + shared)?.classList.add("parts");
    const facts = inside.runFacts(tape.node.tokens.length, mean(tape.node.tokens).toFixed(2));
    return h("section", { class: "run", "aria-label": inside.run("AB"[at]) },
      h("header", {}, h("h3", { text: `${inside.run("AB"[at])}${tape.node.model ? ` · ${tape.node.model}` : ""}` }), changedPill(tape.node), h("p", { class: "hint num", text: facts })), tape.element);
  });
  const chooser = h("select", { class: "sel", "aria-label": inside.otherRun }, ...others.map((run, at) => h("option", {
    value: String(at), selected: run === other, text: run.isSaved ? inside.fromFile : `${at + 1}: ${run.text.slice(0, 40)}`,
  })));
  chooser.addEventListener("change", () => onChoose(others[Number(chooser.value)]));
  const header = h("header", { class: "between" }, h("h2", { text: inside.comparing }), others.length > 1 ? chooser : null, button(inside.endCompare, onEnd, { cls: "btn small" }));
  const element = h("div", { class: "compare" }, header, h("p", { class: "verdict", dir: "auto", text: verdict(node, other) }), h("div", { class: "runs" }, ...columns));
  return { element, tapes };
}
