// The versions of a message: arrows between them, and the last two side by side.
import { button, h } from "../core/dom.js";
import { set, state } from "../core/state.js";
import { versions } from "../core/tree.js";
import { chat as words } from "../words/chat.js";
import { Markdown } from "./markdown.js";
import { drawRibbon } from "./ribbon.js";
import { turnTo } from "./run.js";
import { statistics } from "./statistics.js";

const COMPARED = 2;

/** The group "Versions" of a message; null where it has one alone. */
export function versionGroup(node) {
  const all = versions(state.chat, node);
  if (all.length < 2) return null;
  const at = all.indexOf(node);
  const step = (label, to, glyph) => button(label, () => {
    turnTo(all[to]);
    document.querySelector(`[data-node="${CSS.escape(all[to].id)}"] [aria-label="${label}"]:not(:disabled)`)?.focus();
  }, { cls: "icon", glyph, disabled: !all[to] || Boolean(state.writing) });
  const isCompared = state.compared === node.parent;
  return h("div", { class: "turns", role: "group", "aria-label": words.versions },
    step(words.previousVersion, at - 1, "left"),
    h("span", { class: "num", text: `${at + 1} / ${all.length}` }),
    step(words.nextVersion, at + 1, "right"),
    node.role === "assistant"
      ? button(words.compare, () => set({ compared: isCompared ? null : node.parent }), { cls: "icon", glyph: "columns", "aria-pressed": String(isCompared) })
      : null);
}

function card(version, chosen, widen) {
  const prose = h("div", { class: "prose", dir: "auto" });
  new Markdown(prose).draw(version.text);
  const canvas = h("canvas", { "aria-hidden": "true" });
  const isKept = version === chosen;
  const element = h("article", { class: "one", "aria-label": words.model },
    h("div", { class: "who" }, h("b", { text: version.model ?? "", dir: "auto" }),
      version.branched ? h("span", { class: "pill", text: words.branch }) : null,
      button(words.fullWidth, () => widen(), { cls: "icon wider", glyph: "expand" })),
    prose, h("div", { class: "ribbon" }, canvas), statistics(version),
    h("div", { class: "row" }, button(isKept ? words.kept : words.keepThis, () => {
      turnTo(version);
      set({ compared: null });
    }, { cls: `btn small${isKept ? " pri" : ""}` })));
  requestAnimationFrame(() => drawRibbon(canvas, version.tokens ?? []));
  return element;
}

/** The last two versions of an answer, side by side. */
export function comparison(node) {
  const all = versions(state.chat, node).slice(-COMPARED);
  const shown = all.includes(node) ? all : [node, all.at(-1)];
  const widen = () => box.classList.toggle("stacked");
  const box = h("div", { class: "sidebyside", role: "group", "aria-label": words.compared }, ...shown.map((version) => card(version, node, widen)));
  return h("div", { class: "msg", data: { node: node.id } }, box, h("div", { class: "under" }, versionGroup(node)));
}
