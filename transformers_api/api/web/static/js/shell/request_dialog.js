// The dialog "{}": the request that made a panel, in three languages.
import { key } from "../core/api.js";
import { button, copy, h } from "../core/dom.js";
import { asCurl, asJavaScript, asPython, recall } from "../core/request.js";
import { common } from "../words/common.js";
import { openDialog } from "./dialog.js";
import { tablist } from "./tablist.js";

const LANGUAGES = [["curl", asCurl], ["Python", asPython], ["JavaScript", asJavaScript]];
let chosen = "curl";

/** Show how `panel` was asked for. */
export function showRequest(panel) {
  const request = recall(panel);
  const code = h("code");
  const pre = h("pre", { tabindex: "0", class: "request", id: "request-code", role: "tabpanel", dir: "ltr" }, code);
  const copying = button(common.copyCode, () => copy(code.textContent, copying, common.copied), { cls: "btn" });
  const show = (name) => {
    chosen = name;
    code.textContent = LANGUAGES.find(([language]) => language === name)[1](request, Boolean(key.get()));
    pre.setAttribute("aria-label", name);
  };
  const tabs = h("div", { class: "languages", role: "tablist", "aria-label": common.requestTitle },
    ...LANGUAGES.map(([name]) => h("button", { type: "button", role: "tab", id: `request-${name}`, "aria-controls": "request-code", text: name })));
  const body = request
    ? [h("p", { text: common.requestMore }), tabs, pre]
    : [h("p", { text: common.requestNone })];
  openDialog(common.requestTitle, (close) => h("div", { class: "in wide" },
    h("h2", { text: common.requestTitle }), ...body,
    h("div", { class: "row" }, request ? copying : null, button(common.close, close, { cls: "btn pri" }))));
  if (request) tablist(tabs, LANGUAGES.map(([name]) => name), (name) => show(name), chosen);
}

/** The button "{}" of a panel. */
export const requestButton = (panel, { cls = "icon braces" } = {}) =>
  button(common.showRequest, () => showRequest(panel), { cls, glyph: "braces" });
