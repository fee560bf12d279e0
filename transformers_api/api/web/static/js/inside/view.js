// The view Inside: one conversation, token by token. It draws at most once per frame, and only while it
// is open; boxes are read at the start of a frame, before anything is written.
import { button, chooseFile, h } from "../core/dom.js";
import { percent, spoken, isSpecial } from "../core/format.js";
import { announce, notice } from "../core/notice.js";
import { on, set, state, touch } from "../core/state.js";
import { requestOf } from "./requests.js";
import { inside } from "../words/inside.js";
import { attentionOf } from "./attention.js";
import { complete, isBlind, mayComplete } from "./blind.js";
import { othersOf } from "./compare.js";
import { baseOf, branch, liveForks, onForks, stopForks } from "./forks.js";
import { heads } from "./heads.js";
import { start as startKeys } from "./keys.js";
import { decidedAt, readAll, readingsAt } from "./lens.js";
import { matrix, saveAttention } from "./matrix.js";
import { currentLayer, hasAttention } from "./model.js";
import { panel } from "./panel.js";
import { savePicture } from "./picture.js";
import { forget, isGivenUp } from "./queue.js";
import { askRow, weightsOf } from "./rows.js";
import { parseTrace, saveTrace } from "./saved.js";
import { sharePage } from "./share.js";
import { Stage } from "./stage.js";
import { tokenPane } from "./token_pane.js";
import { lastPosition, promptLength, tokenAt } from "./tokens.js";
import { why } from "./why.js";

const SHADE_MS = 200; // while it writes: shade and arcs at most five times a second
const PANEL_MS = 100; // and the panel ten times
const NEAR_END = 90; // px

let root;
let context;
let stage;
let panes;
let side;
let saved = null; // a trace that was opened from a file
let isSavedOpen = false;
let colouring = "read";
let frame = 0;
let weights = null; // of the selected token
let arcsDue = false;
let times = { shade: 0, panel: 0 };
let question = 0; // the newest question about attention

/** The answer that is looked into. */
function current() {
  if (isSavedOpen) return saved;
  const chosen = state.selection?.node;
  if (chosen && state.path.includes(baseOf(chosen))) return baseOf(chosen);
  if (chosen && chosen === stage.compared) return stage.node;
  if (state.writing?.chat === state.chat) return state.writing.node;
  return state.path.findLast((node) => node.role === "assistant" && node.tokens?.length) ?? null;
}

/** The token that is asked about: the chosen one, or the newest. {node, position} */
function selected() {
  const node = current();
  const { selection } = state;
  if (state.isPinned && selection && (baseOf(selection.node) === node || selection.node === stage.compared)) return selection;
  const written = node.live ? null : node.tokens.findLast(({ text }) => !isSpecial(text));
  return { node, position: written?.position ?? lastPosition(node) };
}

function pick(node, position, { focus = false, isQuiet = false } = {}) {
  set({ selection: { node, position }, isPinned: true });
  touch("selection");
  const element = stage.chipAt(node, position, { opens: true });
  element?.scrollIntoView({ block: "nearest", inline: "nearest" });
  if (focus) element?.focus({ preventScroll: true });
  const token = tokenAt(node, position);
  if (token && !isQuiet) announce(inside.tokenFacts(position, spoken(token.text), token.prob === undefined ? "" : percent(token.prob)));
}

function step(by) {
  const { node, position } = selected();
  pick(node, Math.max(0, Math.min(lastPosition(node), position + by)));
}

const follow = () => { set({ isPinned: false, selection: null }); draw(); };

/** Ask for what the selected token read, show it, shade the tape. */
async function showAttention(node, position, isForced = false) {
  const mine = (question += 1);
  const had = attentionOf(node, position);
  const shows = (more) => {
    weights = more.row ? weightsOf(more.row, state.head, state.hideFirst) : null;
    panes.token.show(node, position, { ...more, weights, because: more.reason });
    if (side.name() !== "why" && colouring === "read") shade();
  };
  if (had.ask === undefined && !(had.load && isForced)) {
    forget("attention");
    shows(had);
    return;
  }
  panes.token.show(node, position, { isAsking: true });
  try {
    const row = await askRow(node, had.ask ?? currentLayer(), position);
    if (mine === question) shows({ row });
  } catch (failure) {
    if (mine === question && !isGivenUp(failure)) shows({ reason: failure.message });
  }
}

function shade() {
  const { node } = selected();
  stage.of(node).shade.show(weights, (place) => stage.chipAt(node, place));
  for (const other of stage.shades) if (other !== stage.of(node).shade) other.show(null, () => null);
  arcsDue = true;
  schedule();
}

/** Shade by anything else: numbers by position. */
function shadeBy(scores) {
  weights = scores ? { values: Float32Array.from(scores, (score) => Math.max(0, score)), start: 0, first: 0 } : null;
  shade();
  arcsDue = false;
}

function showDecided(node) {
  const last = state.anatomy?.layers ?? 1;
  const scores = new Float32Array(lastPosition(node) + 1);
  for (let position = promptLength(node); position < scores.length; position += 1) {
    const token = tokenAt(node, position);
    const layer = decidedAt(readingsAt(node, position, token) ?? [], token.id);
    scores[position] = layer === null ? 1 : ((layer + 1) / last) ** 2; // shown as its square root
  }
  shadeBy(scores);
}

async function colourBy(name) {
  colouring = name;
  stage.legend.hidden = name !== "read";
  stage.decided.hidden = name !== "decided";
  const node = current();
  if (name === "read") return render();
  try {
    await readAll(node, (done, all) => stage.say(done < all ? inside.deciding(done, all) : ""));
    if (colouring === "decided" && current() === node) showDecided(node);
  } catch (failure) {
    if (!isGivenUp(failure)) stage.say(failure.message);
  }
  return undefined;
}

/** The pane that is open. */
function showPane(isForced = false) {
  const { node, position } = selected();
  const name = side.name();
  if (name === "heads") panes.heads.show(node);
  if (name === "matrix") panes.matrix.show(node, position);
  if (name === "why") panes.why.show(node, position);
  if (name === "token") {
    showAttention(node, position, isForced);
    const token = tokenAt(node, position);
    if (token) panes.token.showLayers(node, position, token);
  } else if (name !== "why") showAttention(node, position, isForced);
}

function note(node) {
  if (isSavedOpen) stage.say(inside.savedTrace(saved.name), inside.closeSaved, () => { isSavedOpen = false; render(); });
  else if (isBlind(node) && mayComplete(node)) stage.say(inside.blind, inside.look, () => look(node));
  else if (attentionOf(node, lastPosition(node)).row?.start > 0 && attentionOf(node, lastPosition(node)).row?.state === "truncated") stage.say(inside.truncated);
  else if (colouring === "read") stage.say("");
}

async function look(node) {
  stage.say(inside.asking);
  try {
    await complete(node);
    render(true);
  } catch (failure) {
    if (!isGivenUp(failure)) stage.say(failure.message, inside.askAgain, () => look(node));
  }
}

function showEmpty(node) {
  stage.node = null;
  root.classList.remove("inside");
  root.replaceChildren(h("h1", { class: "sr", text: inside.title }), h("div", { class: "empty" },
    h("h2", { text: inside.emptyTitle }), h("p", { text: node?.text ? inside.noTokens : inside.emptyMore }), button(inside.openSaved, openSaved, { cls: "btn" })));
}

/** Build what the open answer needs; `isNew` although it is the same one. */
function render(isNew = false) {
  if (state.view !== "inside") return;
  const node = current();
  if (!node || (!node.tokens?.length && !node.live)) {
    showEmpty(node);
    return;
  }
  if (!stage.element.isConnected) {
    root.classList.add("inside");
    root.replaceChildren(h("h1", { class: "sr", text: inside.title }), stage.element, side.element);
  }
  const others = othersOf(node, saved);
  if (stage.compared && !others.includes(stage.compared)) stage.compared = null;
  if (isNew || stage.node !== node || stage.tapes[0].isOutdated) stage.show(node, stage.compared, others);
  stage.comparer.hidden = others.length === 0 || Boolean(stage.compared) || Boolean(node.live);
  stage.replay.setCount(node.live ? 0 : node.tokens.length);
  stage.colour.hidden = Boolean(node.live || node.isSaved) || state.anatomy?.lens?.available === false;
  stage.legend.hidden = colouring !== "read" || !hasAttention();
  note(node);
  if (node.live) schedule();
  else draw();
}

/** What is shown of the selection, now. */
function draw() {
  if (state.view !== "inside" || !stage.node) return;
  const { node, position } = selected();
  stage.forks?.draw();
  for (const tape of stage.tapes) tape.append();
  if (position >= 0) stage.press(node, position);
  showPane();
  if (colouring === "decided" && !node.live) showDecided(baseOf(node));
}

const isNearEnd = () => stage.element.scrollHeight - stage.element.scrollTop - stage.element.clientHeight < NEAR_END;

/** One frame: read boxes, then write. */
function drawFrame(now) {
  frame = 0;
  if (state.view !== "inside" || !stage.node) return;
  const { node, position } = selected();
  const isLive = Boolean(stage.node.live);
  const { shade: shades } = stage.of(node);
  const arcs = arcsDue && colouring === "read" ? shades.measure(weights, stage.chipAt(node, position), (place) => stage.chipAt(node, place)) : null;
  const isFollowing = isLive && !state.isPinned && isNearEnd();
  arcsDue = false;
  if (arcs) shades.draw(arcs);
  if (stage.tapes[0].isOutdated) stage.show(stage.node, null, []);
  stage.forks?.draw();
  if (isLive) writeLive(now, isFollowing);
}

/** The newest tokens, and the panel as often as it may. */
function writeLive(now, isFollowing) {
  const came = stage.tapes[0].append(true);
  const { node, position } = selected();
  if (came && position >= 0) stage.press(node, position);
  if (now - times.panel > PANEL_MS && (came || now - times.panel > 5 * PANEL_MS)) {
    times.panel = now;
    const attention = attentionOf(node, position);
    const isDue = now - times.shade > SHADE_MS;
    if (isDue || !attention.row) weights = attention.row ? weightsOf(attention.row, state.head, state.hideFirst) : null;
    if (side.name() === "token") panes.token.show(node, position, { ...attention, because: attention.reason, weights: attention.row ? weightsOf(attention.row, state.head, state.hideFirst) : null });
    if (isDue) {
      times.shade = now;
      shade();
    }
  }
  if (isFollowing && came) stage.element.scrollTop = 1e9;
  schedule();
}

function schedule() {
  frame ||= requestAnimationFrame(drawFrame);
}

async function openSaved() {
  const text = await chooseFile(".jsonl,application/jsonl,application/json");
  if (text === null) return;
  try {
    saved = parseTrace(text);
  } catch {
    notice(inside.notATrace);
    return;
  }
  saved.name = saved.model || inside.savedTrace.name;
  isSavedOpen = true;
  set({ selection: null, isPinned: false, layer: saved.layer ?? state.layer });
  context.show("inside");
  render(true);
}

const gather = (done, all) => stage.say(inside.gathering(done, all));

/** Do something with the whole answer, and say what fails. */
async function withAnswer(act) {
  try {
    await act(current());
  } catch (failure) {
    if (!isGivenUp(failure)) notice(failure.message);
  }
  note(current());
}

function fileEntries() {
  const node = current();
  const canAsk = !node.live && !node.isSaved && hasAttention();
  return [
    ...(node.live ? [] : [[inside.menu.page, () => withAnswer((answer) => sharePage(answer, gather))], [inside.menu.trace, () => withAnswer((answer) => saveTrace(answer, gather))]]),
    ...(canAsk ? [[inside.menu.npz, () => withAnswer(saveAttention)]] : []),
    [inside.menu.png, () => savePicture(stage.tapes[0], node.model ?? "trace")],
    null,
    [inside.menu.open, openSaved],
  ];
}

function replayTo(count) {
  const node = current();
  const { tape } = stage.of(node);
  const position = count === null ? null : promptLength(node) + count - 1;
  tape.hideAfter(position);
  if (position !== null) pick(node, position, { isQuiet: true });
}

function compareWith(other) {
  stage.compared = other;
  render(true);
}

function makePanes() {
  const point = (position) => {
    root.querySelector(".tok.hot")?.classList.remove("hot");
    if (position !== null) stage.chipAt(selected().node, position)?.classList.add("hot");
  };
  return {
    token: tokenPane({
      onStep: step, onLive: follow, onPoint: point, onPick: (position) => pick(selected().node, position),
      onBranch: (candidate) => branch(selected().node, selected().position, candidate),
      onExpected: () => look(baseOf(selected().node)), onLoad: () => showPane(true), again: () => showPane(),
      showRequest: () => requestOf(selected(), context.showRequest),
    }),
    heads: heads(() => side.open("token")),
    matrix: matrix((position) => pick(selected().node, position)),
    why: why((scores) => (scores ? shadeBy(scores) : shade())),
  };
}

export function mount(element, shared) {
  root = element;
  context = shared;
  panes = makePanes();
  stage = new Stage({
    onPick: pick, onStep: replayTo, onColour: colourBy, onCompare: () => compareWith(othersOf(current(), saved).at(-1)),
    onChoose: compareWith, onEndCompare: () => compareWith(null), fileEntries,
  });
  side = panel(panes, () => { if (stage.node) draw(); });
  for (const key of ["view", "path", "anatomy", "writing"]) on(key, () => render());
  for (const key of ["selection", "layer", "head", "hideFirst"]) on(key, () => (current() === stage.node ? draw() : render()));
  on("chat", () => { isSavedOpen = false; });
  onForks(() => { schedule(); if (stage.node && !liveForks(stage.node).length) render(); });
  addEventListener("resize", () => { if (state.view === "inside") shade(); });
  startKeys({ selected, pick, stop: () => (stage.node && liveForks(stage.node).length ? (stopForks(stage.node), true) : false) });
}
