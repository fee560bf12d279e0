// The request that gives the row that is shown: also where it came with the answer, and nothing was asked.
import { remember } from "../core/request.js";
import { state } from "../core/state.js";
import { currentLayer } from "./model.js";
import { rowQuestion } from "./rows.js";

export function requestOf({ node, position }, showRequest) {
  remember("attention", { method: "POST", path: "/inspect/full_attn", body: rowQuestion(node, currentLayer(node.shape ?? state.anatomy), position) });
  showRequest("attention");
}
