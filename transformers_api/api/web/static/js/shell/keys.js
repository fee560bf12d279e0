// Keys that work everywhere. Single letters work outside of fields only, and can be switched off.
import { button, byId, h } from "../core/dom.js";
import { state } from "../core/state.js";
import { choice, keepChoice } from "../core/store.js";
import { common } from "../words/common.js";
import { openDialog } from "./dialog.js";

let hasLetters = choice("letters", true);

export const lettersOn = () => hasLetters;

export function switchLetters() {
  hasLetters = !hasLetters;
  keepChoice("letters", hasLetters);
}

/** True for an event whose single letter is meant for the page, not for a field. */
export function isLetter(event) {
  if (!hasLetters || event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return false;
  return !event.target.closest?.("input, textarea, select, dialog, [contenteditable]");
}

export function showKeys() {
  const rows = common.shortcuts.flatMap(([keys, meaning]) => [
    h("dt", {}, ...keys.split(" ").flatMap((name, i) => [i ? " " : "", h("kbd", { text: name })])),
    h("dd", { text: meaning }),
  ]);
  openDialog(common.keysTitle, (close) => h("div", { class: "in" },
    h("h2", { text: common.keysTitle }), h("dl", { class: "keys" }, ...rows),
    h("div", { class: "row" }, button(common.close, close, { cls: "btn pri" }))));
}

/** `actions`: {show(view), newChat(), closeSide(): true where one was open} */
export function start({ show, newChat, closeSide }) {
  const views = ["chat", "inside", "models"];
  addEventListener("keydown", (event) => {
    if (event.isComposing) return;
    if (event.key === "Escape" && !event.defaultPrevented && !byId("dialog").open) {
      if (!closeSide()) state.writing?.stop();
    } else if (event.altKey && !event.ctrlKey && !event.metaKey && /^Digit[123]$/.test(event.code)) {
      event.preventDefault();
      show(views[event.code.at(-1) - 1], { focus: true });
    } else if (event.altKey && !event.ctrlKey && event.code === "KeyN") {
      event.preventDefault();
      newChat();
    } else if (isLetter(event) && event.key === "/") {
      event.preventDefault();
      if (state.view === "models") show("chat");
      byId("message").focus();
    } else if (isLetter(event) && event.key === "?") {
      event.preventDefault();
      showKeys();
    }
  });
}
