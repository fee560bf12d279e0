// The sentence that is shown before the first token: true, from /status, every second.
import { h } from "../core/dom.js";
import { state } from "../core/state.js";
import { chat as words } from "../words/chat.js";

function sentence() {
  const begun = state.writing?.clock.begun ?? performance.now();
  return words.waiting({ status: state.status, reach: state.reach, model: state.model, seconds: Math.floor((performance.now() - begun) / 1000) });
}

/** Three dots and the sentence, which follows the server's status while the line is on the page. */
export function waitingLine() {
  const text = h("span", { text: sentence() });
  const timer = setInterval(() => {
    if (!state.writing) clearInterval(timer);
    else if (text.textContent !== sentence()) text.textContent = sentence();
  }, 250);
  return h("div", { class: "wait" }, h("i", { "aria-hidden": "true" }, h("b"), h("b"), h("b")), text);
}
