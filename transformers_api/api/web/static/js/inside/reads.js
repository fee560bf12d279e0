// What the selected token read: layer, head, first token hidden or not, and the heaviest places.
import { button, h } from "../core/dom.js";
import { visible } from "../core/format.js";
import { on, set, state } from "../core/state.js";
import { inside } from "../words/inside.js";
import { shapeOf } from "./attention.js";
import { rowList, section, write } from "./lists.js";
import { currentLayer } from "./model.js";
import { heaviest } from "./rows.js";
import { tokenAt } from "./tokens.js";

const PLACES = 7;
const LEAST = 0.002;
const REST_MS = 60; // that the slider rests before the server is asked

/** The section; `onPoint(position or null)` while a place is pointed at, `onPick(position)`. */
export function reads({ onPoint, onPick, onLoad }) {
  const { element } = section(inside.read, inside.readMore);
  const layer = h("input", { type: "range", min: "0", max: "0", id: "inside-layer", "aria-label": inside.layer });
  const layerText = h("output", { for: "inside-layer" });
  const head = h("select", { class: "sel", id: "inside-head", "aria-label": inside.head });
  const hide = h("input", { type: "checkbox", checked: state.hideFirst });
  const takes = h("span", { class: "hint" });
  const controls = h("div", { class: "ctl" },
    h("label", { for: "inside-layer", text: inside.layer }), layer, layerText,
    h("label", { for: "inside-head", text: inside.head }), head, h("span"),
    h("label", { class: "check" }, hide, h("span", { text: inside.hideFirst }), takes));
  const list = rowList(inside.readList, "reads", makeRow, fillRow);
  const reason = h("p", { class: "hint reason", dir: "auto" });
  const loader = button("", () => onLoad(), { cls: "btn small" });
  const sink = h("p", { class: "hint" });
  const honest = h("p", { class: "hint", text: inside.notAReason });
  element.append(controls, list.element, sink, reason, loader, honest);
  let shown = { node: null, most: 1 };
  let timer = null;

  layer.addEventListener("input", () => {
    const chosen = Number(layer.value);
    write(layerText, inside.layerOf(chosen, layer.max));
    clearTimeout(timer);
    timer = setTimeout(() => {
      timer = null;
      set({ layer: chosen });
    }, REST_MS);
  });
  head.addEventListener("change", () => set({ head: /^\d/.test(head.value) ? Number(head.value) : head.value }));
  hide.addEventListener("change", () => set({ hideFirst: hide.checked }));
  on("hideFirst", (isHidden) => { hide.checked = isHidden; });

  function makeRow() {
    const row = { name: h("span", { class: "name", dir: "auto" }), place: h("small"), share: h("span", { class: "p" }), position: 0 };
    row.element = h("li", {}, h("span", { class: "where" }, row.name, row.place), row.share);
    row.element.addEventListener("pointerenter", () => onPoint(row.position));
    row.element.addEventListener("pointerleave", () => onPoint(null));
    row.element.addEventListener("click", () => onPick(row.position));
    return row;
  }

  function fillRow(row, { position, weight }) {
    row.position = position;
    row.element.style.setProperty("--w", ((100 * weight) / shown.most).toFixed(1));
    write(row.name, visible(tokenAt(shown.node, position)?.text ?? ""));
    write(row.place, String(position));
    write(row.share, `${(100 * weight).toFixed(1)} %`);
  }

  function showControls(node, row) {
    const shape = shapeOf(node);
    const at = row?.layer ?? currentLayer(node.shape ?? state.anatomy) ?? 0;
    layer.max = String(Math.max(0, shape.last));
    if (timer === null && layer.value !== String(at)) layer.value = String(at);
    write(layerText, inside.layerOf(layer.value, layer.max));
    layer.setAttribute("aria-valuetext", inside.layerOf(layer.value, layer.max));
    const heads = row?.heads || shape.heads(at);
    if (head.options.length !== heads + 2) {
      const names = [...Object.entries(inside.headNames), ...Array.from({ length: heads }, (_, n) => [String(n), inside.headName(n)])];
      head.replaceChildren(...names.map(([value, text]) => h("option", { value, text })));
    }
    const chosen = String(typeof state.head === "number" ? Math.min(state.head, Math.max(0, heads - 1)) : state.head);
    if (head.value !== chosen) head.value = chosen;
  }

  /** Fill it: `weights` where they are there, else why not. */
  function show(node, position, { row = null, weights = null, because = "", load = "", isAsking = false, hasFailed = false }) {
    element.hidden = position === 0;
    if (element.hidden) return;
    showControls(node, row);
    const places = weights ? heaviest(weights, PLACES, LEAST) : [];
    shown = { node, most: places[0]?.weight || 1 };
    if (!isAsking) list.show(places);
    element.toggleAttribute("data-asking", isAsking);
    write(takes, weights && row.start === 0 ? inside.takes(`${Math.round(100 * weights.first)} %`) : "");
    const left = row?.sink && weights ? unread(row.sink) : 0;
    write(sink, left >= 0.005 ? inside.unread(`${(100 * left).toFixed(1)} %`) : "");
    write(reason, load ? inside.otherModel(load, state.status?.resident?.model) : because);
    if (weights && !places.length) write(reason, inside.nothingHeavy);
    loader.hidden = !load && !hasFailed;
    if (!loader.hidden) write(loader.firstChild, load ? inside.askAnyway(load) : inside.askAgain);
    honest.hidden = !weights;
  }

  const unread = (shares) => (typeof state.head === "number" ? shares[state.head] ?? 0 : shares.reduce((sum, share) => sum + share, 0) / shares.length);
  return { element, show };
}
