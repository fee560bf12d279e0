// Saved traces: JSON lines, the first about the prompt, then a token each. They open without a server.
import { save } from "../core/dom.js";
import { state } from "../core/state.js";
import { inside } from "../words/inside.js";
import { pack } from "./envelope.js";
import { currentLayer, isResident, mayAsk, whyNoAttention } from "./model.js";
import { gatherRows, rowAt } from "./rows.js";
import { promptLength } from "./tokens.js";

const FORMAT = "transformers-api.trace/1";
const MANY = 200_000; // tokens of a file, at most
const MOST_HEADS = 1024; // of a layer

/** What is known of an answer, rows of the current layer included: {header, tokens}. */
export async function collect(node, onProgress) {
  const layer = currentLayer(node.shape ?? state.anatomy);
  const isAsked = layer !== null && mayAsk(node) && isResident(node) && whyNoAttention(layer) === null;
  if (isAsked) await gatherRows(node, layer, promptLength(node), onProgress);
  const anatomy = node.shape ?? (isResident(node) ? state.anatomy : null);
  const header = {
    format: FORMAT, model: node.model ?? null, saved: new Date().toISOString(), layer, verified: node.verified ?? null,
    prompt: node.prompt ?? null, text: node.text, finish: node.finish ?? null,
    shape: anatomy && { layers: anatomy.layers, heads: anatomy.heads },
  };
  const tokens = node.tokens.map((token, at) => {
    const row = layer === null ? null : rowAt(node, layer, promptLength(node) + at);
    const attn = row ? [{ layer, key_start: row.start, state: row.state, sink: row.sink, ...pack(row.weights, row.heads, row.keys) }] : token.attn;
    const { isGiven, ...facts } = token;
    return { ...facts, attn };
  });
  return { header, tokens };
}

export async function saveTrace(node, onProgress) {
  const { header, tokens } = await collect(node, onProgress);
  save(`${inside.fileName(node.model ?? "trace")}.jsonl`, [header, ...tokens].map((line) => `${JSON.stringify(line)}\n`).join(""), "application/jsonl");
}

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
const isText = (value) => typeof value === "string";
const numberOr = (value, other) => (isNumber(value) ? value : other);
const countOr = (value, other) => (Number.isInteger(value) && value >= 0 && value <= MANY ? value : other);

const candidateOf = (candidate) => ({ id: numberOr(candidate?.id, -1), text: String(candidate?.text ?? ""), p: Math.max(0, Math.min(1, numberOr(candidate?.p, 0))) });

/** A row as the API writes it, or null: what does not fit its shape is left out. */
function rowOf(row) {
  const fits = isNumber(row?.layer) && Array.isArray(row.shape) && row.shape.length === 2 && row.shape.every((length) => countOr(length, 0) > 0)
    && ["uint8", "float16"].includes(row.dtype) && isText(row.data) && (row.dtype === "float16" || (Array.isArray(row.scale) && row.scale.every(isNumber)));
  if (!fits) return null;
  const bytes = row.shape[0] * row.shape[1] * (row.dtype === "uint8" ? 1 : 2);
  const isWhole = /^[A-Za-z0-9+/]*={0,2}$/.test(row.data) && Math.abs((row.data.length * 3) / 4 - bytes) <= 3;
  const { layer, key_start, state: how, sink, dtype, shape, data, scale } = row;
  return isWhole ? { layer, key_start: countOr(key_start, 0), state: isText(how) ? how : "", sink: Array.isArray(sink) && sink.every(isNumber) ? sink : null, dtype, shape, data, scale } : null;
}

function tokenOf(line, position) {
  if (!isNumber(line?.id)) throw new TypeError("a token has no id");
  return {
    id: line.id, text: String(line.text ?? ""), position, surprisal: numberOr(line.surprisal, null), entropy: numberOr(line.entropy, 0), rank: numberOr(line.rank, null),
    prob: numberOr(line.prob, undefined), topk: (Array.isArray(line.topk) ? line.topk : []).slice(0, 20).map(candidateOf),
    ...(line.forced ? { forced: true } : {}), attn: (Array.isArray(line.attn) ? line.attn : []).map(rowOf).filter(Boolean),
  };
}

function promptOf(prompt) {
  const ids = Array.isArray(prompt?.token_ids) ? prompt.token_ids.filter(isNumber) : [];
  const spans = (Array.isArray(prompt?.spans) ? prompt.spans : []).filter(({ role, start, end } = {}) => isText(role) && isNumber(start) && isNumber(end));
  return { token_ids: ids, tokens: ids.map((_, at) => String(prompt.tokens?.[at] ?? "")), spans: spans.map(({ role, start, end, section }) => ({ role, start, end, section })) };
}

/** The answer in the text of a file, as a node of no chat; throws where it is none. */
export function parseTrace(text) {
  const [header, ...lines] = text.split("\n").filter(Boolean).slice(0, MANY).map((line) => JSON.parse(line));
  if (header?.format !== FORMAT) throw new TypeError("not a trace");
  const prompt = promptOf(header.prompt);
  const tokens = lines.map((line, at) => tokenOf(line, prompt.token_ids.length + at));
  const layer = countOr(header.layer, null);
  const heads = Math.min(countOr(header.shape?.heads, 0), MOST_HEADS);
  const shape = { layers: countOr(header.shape?.layers, 0) || (layer ?? 0) + 1, heads };
  return {
    id: "saved", parent: null, role: "assistant", isSaved: true, text: String(header.text ?? ""), model: header.model === null ? undefined : String(header.model ?? ""),
    prompt, tokens, verified: header.verified === true ? true : null, finish: header.finish, shape, layer,
  };
}
