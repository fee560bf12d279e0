// The form that puts an edit together: its kind, and the fields that this kind has.
import { json } from "../core/api.js";
import { button, h } from "../core/dom.js";
import { visible } from "../core/format.js";
import { state } from "../core/state.js";
import { change as words } from "../words/change.js";
import { KINDS } from "./edit_kinds.js";
import { write } from "./lists.js";
import { currentLayer } from "./model.js";
import { promptLength, tokenAt } from "./tokens.js";

const NUMBERS = ["layer", "head", "neuron", "feature", "query", "key", "place", "there"];
const STORES = { vector: "vectors", sae: "saes", run: "runs" };
const RAISED = 5; // tokens that a feature makes likelier
const MAY_BE_ALL = ["edge", "temper", "q", "k", "v"]; // no head: all of them

const number = (label) => h("input", { type: "number", class: "in", "aria-label": label, step: "1", value: "0" });
const options = (names, empty) => (names.length ? names : [["", empty]]).map(([value, text]) => h("option", { value, text }));

/** {element, draw(), aim(node, position)}; `onAdd(edit)` takes what was put together. */
export function editForm(onAdd) {
  const kind = h("select", { class: "sel", "aria-label": words.kind }, ...Object.entries(words.kinds).map(([value, text]) => h("option", { value, text })));
  const controls = {
    ...Object.fromEntries(NUMBERS.map((name) => [name, number(words.fields[name])])),
    ...Object.fromEntries(Object.keys(STORES).map((name) => [name, h("select", { class: "sel", "aria-label": words.fields[name] })])),
    prompt: h("textarea", { class: "in", rows: "2", "aria-label": words.fields.prompt, maxlength: "4000" }),
  };
  const boxes = Object.entries(controls).map(([name, control]) => [name, h("label", { class: `field field-${name}` }, h("span", { text: words.fields[name] }), control)]);
  const says = h("p", { class: "hint", dir: "auto" });
  const adder = button(words.add, () => onAdd(value()), { cls: "btn" });
  const element = h("div", { class: "edit-form" }, kind, ...boxes.map(([, box]) => box), says, adder);
  let runs = new Map(); // id → the layers whose stream it has
  let feature = null; // {of, text}: the one that is named, and what it is
  let isTouched = false; // the layer is the reader's own choice
  let target = null; // {node, position}: the selected token

  const fieldsOf = () => KINDS[kind.value].fields;

  function valueOf(name) {
    const { value: text } = controls[name];
    if (!NUMBERS.includes(name)) return text;
    return name === "head" && text === "" && MAY_BE_ALL.includes(kind.value) ? null : Number(text);
  }
  const value = () => ({ kind: kind.value, ...Object.fromEntries(fieldsOf().map((name) => [name, valueOf(name)])) });

  const nameAt = (position) => {
    const token = target && tokenAt(target.node, position);
    return token ? visible(token.text) : null;
  };

  /** What the places are, in words. */
  function sentence() {
    const at = (name) => nameAt(Number(controls[name].value)) ?? words.later(controls[name].value);
    if (kind.value === "edge") return words.edgeHelp(at("query"), at("key"));
    if (kind.value === "patch") return controls.run.value ? words.runHelp(at("place"), runs.get(controls.run.value) ?? []) : words.patchHelp(at("place"));
    if (kind.value === "feature") return feature?.text ?? "";
    return words.kindHelp[kind.value] ?? "";
  }

  async function askStores() {
    const names = fieldsOf().filter((name) => STORES[name]);
    await Promise.all(names.map(async (name) => {
      const answer = await json(`/inspect/${STORES[name]}`, { panel: STORES[name] }).catch(() => null);
      const all = name === "run" ? runsOf(answer?.data ?? []) : (answer?.data ?? []).map((each) => [each.name, each.name]);
      const { value: before } = controls[name];
      controls[name].replaceChildren(...(name === "run" ? [["", words.noRun], ...all].map(([id, text]) => h("option", { value: id, text })) : options(all, words.noneIn[name])));
      if (all.some(([id]) => id === before)) controls[name].value = before;
    }));
    askFeature();
    draw();
  }

  /** Those that have a stream to take from, as options. */
  function runsOf(all) {
    const layers = ({ activations }) => activations.filter(({ part, layer }) => part === "resid" && layer >= 0).map(({ layer }) => layer);
    runs = new Map(all.map((each) => [each.id, layers(each)]).filter(([, own]) => own.length));
    return all.filter(({ id }) => runs.has(id)).map(({ id, text }) => [id, words.runName(id, text)]);
  }

  /** Say what the feature that is named makes likelier, or why it is none. */
  async function askFeature() {
    const { sae, feature: place } = controls;
    const of = `${encodeURIComponent(sae.value)}/features/${Number(place.value)}`;
    if (kind.value !== "feature" || !sae.value || feature?.of === of) return;
    const mine = { of, text: words.featureAsked };
    feature = mine;
    try {
      const { raised } = await json(`/inspect/saes/${of}`, { panel: "feature" });
      mine.text = words.featureHelp(raised.slice(0, RAISED).map(({ token }) => visible(token)));
    } catch (failure) {
      mine.text = failure.message;
    }
    draw();
  }

  function draw() {
    const fields = fieldsOf();
    const { anatomy } = state;
    if (anatomy?.layers) controls.layer.max = String(anatomy.layers - 1);
    if (!isTouched) controls.layer.value = String(currentLayer() ?? 0);
    for (const [name, box] of boxes) box.hidden = !fields.includes(name) || (name === "prompt" && fields.includes("run") && Boolean(controls.run.value));
    controls.head.placeholder = MAY_BE_ALL.includes(kind.value) ? words.allHeads : "";
    adder.disabled = ["vector", "sae"].some((name) => fields.includes(name) && !controls[name].value)
      || (kind.value === "patch" && !controls.run.value && !controls.prompt.value.trim());
    write(says, sentence());
  }

  function choose() {
    if (["edge", "temper", "head"].includes(kind.value) && typeof state.head === "number") controls.head.value = String(state.head);
    if (fieldsOf().some((name) => STORES[name])) askStores();
    draw();
  }

  /** The token that is selected: what reads it and what it reads are first said of it. */
  function aim(node, position) {
    if (target?.node === node && target.position === position) return;
    target = { node, position };
    const reader = Math.max(1, position - 1);
    controls.query.value = String(reader);
    controls.key.value = String(reader - 1);
    controls.place.value = controls.there.value = String(Math.min(position, Math.max(0, promptLength(node) - 1)));
  }

  controls.layer.addEventListener("input", () => { isTouched = true; });
  kind.addEventListener("change", choose);
  element.addEventListener("input", draw);
  element.addEventListener("change", askFeature);
  draw();
  return { element, draw, aim };
}
