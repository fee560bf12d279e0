// Keys of the view Inside: tokens, layers, heads.
import { set, state } from "../core/state.js";
import { isLetter } from "../shell/keys.js";
import { currentLayer } from "./model.js";
import { lastPosition, promptLength } from "./tokens.js";

/** `selected()`, `pick(node, position, {focus})`, `stop()`: true where branches were stopped. */
export function start({ selected, pick, stop }) {
  addEventListener("keydown", (event) => {
    if (state.view !== "inside" || event.isComposing) return;
    if (event.key === "Escape" && !event.defaultPrevented && !state.writing && !event.target.closest?.("dialog, [role=menu]")) {
      if (stop()) event.preventDefault();
      return;
    }
    if (!document.querySelector(".tape") || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.closest?.("input, textarea, select, dialog, [role=tablist], [role=menu], [contenteditable]")) return;
    if (moves(event, selected(), pick) || (isLetter(event) && changes(event.key))) event.preventDefault();
  });
}

function moves(event, { node, position }, pick) {
  const forward = getComputedStyle(document.documentElement).direction === "rtl" ? -1 : 1;
  const last = lastPosition(node);
  const to = { ArrowLeft: position - forward, ArrowRight: position + forward, Home: promptLength(node), End: last }[event.key];
  if (to === undefined) return false;
  pick(node, Math.max(0, Math.min(last, to)), { focus: true });
  return true;
}

function changes(key) {
  if (key === "h") set({ hideFirst: !state.hideFirst });
  else if (key === "m") set({ head: nextHead() });
  else if (key === "[" || key === "]") {
    const last = (state.anatomy?.layers ?? 1) - 1;
    set({ layer: Math.max(0, Math.min(last, (currentLayer() ?? 0) + (key === "]" ? 1 : -1))) });
  } else return false;
  return true;
}

function nextHead() {
  if (state.head === "mean") return "max";
  if (state.head === "max") return 0;
  const heads = state.anatomy?.attention?.per_layer?.[currentLayer()]?.heads ?? state.anatomy?.heads ?? 0;
  return state.head + 1 < heads ? state.head + 1 : "mean";
}
