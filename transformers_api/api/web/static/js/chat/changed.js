// The mark of an answer that a changed model wrote.
import { h } from "../core/dom.js";
import { chat as words } from "../words/chat.js";

/** The edits that wrote an answer: those it was asked with, or of a branch and of an import its own. */
const all = (node) => (node.intervene ?? node.asked?.intervene)?.edits ?? [];

/** True where an edit is about tokens before `end`: a later place is no place of a shorter text. */
const isBefore = (end) => ({ at, queries, keys }) => [at, queries, keys].every((places) => !Array.isArray(places) || places.every((place) => place < end));

/** What a question about the first `end` tokens of an answer needs, so that the very model is asked that wrote
 *  it: {intervene}, or nothing. */
export function editsOf(node, end = Infinity) {
  const edits = all(node).filter(isBefore(end));
  return edits.length ? { intervene: { edits } } : {};
}

/** The sentence that a question about the first `end` tokens is asked of the model as it was changed; "" where it was not. */
export function askedOf(node, end = Infinity) {
  const count = all(node).filter(isBefore(end)).length;
  return count ? words.askedChanged(count) : "";
}

/** A pill that says how many edits there were; null where there was none. */
export function changedPill(node) {
  const count = all(node).length;
  return count ? h("span", { class: "pill changed", text: words.changedBy(count) }) : null;
}
