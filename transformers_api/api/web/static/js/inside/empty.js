// Inside where there is nothing to look into.
import { button, h } from "../core/dom.js";
import { change as words } from "../words/change.js";
import { inside } from "../words/inside.js";
import { fromLink } from "./edits.js";

/** Say why nothing is shown of `node`, in `root`; `open()` opens a saved trace. */
export function showEmpty(root, node, open) {
  root.classList.remove("inside");
  root.replaceChildren(h("h1", { class: "sr", text: inside.title }), h("div", { class: "empty" },
    h("h2", { text: inside.emptyTitle }), h("p", { text: node?.text ? inside.noTokens : inside.emptyMore }),
    fromLink ? h("p", { text: words.waiting }) : null, button(inside.openSaved, open, { cls: "btn" })));
}
