// The mark of an answer that a changed model wrote.
import { h } from "../core/dom.js";
import { chat as words } from "../words/chat.js";

/** A pill that says how many edits there were; null where there was none. */
export function changedPill(node) {
  const count = node.asked?.intervene?.edits?.length;
  return count ? h("span", { class: "pill changed", text: words.changedBy(count) }) : null;
}
