// What can be asked about an answer: of which model it is, and what that model can show.
import { state } from "../core/state.js";

/** The layer that is looked through: chosen, or the model's own suggestion; null without layers. */
export function currentLayer(anatomy = state.anatomy) {
  if (!anatomy?.layers) return state.layer;
  const suggested = anatomy.suggested_layer ?? Math.round(0.75 * anatomy.layers);
  return Math.min(state.layer ?? suggested, anatomy.layers - 1);
}

/** Why the attention of `layer` cannot be shown, or null where it can. */
export function whyNoAttention(layer, anatomy = state.anatomy) {
  if (!anatomy?.attention) return null; // not known yet
  const { mode, per_layer: layers = [], reason } = anatomy.attention;
  if (mode === "none") return reason ?? layers.find((entry) => entry.reason)?.reason ?? "";
  const entry = layers[layer];
  return entry && !entry.available ? entry.reason ?? "" : null;
}

export const hasAttention = (anatomy = state.anatomy) => anatomy?.attention?.mode !== "none";

/** True where the node's model is in memory. */
export const isLoaded = (node) => !node.model || state.status?.resident?.model === node.model;

/** True where a question about the node finds its model in memory, and what that model can show is here. */
export const isResident = (node) => isLoaded(node) && state.anatomy !== undefined;

/** True where its prompt is known to the token, and nothing of its chat is being written. */
export const mayAsk = (node) => Boolean(node.prompt?.token_ids?.length) && !node.isSaved && !node.live;
