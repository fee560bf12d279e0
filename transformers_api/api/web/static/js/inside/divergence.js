// How far the edits push each token of an answer: the unedited model reads it as well, and says what it makes of
// every token. Aligned token by token, with a bar for the divergence.
import { button, h } from "../core/dom.js";
import { percent, visible } from "../core/format.js";
import { state } from "../core/state.js";
import { keepSoon } from "../core/store.js";
import { json } from "../core/api.js";
import { requestButton } from "../shell/request_dialog.js";
import { change as words } from "../words/change.js";
import { section, write } from "./lists.js";
import { isResident } from "./model.js";
import { promptLength } from "./tokens.js";

const FULL = 3; // nats that fill a bar
const MOST = 1500; // cells that are drawn
const asking = new WeakMap(); // node → the promise of its measure

export const isMeasured = (node) => Boolean(node.tokens?.length) && node.tokens[0].kl !== undefined;
export const mayMeasure = (node) => Boolean(node.asked?.intervene && node.tokens?.length && node.prompt?.token_ids?.length) && !node.live && !node.isSaved && isResident(node);

/** 0 to 100: how much of a bar a divergence fills, with a root, so that small ones are seen. */
export const height = (kl) => Math.round(100 * Math.sqrt(Math.min(1, Math.max(0, kl) / FULL)));

async function ask(node) {
  const written = node.tokens.map(({ id }) => id);
  const edits = [...node.asked.intervene.edits, { do: "force", step: 0, token_ids: written }];
  const body = { model: node.model, prompt: node.prompt.token_ids, max_tokens: written.length, temperature: 0, intervene: { edits, compare: "forced" } };
  const answer = await json("/v1/completions", { body, panel: "divergence" });
  answer.choices[0].compare.tokens.slice(0, written.length).forEach(({ kl, logprob_without: logprob, top_without: [top] }, at) => {
    Object.assign(node.tokens[at], { kl, without: { p: Math.exp(logprob), id: top.token_id, text: top.token, top: Math.exp(top.logprob) } });
  });
  if (state.chat.nodes[node.id] === node) keepSoon(state.chat);
}

/** Ask once for the divergence of each token of `node`; again only after a failure. */
function measure(node) {
  if (!asking.has(node)) asking.set(node, ask(node).catch((failure) => { asking.delete(node); throw failure; }));
  return asking.get(node);
}

function sentence(token, at) {
  const { kl, without } = token;
  const other = without.id === token.id ? words.sameChoice(percent(without.p)) : words.otherChoice(visible(without.text), percent(without.top), percent(without.p));
  return words.pushed(at + 1, visible(token.text), kl.toFixed(2), other);
}

/** {element}: the strip of an answer; `onPoint(position or null)`, `onPick(position)`, `onMeasured()`. */
export function divergence(node, { onPoint, onPick, onMeasured }) {
  const { element, heading } = section(words.divergence);
  const strip = h("div", { class: "pushes", role: "group", "aria-label": words.divergenceList });
  const readOut = h("p", { class: "readout", dir: "auto" });
  const message = h("p", { class: "hint", dir: "auto" });
  const again = button(words.measure, fill, { cls: "btn small", hidden: true });
  heading.after(requestButton("divergence"));
  element.append(h("p", { class: "hint", text: words.divergenceHelp }), readOut, strip, message, again);
  const start = promptLength(node);

  function cell(token, at) {
    const isOther = token.without.id !== token.id;
    const tell = () => { write(readOut, sentence(token, at)); onPoint(start + at); };
    return h("button", {
      type: "button", class: "push", tabindex: at ? "-1" : "0", "aria-label": sentence(token, at), vars: { "--h": `${height(token.kl)}%` },
      onclick: () => onPick(start + at), onpointerenter: tell, onfocus: tell, onblur: () => onPoint(null),
    }, h("span", { class: "depth" }), h("span", { class: "num", text: token.kl.toFixed(2) }), h("b", { text: visible(token.text), dir: "auto" }),
    h("span", { class: isOther ? "instead" : "instead same", text: isOther ? visible(token.without.text) : "=", dir: "auto" }));
  }

  strip.addEventListener("pointerleave", () => onPoint(null));
  strip.addEventListener("keydown", (event) => {
    const cells = [...strip.children];
    const at = cells.indexOf(document.activeElement);
    const next = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: cells.length - 1 }[event.key];
    if (at < 0 || next === undefined || !cells[next]) return;
    event.preventDefault();
    event.stopPropagation();
    cells[at].tabIndex = -1;
    cells[next].tabIndex = 0;
    cells[next].focus();
  });

  function draw() {
    strip.replaceChildren(...node.tokens.slice(0, MOST).filter(({ kl }) => kl !== undefined).map(cell));
    const most = Math.max(...node.tokens.map(({ kl }) => kl ?? 0));
    const at = node.tokens.findIndex(({ kl }) => kl === most);
    write(message, words.mostPushed(visible(node.tokens[at].text), most.toFixed(2)));
  }

  async function fill() {
    again.hidden = true;
    if (isMeasured(node)) return draw();
    write(message, mayMeasure(node) ? words.measuring : words.cannotMeasure);
    if (!mayMeasure(node)) return undefined;
    try {
      await measure(node);
      draw();
      onMeasured();
    } catch (failure) {
      write(message, failure.message);
      again.hidden = false;
    }
    return undefined;
  }
  fill();
  return { element };
}
