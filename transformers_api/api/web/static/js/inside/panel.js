// The panel beside the tape: tabs, and the pane of the one that is chosen.
import { h } from "../core/dom.js";
import { tablist } from "../shell/tablist.js";
import { inside } from "../words/inside.js";

const NAMES = ["token", "heads", "matrix", "why", "change"];

/** {element, name(), open(name)}; `panes` {name: {element}}, `onOpen(name)` after a change. */
export function panel(panes, onOpen) {
  const tabs = h("div", { class: "ptabs", role: "tablist", "aria-label": inside.tabs },
    ...NAMES.map((name) => h("button", { type: "button", role: "tab", id: `pane-tab-${name}`, "aria-controls": `pane-${name}`, text: inside.tab[name] })));
  const bodies = NAMES.map((name) => h("div", { class: "pane", id: `pane-${name}`, role: "tabpanel", "aria-labelledby": `pane-tab-${name}`, tabindex: "0", hidden: name !== "token" }, panes[name].element));
  const element = h("aside", { class: "panel", "aria-label": inside.panel }, tabs, ...bodies);
  let chosen = "token";
  const open = tablist(tabs, NAMES, (name) => {
    chosen = name;
    NAMES.forEach((other, at) => { bodies[at].hidden = other !== name; });
    onOpen(name);
  });
  return { element, name: () => chosen, open };
}
