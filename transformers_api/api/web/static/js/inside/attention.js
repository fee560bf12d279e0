// How the attention of a token can be had: from memory, by asking, or not at all and why.
import { state } from "../core/state.js";
import { inside } from "../words/inside.js";
import { currentLayer, hasAttention, isLoaded, isResident, mayAsk, whyNoAttention } from "./model.js";
import { rowAt, tracedLayers } from "./rows.js";
import { tokenAt } from "./tokens.js";

/** The layers that can be chosen for a node: {last, heads(layer)}. */
export function shapeOf(node) {
  const anatomy = node.shape ?? (isResident(node) ? state.anatomy : null);
  const traced = node.tokens?.flatMap(tracedLayers) ?? [];
  return {
    last: (anatomy?.layers ?? Math.max(0, ...traced) + 1) - 1,
    heads: (layer) => anatomy?.attention?.per_layer?.[layer]?.heads ?? anatomy?.heads ?? 0,
  };
}

/** One of {row}, {reason}, {load: id of a model that is not in memory}, {isAsking: until its anatomy is here}, {ask: layer}. */
export function attentionOf(node, position) {
  if (position === 0) return { reason: inside.firstToken };
  const layer = currentLayer(node.shape ?? state.anatomy);
  if (layer !== null) {
    const row = rowAt(node, layer, position);
    if (row) return { row };
  }
  const [traced] = tracedLayers(tokenAt(node, position));
  if (node.live || node.isSaved) return traced === undefined ? { reason: node.live ? inside.lensLater : inside.rowGone } : { row: rowAt(node, traced, position) };
  if (!mayAsk(node)) return { reason: inside.noTokens };
  if (!isResident(node)) return isLoaded(node) ? { isAsking: true } : { load: node.model };
  const none = whyNoAttention(layer);
  if (none !== null) return { reason: hasAttention() ? inside.layerHasNone(none || inside.noReason) : inside.noAttention(none || inside.noReason) };
  return layer === null ? { reason: inside.noTokens } : { ask: layer };
}
