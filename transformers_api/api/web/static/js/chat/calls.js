// Calls of tools: what the model asks for, and a field to answer in the tool's place.
import { button, h, icon } from "../core/dom.js";
import { state } from "../core/state.js";
import { chat as words } from "../words/chat.js";
import { giveResults } from "./run.js";

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch { // it is still being written
    return text;
  }
}

function head(call) {
  return [
    h("header", {}, icon("tool"), h("b", { text: call.name || "…", dir: "auto" })),
    h("pre", { tabindex: "0", dir: "ltr", text: pretty(call.arguments) }),
  ];
}

/** The cards of an answer's calls; with fields where they wait for results. */
export function callCards(node, awaitsResults) {
  const fields = new Map();
  const cards = node.calls.map((call) => {
    const field = awaitsResults ? h("textarea", { rows: "2", dir: "auto", "aria-label": words.resultLabel(call.name), placeholder: words.resultHint }) : null;
    if (field) fields.set(call.id, field);
    return h("section", { class: "call", "aria-label": words.call(call.name) }, ...head(call), field);
  });
  if (!awaitsResults) return cards;
  const send = button(words.sendResults(node.calls.length), () => {
    if (!state.writing) giveResults(node, Object.fromEntries([...fields].map(([id, field]) => [id, field.value])));
  }, { cls: "btn pri" });
  const check = () => { send.disabled = [...fields.values()].some((field) => !field.value.trim()); };
  for (const field of fields.values()) field.addEventListener("input", check);
  check();
  return [...cards, h("div", { class: "row end" }, send)];
}

/** The article of a tool's result. */
export function resultTurn(node) {
  return h("article", { class: "msg result", "aria-label": words.toolResult(node.call?.name ?? ""), data: { node: node.id } },
    h("section", { class: "call" },
      h("header", {}, icon("tool"), h("b", { text: words.toolResult(node.call?.name ?? ""), dir: "auto" })),
      h("pre", { tabindex: "0", dir: "auto", text: node.text })));
}
