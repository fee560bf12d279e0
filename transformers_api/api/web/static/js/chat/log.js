// The conversation: an article for each message of the path, drawn once and changed in place.
import { byId, h } from "../core/dom.js";
import { on, state } from "../core/state.js";
import { versions } from "../core/tree.js";
import { onPaint } from "../shell/theme.js";
import { chat as words } from "../words/chat.js";
import { resultTurn } from "./calls.js";
import { ModelTurn } from "./model_turn.js";
import { onFrame } from "./run.js";
import { userTurn } from "./user_turn.js";
import { comparison } from "./versions.js";

const FOLLOWS_PX = 90;
const NEAR_PX = 900; // above and below what is seen, answers are drawn whole
const drawn = new Map(); // node id → {element, key, turn}
let near;

const scroller = () => byId("chat-scroll");
const fromEnd = () => scroller().scrollHeight - scroller().scrollTop - scroller().clientHeight;
let follows = true;
let shown = null; // the chat

/** Go to the end, which may move once more when what is near has been drawn. */
export function toEnd() {
  follows = true;
  scroller().scrollTop = scroller().scrollHeight;
  requestAnimationFrame(() => { if (follows) scroller().scrollTop = scroller().scrollHeight; });
}

/** What an article depends on: while it is the same the element stays. */
function keyOf(node, isLast, awaitsResults) {
  const { live, finish, error, isEdited, model, tokens, reasoning } = node;
  return JSON.stringify([
    live, finish, error, isEdited, model, isLast, awaitsResults, versions(state.chat, node).map(({ id }) => id), Boolean(state.writing), state.compared === node.parent,
    live ? 0 : [node.text.length, tokens?.length, Boolean(tokens?.[0]?.surprisal === null), reasoning?.length],
  ]);
}

function article(node, isLast, next) {
  const awaitsResults = Boolean(node.calls?.length) && !node.live && !next && !node.error;
  const key = keyOf(node, isLast, awaitsResults);
  const old = drawn.get(node.id);
  if (old?.key === key && old.node === node) return old.element;
  if (old?.turn) near.unobserve(old.element);
  const isCompared = node.role === "assistant" && state.compared === node.parent && versions(state.chat, node).length > 1;
  let turn = null;
  if (node.role === "assistant" && !isCompared) {
    turn = new ModelTurn(node, { isLast, awaitsResults });
    if (node.live || isLast) turn.drawWhole();
    else turn.drawPlain();
    near.observe(turn.element);
  }
  const element = turn?.element ?? (isCompared ? comparison(node) : node.role === "tool" ? resultTurn(node) : userTurn(node, isLast));
  drawn.set(node.id, { element, key, turn, node });
  return element;
}

function place(box, elements) {
  elements.forEach((element, i) => {
    if (box.children[i] !== element) box.insertBefore(element, box.children[i] ?? null);
  });
  while (box.children.length > elements.length) box.lastElementChild.remove();
}

function redrawRibbons() {
  for (const { turn } of drawn.values()) if (turn?.isDrawn) turn.drawRibbon();
}

function draw() {
  const { path, chat } = state;
  if (chat !== shown) follows = true;
  shown = chat;
  const wasAtEnd = follows;
  const focused = document.activeElement?.closest?.("[data-node]") && document.activeElement;
  byId("hello").hidden = path.length > 0;
  const heading = path.length ? [title] : [];
  place(byId("log"), [...heading, ...path.map((node, i) => article(node, i === path.length - 1, path[i + 1]))]);
  if (focused && !focused.isConnected) {
    document.querySelector(`[data-node="${CSS.escape(focused.closest("[data-node]").dataset.node)}"] [aria-label="${CSS.escape(focused.getAttribute("aria-label") ?? "")}"]`)?.focus();
  }
  const ids = new Set(path.map(({ id }) => id));
  for (const id of drawn.keys()) if (!ids.has(id)) drawn.delete(id);
  requestAnimationFrame(redrawRibbons);
  if (wasAtEnd) toEnd();
}

const title = h("h1", { class: "sr", text: words.conversation });

function grow(node) {
  const turn = drawn.get(node.id)?.turn;
  if (!turn || state.view !== "chat" || !node.live) return false;
  const isBehind = turn.grow();
  if (follows) scroller().scrollTop = scroller().scrollHeight;
  return isBehind;
}

export function startLog() {
  near = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) if (isIntersecting) drawn.get(target.dataset.node)?.turn?.drawWhole();
  }, { root: scroller(), rootMargin: `${NEAR_PX}px 0px` });
  on("chat", draw);
  on("compared", draw);
  on("writing", draw);
  on("view", (view) => { if (view === "chat") draw(); });
  onFrame(grow);
  onPaint(redrawRibbons);
  addEventListener("beforeprint", () => { for (const { turn } of drawn.values()) turn?.drawWhole(); });
  let width = 0;
  new ResizeObserver(([{ contentRect }]) => {
    if (contentRect.width !== width) redrawRibbons();
    width = contentRect.width;
    if (follows) scroller().scrollTop = scroller().scrollHeight;
  }).observe(byId("log"));
  let top = 0;
  let height = 0;
  scroller().addEventListener("scroll", () => {
    const { scrollTop, scrollHeight } = scroller();
    const isReader = scrollTop < top && scrollHeight >= height; // not a text that became shorter
    top = scrollTop;
    height = scrollHeight;
    if (fromEnd() < FOLLOWS_PX) follows = true;
    else if (isReader) follows = false;
    byId("down").hidden = fromEnd() < 160;
  }, { passive: true });
  byId("down").addEventListener("click", toEnd);
}
