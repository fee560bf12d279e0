// What the user said, as plain text, and a field to say it otherwise.
import { button, copy, h } from "../core/dom.js";
import { state, touch } from "../core/state.js";
import { chat as words } from "../words/chat.js";
import { say } from "./run.js";
import { versionGroup } from "./versions.js";

function editing(node) {
  const area = h("textarea", { "aria-label": words.editMessage, dir: "auto", rows: "3" });
  area.value = node.text;
  const end = () => {
    node.isEdited = false;
    touch("chat");
    document.querySelector(`[data-node="${CSS.escape(node.id)}"] [data-act=edit]`)?.focus();
  };
  const send = () => {
    if (!area.value.trim() || state.writing) return;
    node.isEdited = false;
    say(area.value, node.parent);
  };
  area.addEventListener("keydown", (event) => {
    if (event.isComposing) return;
    if (event.key === "Escape") {
      event.preventDefault();
      end();
    } else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) send();
  });
  requestAnimationFrame(() => area.focus());
  return h("div", { class: "edit" }, area, h("div", { class: "row" },
    button(words.cancel, end), button(words.sendVersion, send, { cls: "btn pri" })));
}

function edit(node) {
  node.isEdited = true;
  touch("chat");
}

/** The article of a user's message. */
export function userTurn(node, isLast) {
  const attributes = { class: `msg user${isLast ? " last" : ""}`, "aria-label": words.you, data: { node: node.id } };
  if (node.isEdited) return h("article", attributes, editing(node));
  const copying = button(words.copy, () => copy(node.text, copying, words.copied), { cls: "icon", glyph: "copy" });
  return h("article", attributes,
    h("div", { class: "bubble", dir: "auto", text: node.text }),
    h("div", { class: "under" }, versionGroup(node), h("div", { class: "acts" }, copying,
      button(words.edit, () => edit(node), { cls: "icon", glyph: "pen", disabled: Boolean(state.writing), "data-act": "edit" }))));
}
