// Three views of one page; the address names the one that is open.
import { byId } from "../core/dom.js";
import { set, state } from "../core/state.js";
import { tablist } from "./tablist.js";

const VIEWS = ["chat", "inside", "models"];
let choose;

/** Open a view. */
export const show = (view, options) => choose(view, options);

function open(view) {
  document.body.dataset.view = view;
  for (const name of VIEWS) byId(`view-${name}`).hidden = name !== view;
  byId("composer").hidden = view === "models";
  const url = new URL(location);
  url.hash = view === "chat" ? "" : view;
  history.replaceState(null, "", url.hash ? url : url.pathname);
  set({ view });
}

export function start() {
  const named = () => VIEWS.find((view) => location.hash === `#${view}`) ?? "chat";
  choose = tablist(byId("views"), VIEWS, open, named());
  addEventListener("hashchange", () => { if (named() !== state.view) show(named()); });
}
