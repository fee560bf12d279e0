// What is sent: the messages of a path, the settings, and the trace that the ribbon and Inside live from.
import { state } from "../core/state.js";
import { path } from "../core/tree.js";
import { fieldsOf } from "./settings.js";

const CANDIDATES = 10;

function message(node) {
  if (node.role === "tool") return { role: "tool", tool_call_id: node.call.id, content: node.text };
  if (node.role === "user") return { role: "user", content: node.text };
  const calls = (node.calls ?? []).map((call) => ({ id: call.id, type: "function", function: { name: call.name, arguments: call.arguments } }));
  return {
    role: "assistant", content: node.text || (calls.length ? null : ""),
    ...(node.reasoning ? { reasoning_content: node.reasoning } : {}), ...(calls.length ? { tool_calls: calls } : {}),
  };
}

/** The layer that is noted while an answer is written; null where the model shows none. */
export function tracedLayer() {
  const { anatomy, layer } = state;
  if (!anatomy?.layers || !anatomy.attention?.while_writing) return null;
  const chosen = Math.min(layer ?? anatomy.suggested_layer ?? Math.round(0.75 * anatomy.layers), anatomy.layers - 1);
  return anatomy.attention.per_layer?.[chosen]?.available === false ? null : chosen;
}

function trace() {
  const layer = state.anatomy?.id === state.model ? tracedLayer() : null;
  return { topk: CANDIDATES, specials: true, uncertainty: true, required: false, ...(layer === null ? {} : { layers: [layer], attn: "u8" }) };
}

function messages(chat, leaf, system) {
  const nodes = path(chat, leaf).filter((node) => node.role !== "assistant" || node.text || node.calls?.length || node.id === leaf);
  return [...(system?.trim() ? [{ role: "system", content: system }] : []), ...nodes.map(message)];
}

/** What is asked beside the messages; throws Error where a setting is no JSON. */
export function askedNow({ isCalm = false } = {}) {
  const fields = fieldsOf(state.settings);
  if (isCalm) fields.temperature ??= 0;
  return { model: state.model ?? undefined, system: state.settings.system, ...fields, trace: trace(), return_token_ids: true };
}

/** The body of the request for an answer below `leaf`. */
export function bodyOf(chat, leaf, { model, system, ...asked }, { continues = false } = {}) {
  return { model, messages: messages(chat, leaf, system), ...asked, ...(continues ? { continue_final_message: true } : {}) };
}
