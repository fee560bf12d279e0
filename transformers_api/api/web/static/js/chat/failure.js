// A failure, where the answer would be: what happened, the server's sentence, ways on.
import { button, h } from "../core/dom.js";
import { set, state } from "../core/state.js";
import { askKey } from "../shell/key_dialog.js";
import { show } from "../shell/views.js";
import { chat as words } from "../words/chat.js";
import { startChat } from "./chats.js";
import { openSettings } from "./settings_dialog.js";

/** Count the seconds of Retry-After down in `place`; the sentence goes when they are over. */
function countDown(place, node) {
  const over = (node.failedAt ??= Date.now()) + 1000 * node.error.retryAfter;
  const tick = () => {
    const left = Math.ceil((over - Date.now()) / 1000);
    place.textContent = left > 0 ? words.retryIn(left) : "";
    if (left > 0) setTimeout(() => { if (place.isConnected) tick(); }, 250);
  };
  queueMicrotask(tick);
}

/** A new chat with the last message in the box, to be made shorter or sent. */
function restart() {
  const last = state.path.findLast((node) => node.role === "user");
  startChat();
  set({ draft: last?.text ?? "" });
}

export function failure(node, again) {
  const ways = words.failure(node.error);
  const left = h("span", { class: "left", "aria-live": "off" });
  if (node.error.retryAfter) countDown(left, node);
  const small = { cls: "btn small" };
  return h("div", { class: "fail", role: "alert" },
    h("b", { text: ways.title }), h("span", { text: node.error.message, dir: "auto" }), left,
    h("div", { class: "row" },
      button(words.tryAgain, () => again(node), small),
      ways.key ? button(words.enterKey, askKey, small) : null,
      ways.models ? button(words.showModels, () => show("models"), small) : null,
      ways.settings ? button(words.openSettings, openSettings, small) : null,
      ways.restart ? button(words.restart, restart, small) : null));
}
