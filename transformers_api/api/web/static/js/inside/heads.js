// Every head of every layer as one cell, by five measures; a thumbnail and a sentence for the one that is
// pointed at. Enter or a click looks through it.
import { editsOf } from "../chat/changed.js";
import { colour, h } from "../core/dom.js";
import { percent } from "../core/format.js";
import { announce } from "../core/notice.js";
import { set, state } from "../core/state.js";
import { requestButton } from "../shell/request_dialog.js";
import { change as words } from "../words/change.js";
import { inside } from "../words/inside.js";
import { cellMenu } from "./cell_menu.js";
import { bytesOf } from "./envelope.js";
import { section, write } from "./lists.js";
import { currentLayer, hasAttention, isResident, mayAsk, whyNoAttention } from "./model.js";
import { cividis, pen, picture, pixels } from "./palette.js";
import { inspect, isGivenUp } from "./queue.js";
import { idsUpTo, lastPosition } from "./tokens.js";

const THUMB = 20; // cells of a thumbnail's side
const SIZE = 120; // px of a thumbnail
const LEFT = 30;
const TOP = 16;
const kept = new WeakMap(); // node → {count, answer}

const kind = ({ first, previous, self, entropy, distance }, n) => {
  if (first > 0.6) return inside.headKind.rest;
  if (previous > 0.5) return inside.headKind.previous;
  if (self > 0.5) return inside.headKind.self;
  if (entropy > 0.75 * Math.log(Math.max(2, n))) return inside.headKind.wide;
  return distance > 0.35 * n ? inside.headKind.far : "";
};

/** The pane "Heads". `show(node)` fills it; `onUse()` after a head was chosen, `onEdit(edit)` where it is to be changed. */
export function heads(onUse, onEdit) {
  const measure = h("select", { class: "sel", "aria-label": inside.measure }, ...Object.entries(inside.measures).map(([value, text]) => h("option", { value, text })));
  const { element, heading } = section(inside.everyHead, "", measure);
  const canvas = h("canvas", { role: "img", tabindex: "0", class: "headgrid", "aria-label": inside.everyHead });
  const small = h("canvas", { class: "thumb", "aria-hidden": "true" });
  const facts = h("p", { class: "hint num" });
  const kindOf = h("p", { class: "hint strong" });
  const opener = cellMenu(canvas, "head-menu", {
    entries,
    point: (event) => { const { layer, head } = pointed(event); if (isCell(layer, head)) move(layer, head); return isCell(layer, head); },
    place: () => boxOf(at),
  });
  const body = h("div", {}, canvas, h("div", { class: "pointed" }, small, h("div", {}, facts, kindOf, opener)), h("p", { class: "hint", text: inside.headsHelp }));
  const message = h("p", { class: "hint", dir: "auto" });
  element.append(message, body);
  heading.after(requestButton("heads"));
  let grid = null; // {layers, thumb, n}
  let at = { layer: 0, head: 0 };
  let cells = { width: 1, height: 1 };

  const headsOf = (layer) => grid.layers[layer]?.heads ?? null;
  const most = () => Math.max(1, ...grid.layers.map((layer) => layer.heads?.length ?? 0));

  function paint() {
    const width = Math.max(160, canvas.parentElement.clientWidth);
    const count = grid.layers.length;
    cells = { width: (width - LEFT) / most(), height: Math.max(9, Math.min(15, 420 / count)) };
    const context = pen(canvas, width, TOP + count * cells.height + 2);
    const values = grid.layers.flatMap((layer) => layer.heads?.map((head) => head[measure.value]) ?? []);
    const isShare = !["entropy", "distance"].includes(measure.value);
    const low = isShare ? 0 : Math.min(...values);
    const range = Math.max(...values) - low || 1;
    const ink = colour("--ink3");
    context.font = `10.5px ${getComputedStyle(document.body).fontFamily}`;
    context.textBaseline = "middle";
    grid.layers.forEach((layer, row) => {
      if (row % 5 === 0 || row === count - 1) label(context, ink, "right", String(row), LEFT - 7, TOP + (row + 0.5) * cells.height);
      layer.heads?.forEach((head, column) => {
        context.fillStyle = `rgb(${cividis((head[measure.value] - low) / range).join()})`;
        context.beginPath();
        context.roundRect(LEFT + column * cells.width + 0.75, TOP + row * cells.height + 0.75, cells.width - 1.5, cells.height - 1.5, 2.5);
        context.fill();
      });
    });
    const step = Math.ceil(most() / 16);
    for (let column = 0; column < most(); column += step) label(context, ink, "center", String(column), LEFT + (column + 0.5) * cells.width, 6);
    if (typeof state.head === "number") ring(context, "--accent", currentLayer(), state.head);
    ring(context, "--arc", at.layer, at.head);
  }

  function label(context, ink, align, text, x, y) {
    context.fillStyle = ink;
    context.textAlign = align;
    context.fillText(text, x, y);
  }

  function ring(context, name, layer, head) {
    context.strokeStyle = colour(name);
    context.lineWidth = 2;
    context.beginPath();
    context.roundRect(LEFT + head * cells.width + 1, TOP + layer * cells.height + 1, cells.width - 2, cells.height - 2, 3);
    context.stroke();
  }

  function describe() {
    const head = headsOf(at.layer)?.[at.head];
    if (!head) {
      write(facts, inside.layerSilent(at.layer, grid.layers[at.layer]?.reason ?? inside.noReason));
      write(kindOf, "");
      small.hidden = true;
      return;
    }
    const among = Math.exp(head.entropy);
    write(facts, inside.headFacts({
      ...at, first: percent(head.first), previous: percent(head.previous), self: percent(head.self),
      distance: head.distance.toFixed(1), words: among < 10 ? among.toFixed(1) : String(Math.round(among)),
    }));
    write(kindOf, kind(head, grid.n));
    thumbnail();
  }

  function thumbnail() {
    small.hidden = !grid.thumb;
    if (small.hidden) return;
    grid.bytes ??= bytesOf(grid.thumb.data);
    const [, many, side] = grid.thumb.shape;
    const start = (at.layer * many + at.head) * side * side;
    const shares = Float32Array.from(grid.bytes.subarray(start, start + side * side), (byte) => byte / 255);
    const context = pen(small, SIZE, SIZE);
    context.imageSmoothingEnabled = false;
    context.drawImage(picture(pixels(shares, side, side)), 0, 0, SIZE, SIZE);
  }

  function move(layer, head, { isSpoken = false } = {}) {
    const rows = grid.layers.length;
    const next = { layer: Math.max(0, Math.min(rows - 1, layer)), head: Math.max(0, Math.min(most() - 1, head)) };
    if (next.layer === at.layer && next.head === at.head) return;
    at = next;
    paint();
    describe();
    if (isSpoken) announce(facts.textContent);
  }

  function use() {
    if (!headsOf(at.layer)?.[at.head]) return;
    set({ layer: at.layer, head: at.head });
    onUse();
  }

  const isCell = (layer, head) => Boolean(grid) && layer >= 0 && head >= 0 && layer < grid.layers.length && head < most();

  function boxOf({ layer, head }) {
    const box = canvas.getBoundingClientRect();
    const [left, top] = [box.left + LEFT + head * cells.width, box.top + TOP + layer * cells.height];
    return { left, top, right: left + cells.width, bottom: top + cells.height };
  }

  function entries() {
    if (!headsOf(at.layer)?.[at.head]) return [[inside.layerSilent(at.layer, grid.layers[at.layer]?.reason ?? inside.noReason), () => {}]];
    return [[words.ablateHead, () => onEdit({ kind: "head", ...at })], [words.temperHead, () => onEdit({ kind: "temper", ...at })], null, [words.lookThrough, use]];
  }

  const pointed = (event) => {
    const box = canvas.getBoundingClientRect();
    return { layer: Math.floor((event.clientY - box.top - TOP) / cells.height), head: Math.floor((event.clientX - box.left - LEFT) / cells.width) };
  };
  canvas.addEventListener("pointermove", (event) => {
    const { layer, head } = pointed(event);
    if (isCell(layer, head)) move(layer, head);
  });
  canvas.addEventListener("click", () => grid && use());
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!grid || (!step && event.key !== "Enter" && event.key !== " ")) return;
    event.preventDefault();
    event.stopPropagation();
    if (step) move(at.layer + step[0], at.head + step[1], { isSpoken: true });
    else use();
  });
  measure.addEventListener("change", () => grid && draw());

  function draw() {
    canvas.setAttribute("aria-label", inside.headsLabel(inside.measures[measure.value]));
    paint();
    describe();
  }

  function fail(text) {
    body.hidden = true;
    write(message, text);
  }

  /** Fill it with the heads of the whole answer; asks once per answer. */
  async function show(node) {
    const count = lastPosition(node) + 1;
    const isKept = kept.get(node)?.count === count;
    if (!isKept) {
      if (node.live) return fail(inside.lensLater);
      if (!mayAsk(node) || !isResident(node)) return fail(inside.rowGone);
      if (!hasAttention()) return fail(inside.noAttention(whyNoAttention(0) || inside.noReason));
      fail(inside.readingHeads);
      try {
        kept.set(node, { count, answer: await inspect("heads", "heads", { model: node.model, ...editsOf(node, count), token_ids: idsUpTo(node, count), thumb: THUMB }) });
      } catch (failure) {
        if (!isGivenUp(failure)) fail(failure.message);
        return undefined;
      }
    }
    grid = kept.get(node).answer;
    if (!grid.layers.some((layer) => layer.heads)) return fail(inside.noAttention(grid.layers[0]?.reason ?? inside.noReason));
    write(message, "");
    body.hidden = false;
    if (!element.isConnected || !canvas.parentElement.clientWidth) return undefined;
    at = { layer: Math.min(currentLayer() ?? 0, grid.layers.length - 1), head: typeof state.head === "number" ? state.head : 0 };
    draw();
    return undefined;
  }
  return { element, show };
}
