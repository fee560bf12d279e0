// A direction from pairs of sentences: two columns that the reader fills, and the layer and size that tell them apart best.
import { json } from "../core/api.js";
import { button, h } from "../core/dom.js";
import { state } from "../core/state.js";
import { choice, keepChoice } from "../core/store.js";
import { requestButton } from "../shell/request_dialog.js";
import { change as words } from "../words/change.js";
import { KINDS } from "./edit_kinds.js";
import { section, write } from "./lists.js";
import { isResident } from "./model.js";

const FEW = 3; // rows of an empty form
const MOST = 24;
const LETTERS = 400; // of a sentence

const isText = (value) => typeof value === "string";
const isPair = (value) => Array.isArray(value) && value.length === 2 && value.every(isText);

/** The middle of the layers that tell best, and a size there that leads from one side to the other, in norms. */
export function suggestion({ layers, best_layers: [first, last], norms, scales, separation }) {
  const at = Math.max(0, layers.indexOf(Math.round((first + last) / 2)));
  const usual = state.anatomy?.resid_norm?.[layers[at]];
  const { max, step, start } = KINDS.vector.range;
  const size = usual ? Math.min(max, Math.max(step, step * Math.round((scales[at] * norms[at]) / usual / step))) : start;
  return { layer: layers[at], size: Number(size.toFixed(2)), separation: separation[at] };
}

/** {element, show(node)}; `onFound(edit)` gets the direction as an edit. */
export function pairs(onFound) {
  const { element, heading } = section(words.pairs);
  const name = h("input", { class: "in", "aria-label": words.directionName, value: "ours", maxlength: "64", autocomplete: "off", spellcheck: "false" });
  const table = h("div", { class: "pairs" }, h("b", { text: words.more }), h("b", { text: words.less }));
  const message = h("p", { class: "hint", role: "status", dir: "auto" });
  const adder = button(words.addPair, () => addRow(["", ""], true), { cls: "btn small" });
  const finder = button(words.derive, derive, { cls: "btn" });
  heading.after(requestButton("derive"));
  element.append(h("p", { class: "hint", text: words.pairsHelp }), table, h("div", { class: "row" }, adder),
    h("label", { class: "field" }, h("span", { text: words.directionName }), name), h("div", { class: "row" }, finder), message);
  const rows = []; // [input of the one side, input of the other]
  let node = null;

  const typed = () => rows.map((row) => row.map((input) => input.value));
  const whole = () => typed().filter((pair) => pair.every((text) => text.trim()));

  function addRow(texts, isFocused = false) {
    const at = rows.length + 1;
    const row = texts.map((text, side) => h("input", {
      class: "in", value: text.slice(0, LETTERS), maxlength: String(LETTERS), dir: "auto", "aria-label": side ? words.lessOf(at) : words.moreOf(at),
    }));
    rows.push(row);
    table.append(...row);
    if (isFocused) row[0].focus();
    adder.hidden = rows.length >= MOST;
  }

  async function derive() {
    finder.disabled = true;
    write(message, words.deriving);
    try {
      const body = { model: node.model, pairs: whole().map(([positive, negative]) => ({ positive, negative })) };
      const answer = await json(`/inspect/vectors/${encodeURIComponent(name.value)}/derive`, { body, panel: "derive" });
      const { layer, size, separation } = suggestion(answer);
      write(message, words.derived(answer.best_layers, Math.round(100 * separation), layer, size));
      onFound({ kind: "vector", layer, vector: name.value, size });
    } catch (failure) {
      write(message, failure.message);
    }
    draw();
  }

  function draw() {
    const isName = /^[a-z0-9._-]{1,64}$/.test(name.value);
    name.setCustomValidity(isName ? "" : words.badName);
    finder.disabled = whole().length < 2 || !isName || !node || !isResident(node) || Boolean(state.writing);
    finder.title = isName ? "" : words.badName;
  }

  element.addEventListener("input", () => { keepChoice("pairs", typed()); draw(); });
  const kept = choice("pairs", []).filter(isPair).slice(0, MOST);
  for (let at = 0; at < Math.max(FEW, kept.length); at += 1) addRow(kept[at] ?? ["", ""]);

  function show(shown) {
    node = shown;
    draw();
  }
  return { element, show };
}
