// Tokens as running text. Spans, not buttons: a button is an atomic box in a line, and words would be
// broken between their tokens.
import { h } from "../core/dom.js";
import { isSpecial, spoken, visible } from "../core/format.js";
import { inside } from "../words/inside.js";
import { level } from "./tokens.js";

const BLOCK = 256; // tokens that are laid out together
const UNSEEN = /^U\+/;

function word(text, special) {
  const box = h("span", { class: "t" });
  const shown = visible(text);
  if (special || UNSEEN.test(shown)) box.textContent = special ? text : shown;
  else {
    const [first, ...lines] = text.replace(/^ +/, "").split("\n");
    box.append(first);
    for (const line of lines) box.append(h("span", { class: "ws", text: "⏎" }), line);
    if (!box.textContent) box.textContent = text ? "·".repeat(text.length) : "∅";
  }
  return box;
}

/** The element of a token. */
export function chip(token, position, isFresh = false) {
  const special = isSpecial(token.text);
  const box = word(token.text, special);
  const element = h("span", {
    role: "button", tabindex: "-1", "aria-pressed": "false", "aria-label": inside.token(position, spoken(token.text)),
    class: `tok${special ? " sp" : ""}${isFresh ? " fresh" : ""}`, data: { p: position, s: level(token.surprisal) }, dir: special ? "ltr" : null,
  });
  const space = special || !token.text.trim() ? "" : /^ */.exec(token.text)[0];
  if (space) element.append(space);
  element.append(box);
  if (token.forced) element.dataset.forced = "";
  return element;
}

/** Append chips in blocks of their own layout, which end at line breaks. */
export function addChips(box, chips) {
  let block = box.lastElementChild;
  for (const element of chips) {
    if (!block?.matches(".block:not([data-full])")) {
      block = h("span", { class: "block" });
      box.append(block);
    }
    block.append(element);
    if (block.childElementCount >= BLOCK || element.querySelector(".ws")) block.dataset.full = "";
  }
}
