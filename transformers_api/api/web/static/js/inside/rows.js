// What a token read: one row of attention for each head, `layer:position` by node. The row of the token
// at position p has a weight for each of the p tokens before it; weight j belongs to token j.
import { editsOf } from "../chat/changed.js";
import { state } from "../core/state.js";
import { unpack } from "./envelope.js";
import { inspect } from "./queue.js";
import { idsUpTo, tokenAt } from "./tokens.js";

const kept = new WeakMap(); // node → Map of `layer:position` → row

function rowsOf(node) {
  if (!kept.has(node)) kept.set(node, new Map());
  return kept.get(node);
}

/** A row {layer, start, heads, keys, weights, state, sink, isRough} of a trace's own entry. */
function fromTrace(entry) {
  const { shape, values } = entry.weights
    ? { shape: [entry.weights.length, entry.weights[0]?.length ?? 0], values: Float32Array.from(entry.weights.flat()) }
    : unpack(entry);
  return { layer: entry.layer, start: entry.key_start ?? 0, heads: shape[0], keys: shape[1], weights: values, state: entry.state, sink: entry.sink ?? null, isRough: entry.dtype === "uint8" };
}

/** The row that is at hand, or null. */
export function rowAt(node, layer, position) {
  const rows = rowsOf(node);
  const key = `${layer}:${position}`;
  if (rows.has(key)) return rows.get(key);
  const entry = tokenAt(node, position)?.attn?.find((row) => row.layer === layer);
  return entry ? fromTrace(entry) : null; // unpacked each time: a long answer has thousands
}

/** The layers whose rows the trace of the token brought. */
export const tracedLayers = (token) => (token?.attn ?? []).map(({ layer }) => layer);

/** The row from the server: all heads of the query that predicts the token at `position`. */
export async function askRow(node, layer, position) {
  const answer = await inspect("attention", "full_attn", rowQuestion(node, layer, position));
  const { shape, values } = unpack(answer.attn);
  const [heads, , keys] = shape.length === 3 ? shape : [1, ...shape];
  const row = {
    layer, start: position - keys, heads, keys, weights: values, state: answer.state,
    sink: answer.sink === null || answer.sink === undefined ? null : [answer.sink].flat(Infinity),
  };
  rowsOf(node).set(`${layer}:${position}`, row);
  return row;
}

// The query is the token before. The key at its own place is the last that it reads.
export const rowQuestion = (node, layer, position) => ({
  model: node.model, ...editsOf(node, position), token_ids: idsUpTo(node, position), trace_layer: layer, head: "all", rows: [position - 1, position], format: "f16",
});

/** {values, first}: the weights by key of one head, or of all, `first` that of the first token.
 *  With `hideFirst` it counts as nothing and the others as shares of the rest. */
export function weightsOf(row, head, hideFirst) {
  const values = new Float32Array(row.keys);
  const chosen = head === "mean" || head === "max" ? null : Math.min(row.heads - 1, Number(head));
  for (let key = 0; key < row.keys; key += 1) {
    let value = chosen === null ? 0 : row.weights[chosen * row.keys + key];
    if (chosen === null) {
      for (let at = 0; at < row.heads; at += 1) {
        const weight = row.weights[at * row.keys + key];
        value = head === "max" ? Math.max(value, weight) : value + weight / row.heads;
      }
    }
    values[key] = value;
  }
  const hasFirst = row.start === 0 && row.keys > 0;
  const first = hasFirst ? values[0] : 0;
  if (hideFirst && hasFirst && row.keys > 1) {
    const rest = head === "max" ? 1 : Math.max(1e-6, 1 - first);
    values[0] = 0;
    for (let key = 1; key < row.keys; key += 1) values[key] = Math.min(1, values[key] / rest);
  }
  return { values, first, start: row.start };
}

/** The heaviest places, [{position, weight}], heaviest first. */
export function heaviest({ values, start }, many, least) {
  const places = [];
  for (let key = 0; key < values.length; key += 1) if (values[key] > least) places.push({ position: start + key, weight: values[key] });
  return places.sort((a, b) => b.weight - a.weight).slice(0, many);
}

const CELLS = 200_000; // of one question

/** Have the rows of every written token at hand, for one layer; `onProgress(done, all)`. */
export async function gatherRows(node, layer, start, onProgress) {
  const end = start + node.tokens.length;
  const missing = (position) => position > 0 && !rowAt(node, layer, position);
  let from = start;
  while (from < end && !missing(from)) from += 1;
  while (from < end) {
    onProgress(from - start, end - start);
    const to = Math.min(end, from + Math.max(1, Math.floor(CELLS / (end * (state.anatomy?.heads ?? 64)))));
    const body = { model: node.model, ...editsOf(node, to - 1), token_ids: idsUpTo(node, to - 1), trace_layer: layer, head: "all", rows: [from - 1, to - 1], format: "u8" };
    const { shape: [heads, rows, keys], values } = unpack((await inspect("gather", "full_attn", body)).attn);
    for (let row = 0; row < rows; row += 1) {
      const length = from + row;
      const weights = new Float32Array(heads * length);
      for (let head = 0; head < heads; head += 1) weights.set(values.subarray((head * rows + row) * keys, (head * rows + row) * keys + length), head * length);
      rowsOf(node).set(`${layer}:${length}`, { layer, start: 0, heads, keys: length, weights, state: "exact", sink: null });
    }
    from = to;
  }
}
