// The log of what was loaded and unloaded, the newest first.
import { h } from "../core/dom.js";
import { requestButton } from "../shell/request_dialog.js";
import { models as words } from "../words/models.js";

function entry(swap) {
  return h("li", { data: { outcome: swap.outcome } },
    h("time", { class: "num", datetime: words.isoAt(swap.at), text: words.at(swap.at) }),
    h("span", {}, h("bdi", { class: "swapped", text: swap.model }), " ", h("span", { text: words.outcome[swap.outcome](swap) }),
      swap.error ? h("span", { class: "why", text: swap.error, dir: "auto" }) : null));
}

/** The card; `show(swaps)` changes it. */
export function swapsCard() {
  const list = h("ol", { class: "swaps", tabindex: "0", "aria-label": words.swaps });
  const none = h("p", { class: "hint", text: words.swapsNone });
  const element = h("section", { class: "card", "aria-label": words.swaps },
    h("header", { class: "cap" }, h("h2", { text: words.swaps }), requestButton("status")), none, list);
  const show = (swaps) => {
    element.hidden = !swaps;
    none.hidden = Boolean(swaps?.length);
    list.hidden = !swaps?.length;
    const newest = JSON.stringify(swaps?.at(-1) ?? null);
    if (list.dataset.newest === newest) return;
    list.dataset.newest = newest;
    list.replaceChildren(...(swaps ?? []).toReversed().map(entry));
  };
  return { element, show };
}
