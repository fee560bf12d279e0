// The whole matrix of a layer: who read from whom. A part of it can be zoomed into; a cross reads it out.
import { editsOf } from "../chat/changed.js";
import { button, colour, h, save } from "../core/dom.js";
import { raw } from "../core/api.js";
import { percent, visible } from "../core/format.js";
import { announce, notice } from "../core/notice.js";
import { state } from "../core/state.js";
import { requestButton } from "../shell/request_dialog.js";
import { change as words } from "../words/change.js";
import { inside } from "../words/inside.js";
import { cellMenu } from "./cell_menu.js";
import { unpack } from "./envelope.js";
import { rowList, section, write } from "./lists.js";
import { currentLayer, hasAttention, isResident, mayAsk, whyNoAttention } from "./model.js";
import { pen, picture, pixels } from "./palette.js";
import { inspect, isGivenUp } from "./queue.js";
import { idsUpTo, lastPosition, tokenAt } from "./tokens.js";

const SIDE = 384; // cells that are asked for on a side; more are reduced to their strongest
const EDGE = 26; // px for the places' numbers
const CELLS = 6; // of the list

const answers = new WeakMap(); // node → Map of what was asked → {values, rows, cols, shape}

/** The pane "Matrix"; `onPick(position)` selects the token that a row predicts, `onEdit(edit)` changes what was read. */
export function matrix(onPick, onEdit) {
  const { element, heading } = section(inside.matrix);
  const canvas = h("canvas", { role: "img", tabindex: "0", class: "matrix", "aria-label": inside.matrix });
  const readOut = h("p", { class: "readout", dir: "auto" });
  const part = h("p", { class: "hint num" });
  const list = rowList(inside.topCells, "cells", () => {
    const row = { text: h("span", { dir: "auto" }) };
    row.element = h("li", {}, row.text);
    return row;
  }, (row, cell) => write(row.text, sentence(cell.row, cell.column, cell.weight)));
  const message = h("p", { class: "hint", dir: "auto" });
  const zoom = h("div", { class: "row" },
    button(inside.zoomIn, () => zoomBy(0.5), { cls: "btn small" }), button(inside.zoomOut, () => zoomBy(2), { cls: "btn small" }),
    button(inside.whole, () => look(whole()), { cls: "btn small" }),
    cellMenu(canvas, "matrix-menu", {
      entries,
      point: (event) => { if (shown) { cross = indexes(place(event)); paint(); read(); } return Boolean(shown); },
      place: () => { const { left, top } = canvas.getBoundingClientRect(); return { left, top, right: left + EDGE, bottom: top + EDGE }; },
    }));
  const files = h("div", { class: "row" }, button(inside.savePng, savePng, { cls: "btn small" }), button(inside.saveNpz, saveNpz, { cls: "btn small" }));
  const body = h("div", {}, h("div", { class: "frame" }, canvas), readOut, part, zoom, h("p", { class: "hint", text: inside.matrixHelp }),
    h("h3", { text: inside.topCells }), list.element, h("p", { class: "hint", text: inside.notAReason }), files);
  element.append(message, body);
  heading.after(requestButton("matrix"));
  let node = null;
  let shown = null; // {values, rows, cols, shape}: what the canvas shows
  let cross = { row: 0, column: 0 }; // of the whole matrix
  let drag = null;

  const count = () => lastPosition(node) + 1;
  const whole = () => ({ rows: [0, count()], cols: [0, count()] });
  const headName = () => inside.headNames[state.head] ?? inside.headName(state.head);
  const text = (position) => `“${visible(tokenAt(node, position)?.text ?? "")}” ${position}`;
  const sentence = (row, column, weight) => inside.cell(text(row), text(column), percent(weight));

  const question = ({ rows, cols }) => ({
    model: node.model, ...editsOf(node, count()), token_ids: idsUpTo(node, count()), trace_layer: currentLayer(), head: state.head, rows, cols, format: "u8",
    ...(rows[1] - rows[0] > SIDE || cols[1] - cols[0] > SIDE ? { downsample: [SIDE, SIDE] } : {}),
  });

  async function ask(window) {
    const body = question(window);
    const known = answers.get(node) ?? answers.set(node, new Map()).get(node);
    const { token_ids: ids, ...rest } = body;
    const key = JSON.stringify([ids.length, rest]);
    if (!known.has(key)) {
      const answer = await inspect("matrix", "full_attn", body);
      const { shape, values } = unpack(answer.attn);
      known.set(key, { values, shape: shape.slice(-2), rows: window.rows, cols: window.cols });
    }
    return known.get(key);
  }

  /** The weights as they are shown: without the first token's, where that is hidden. */
  function shares({ values, shape: [height, width], cols }) {
    if (!state.hideFirst || cols[0] !== 0 || width < 2) return values;
    const rest = Float32Array.from(values);
    for (let row = 0; row < height; row += 1) {
      const first = rest[row * width];
      rest[row * width] = 0;
      for (let column = 1; column < width; column += 1) rest[row * width + column] /= Math.max(1e-6, 1 - first);
    }
    return rest;
  }

  function paint() {
    const side = Math.max(160, Math.min(520, canvas.parentElement.clientWidth));
    const { rows, cols, shape: [height, width] } = shown;
    const context = pen(canvas, side, side);
    const inner = side - EDGE;
    context.imageSmoothingEnabled = false;
    shown.shares = shares(shown);
    context.drawImage(picture(pixels(shown.shares, width, height)), EDGE, EDGE, inner, inner);
    context.font = `10.5px ${getComputedStyle(document.body).fontFamily}`;
    context.fillStyle = colour("--ink3");
    context.textBaseline = "middle";
    for (let tick = 0; tick < 5; tick += 1) {
      const at = EDGE + (inner * (tick + 0.5)) / 5;
      context.textAlign = "right";
      context.fillText(String(Math.floor(rows[0] + ((rows[1] - rows[0]) * (tick + 0.5)) / 5)), EDGE - 4, at);
      context.textAlign = "center";
      context.fillText(String(Math.floor(cols[0] + ((cols[1] - cols[0]) * (tick + 0.5)) / 5)), at, EDGE / 2);
    }
    const lines = (x, y) => { // the cross, faint over all of its row and column
      context.globalAlpha = 0.5;
      context.fillStyle = colour("--arc");
      context.fillRect(EDGE, y, inner, 1);
      context.fillRect(x, EDGE, 1, inner);
      context.globalAlpha = 1;
    };
    const cell = { x: inner / (cols[1] - cols[0]), y: inner / (rows[1] - rows[0]) };
    lines(EDGE + (cross.column - cols[0] + 0.5) * cell.x, EDGE + (cross.row - rows[0] + 0.5) * cell.y);
    context.strokeStyle = colour("--arc");
    context.lineWidth = 2;
    context.strokeRect(EDGE + (cross.column - cols[0]) * cell.x, EDGE + (cross.row - rows[0]) * cell.y, Math.max(3, cell.x), Math.max(3, cell.y));
    if (drag?.end) context.strokeRect(Math.min(drag.x, drag.end.x), Math.min(drag.y, drag.end.y), Math.abs(drag.end.x - drag.x), Math.abs(drag.end.y - drag.y));
    write(part, inside.shownPart(rows, cols));
  }

  const cellOf = (row, column) => {
    const { rows, cols, shape: [height, width] } = shown;
    const y = Math.floor(((row - rows[0]) * height) / (rows[1] - rows[0]));
    const x = Math.floor(((column - cols[0]) * width) / (cols[1] - cols[0]));
    return shown.shares[y * width + x] ?? 0;
  };

  function top() {
    const { rows, cols, shape: [height, width] } = shown;
    const cells = [];
    for (let y = 0; y < height; y += 1) {
      for (let x = 0; x < width; x += 1) {
        const weight = shown.shares[y * width + x];
        if (cells.length < CELLS || weight > cells.at(-1).weight) {
          cells.push({ row: rows[0] + Math.floor((y * (rows[1] - rows[0])) / height), column: cols[0] + Math.floor((x * (cols[1] - cols[0])) / width), weight });
          cells.sort((a, b) => b.weight - a.weight);
          cells.length = Math.min(cells.length, CELLS);
        }
      }
    }
    return cells.filter(({ weight }) => weight > 0);
  }

  function read({ isSpoken = false } = {}) {
    write(readOut, sentence(cross.row, cross.column, cellOf(cross.row, cross.column)));
    if (isSpoken) announce(readOut.textContent);
  }

  async function look(window) {
    try {
      shown = await ask(window);
    } catch (failure) {
      if (!isGivenUp(failure)) fail(failure.message);
      return;
    }
    if (!canvas.isConnected || !canvas.parentElement.clientWidth) return;
    cross = { row: clamp(cross.row, shown.rows), column: clamp(cross.column, shown.cols) };
    canvas.setAttribute("aria-label", inside.matrixLabel(currentLayer(), headName(), count()));
    paint();
    read();
    list.show(top());
  }

  const clamp = (value, [start, end]) => Math.max(start, Math.min(end - 1, value));

  function zoomBy(factor) {
    if (!shown) return;
    const span = ([start, end], at) => {
      const length = Math.max(2, Math.min(count(), Math.round((end - start) * factor)));
      const first = Math.max(0, Math.min(count() - length, at - Math.floor(length / 2)));
      return [first, first + length];
    };
    look({ rows: span(shown.rows, cross.row), cols: span(shown.cols, cross.column) });
  }

  const place = (event) => {
    const box = canvas.getBoundingClientRect();
    return { x: Math.max(EDGE, event.clientX - box.left), y: Math.max(EDGE, event.clientY - box.top), inner: box.width - EDGE };
  };
  const indexes = ({ x, y, inner }) => ({
    row: clamp(shown.rows[0] + Math.floor(((y - EDGE) / inner) * (shown.rows[1] - shown.rows[0])), shown.rows),
    column: clamp(shown.cols[0] + Math.floor(((x - EDGE) / inner) * (shown.cols[1] - shown.cols[0])), shown.cols),
  });
  function entries() {
    const [layer, head] = [currentLayer(), typeof state.head === "number" ? state.head : null];
    const edge = cross.column <= cross.row ? [[words.blockEdge, () => onEdit({ kind: "edge", layer, head, query: cross.row, key: cross.column })]] : [];
    const ofHead = head === null ? [] : [[words.ablateHead, () => onEdit({ kind: "head", layer, head })]];
    return [...edge, ...ofHead, [head === null ? words.temperLayer : words.temperHead, () => onEdit({ kind: "temper", layer, head })], null,
      [words.lookAt, () => onPick(Math.min(cross.row + 1, lastPosition(node)))]];
  }

  canvas.addEventListener("pointerdown", (event) => {
    if (!shown || event.button !== 0) return;
    canvas.setPointerCapture(event.pointerId);
    drag = place(event);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!shown) return;
    const at = place(event);
    if (drag && Math.hypot(at.x - drag.x, at.y - drag.y) > 6) drag.end = at;
    cross = indexes(at);
    paint();
    read();
  });
  canvas.addEventListener("pointerup", () => {
    const done = drag;
    drag = null;
    if (!done?.end) return done && onPick(Math.min(cross.row + 1, lastPosition(node)));
    const [a, b] = [indexes(done), indexes(done.end)];
    const range = (one, other) => [Math.min(one, other), Math.max(one, other) + 1];
    return look({ rows: range(a.row, b.row), cols: range(a.column, b.column) });
  });
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!shown || (!step && !"+-0".includes(event.key))) return;
    event.preventDefault();
    event.stopPropagation();
    if (event.key === "0") look(whole());
    else if (!step) zoomBy(event.key === "+" ? 0.5 : 2);
    else {
      cross = { row: clamp(cross.row + step[0], shown.rows), column: clamp(cross.column + step[1], shown.cols) };
      paint();
      read({ isSpoken: true });
    }
  });

  function savePng() {
    canvas.toBlob((blob) => save(`${inside.fileName(node.model)}-layer-${currentLayer()}.png`, blob, "image/png"));
  }

  async function saveNpz() {
    try {
      await saveAttention(node);
    } catch (failure) {
      notice(failure.message);
    }
  }

  function fail(sentence) {
    body.hidden = true;
    write(message, sentence);
  }

  function show(next, position) {
    if (node !== next) cross = { row: Math.max(0, position - 1), column: Math.max(0, position - 1) };
    const isNew = node !== next || !shown || shown.rows[1] > lastPosition(next) + 1;
    node = next;
    if (node.live) return fail(inside.lensLater);
    if (!mayAsk(node) || !isResident(node)) return fail(inside.rowGone);
    const none = whyNoAttention(currentLayer());
    if (none !== null) return fail(hasAttention() ? inside.layerHasNone(none || inside.noReason) : inside.noAttention(none || inside.noReason));
    body.hidden = false;
    write(message, "");
    cross.row = Math.max(0, position - 1);
    return look(isNew ? whole() : { rows: shown.rows, cols: shown.cols });
  }
  return { element, show };
}

/** Offer the current layer's attention of the whole answer, all heads, as a file for numpy. */
export async function saveAttention(node) {
  const body = { model: node.model, ...editsOf(node), token_ids: idsUpTo(node, lastPosition(node) + 1), trace_layer: currentLayer(), head: "all" };
  const file = await raw("/inspect/full_attn", "blob", { body, accept: "application/x-npz" });
  save(`${inside.fileName(node.model)}-layer-${body.trace_layer}.npz`, file, "application/octet-stream");
}
