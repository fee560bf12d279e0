// Three views of one page; the address names the one that is open.
import { byId } from "../core/dom.js";
import { set, state } from "../core/state.js";
import { tablist } from "./tablist.js";

const VIEWS = ["chat", "inside", "models"];
let choose;

/** The view that the address names; others may stand behind it: see inside/link.js. */
const namedView = () => /^#([a-z]+)/.exec(location.hash)?.[1] ?? "";

/** Open a view. */
export const show = (view, options) => choose(view, options);

function open(view) {
  document.body.dataset.view = view;
  for (const name of VIEWS) byId(`view-${name}`).hidden = name !== view;
  byId("composer").hidden = view === "models";
  if ((namedView() || "chat") !== view) history.replaceState(null, "", view === "chat" ? location.pathname : `#${view}`);
  set({ view });
}

export function start() {
  const named = () => VIEWS.find((view) => namedView() === view) ?? "chat";
  choose = tablist(byId("views"), VIEWS, open, named());
  addEventListener("hashchange", () => { if (named() !== state.view) show(named()); });
}
