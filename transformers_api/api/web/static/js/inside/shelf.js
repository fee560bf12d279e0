// The shelf: the edits as rows with a switch and a slider, and the form that adds one.
import { json } from "../core/api.js";
import { button, h } from "../core/dom.js";
import { state } from "../core/state.js";
import { change as words } from "../words/change.js";
import { add, all, alter, intervention, nameOf, remove, saying, SIZES } from "./edits.js";
import { section } from "./lists.js";
import { currentLayer } from "./model.js";

const number = (label, max) => h("input", { type: "number", class: "in", "aria-label": label, min: "0", max: String(max), step: "1", value: "0" });

/** {element, draw(), add(edit)}; `onChange()` after every change of the edits. */
export function shelf(onChange) {
  const { element } = section(words.title);
  const list = h("ul", { class: "shelf", "aria-label": words.shelf });
  const none = h("p", { class: "hint", text: words.none });
  const code = h("code");
  const source = h("details", { class: "source" }, h("summary", { text: words.json }), h("pre", { tabindex: "0", dir: "ltr" }, code));
  const kind = h("select", { class: "sel", "aria-label": words.kind }, ...Object.entries(words.kinds).map(([value, text]) => h("option", { value, text })));
  const layer = number(words.layer, 9999);
  const head = number(words.head, 9999);
  const neuron = number(words.neuron, 999_999);
  const vector = h("select", { class: "sel", "aria-label": words.vector });
  const adder = button(words.add, () => take(formEdit()), { cls: "btn" });
  const field = (label, control) => h("label", { class: "field" }, h("span", { text: label }), control);
  const fields = { head: field(words.head, head), neuron: field(words.neuron, neuron), vector: field(words.vector, vector) };
  const form = h("div", { class: "edit-form" }, kind, field(words.layer, layer), ...Object.values(fields), adder);
  element.append(h("p", { class: "hint", text: words.help }), list, none, form, source);
  let isTouched = false; // the layer is the reader's own choice

  const formEdit = () => ({
    kind: kind.value, layer: Number(layer.value),
    ...(kind.value === "head" ? { head: Number(head.value) } : {}),
    ...(kind.value === "neuron" ? { neuron: Number(neuron.value) } : {}),
    ...(kind.value === "vector" ? { vector: vector.value } : {}),
  });

  function row(edit) {
    const name = nameOf(edit);
    const text = h("span", { class: "name", text: saying(edit), dir: "auto" });
    const used = h("input", { type: "checkbox", "aria-label": words.isOn(name), checked: edit.isOn });
    used.addEventListener("change", () => { alter(edit, { isOn: used.checked }); changed(); });
    const range = SIZES[edit.kind];
    const slider = range && h("input", { type: "range", "aria-label": words.size(name), min: range.min, max: range.max, step: range.step, value: edit.size });
    slider?.addEventListener("input", () => {
      alter(edit, { size: Number(slider.value) });
      text.textContent = saying(edit);
      changed(false);
    });
    const removing = button(words.remove(name), () => { remove(edit); changed(); }, { cls: "icon", glyph: "x" });
    return h("li", { class: edit.isOn ? "" : "unused" }, used, text, slider || h("span"), removing);
  }

  async function askVectors() {
    const answer = await json("/inspect/vectors", { panel: "vectors" }).catch(() => null);
    const names = (answer?.data ?? []).map((each) => each.name);
    vector.replaceChildren(...(names.length ? names : [""]).map((name) => h("option", { value: name, text: name || words.noVectors })));
    draw();
  }

  function draw() {
    const { anatomy } = state;
    if (anatomy?.layers) layer.max = String(anatomy.layers - 1);
    if (!isTouched) layer.value = String(currentLayer() ?? 0);
    for (const [name, box] of Object.entries(fields)) box.hidden = name !== kind.value;
    adder.disabled = kind.value === "vector" && !vector.value;
    none.hidden = all().length > 0;
    source.hidden = !intervention();
    code.textContent = JSON.stringify({ intervene: intervention() }, null, 2);
  }

  function changed(redraws = true) {
    if (redraws) list.replaceChildren(...all().map(row));
    draw();
    onChange();
  }

  function take(edit) {
    add(edit);
    changed();
  }

  layer.addEventListener("input", () => { isTouched = true; });
  kind.addEventListener("change", () => (kind.value === "vector" ? askVectors() : draw()));
  list.replaceChildren(...all().map(row));
  draw();
  return { element, draw, add: take };
}
