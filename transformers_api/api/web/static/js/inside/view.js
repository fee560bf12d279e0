// The view Inside: one conversation, token by token. It draws at most once per frame, and only while it
// is open; boxes are read at the start of a frame, before anything is written.
import { button, h } from "../core/dom.js";
import { isSpecial, percent, spoken } from "../core/format.js";
import { announce } from "../core/notice.js";
import { on, set, state } from "../core/state.js";
import { inside } from "../words/inside.js";
import { attentionOf } from "./attention.js";
import { complete, isBlind, mayComplete } from "./blind.js";
import { change } from "./change.js";
import { othersOf } from "./compare.js";
import { Due } from "./due.js";
import { keep as keepEdits } from "./edits.js";
import { showEmpty } from "./empty.js";
import { fileEntries, openTrace } from "./files.js";
import { baseOf, branch, liveForks, onForks, stopForks } from "./forks.js";
import { heads } from "./heads.js";
import { start as startKeys } from "./keys.js";
import { readAll } from "./lens.js";
import { matrix } from "./matrix.js";
import { currentLayer, isResident, mayAsk } from "./model.js";
import { panel } from "./panel.js";
import { forget, isGivenUp } from "./queue.js";
import { requestOf } from "./requests.js";
import { askRow, weightsOf } from "./rows.js";
import { Shading } from "./shading.js";
import { Stage } from "./stage.js";
import { tokenPane } from "./token_pane.js";
import { lastPosition, promptLength, tokenAt } from "./tokens.js";
import { why } from "./why.js";

const shade = new Due(200); // while it writes: shade and arcs at most five times a second
const pane = new Due(100); // and the panel ten times
const NEAR_END = 90; // px
const SLOW = ["heads", "matrix", "why", "parts"];

let root;
let context;
let stage;
let shading;
let panes;
let side;
let saved = null; // a trace that was opened from a file
let isSavedOpen = false;
let colouring = "read";
let frame = 0;
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
  if (selection && (baseOf(selection.node) === node || selection.node === stage.compared) && tokenAt(selection.node, selection.position)) return selection;
  const written = node.live ? null : node.tokens.findLast(({ text }) => !isSpecial(text));
  return { node, position: written?.position ?? lastPosition(node) };
}

function pick(node, position, { focus = false, isQuiet = false } = {}) {
  set({ isPinned: true, selection: { node, position } });
  const element = stage.chipAt(node, position, { opens: true });
  element?.scrollIntoView({ block: "nearest", inline: "nearest" });
  if (focus) element?.focus({ preventScroll: true });
  const token = tokenAt(node, position);
  if (token && !isQuiet) announce(inside.tokenFacts(position, spoken(token.text), token.prob === undefined || token.prob === null ? "" : percent(token.prob)));
}

function step(by) {
  const { node, position } = selected();
  pick(node, Math.max(0, Math.min(lastPosition(node), position + by)));
}

/** The attention of a token as it is shown: its weights, or why there are none. */
function showWeights(target, had) {
  const weights = had.row ? weightsOf(had.row, state.head, state.hideFirst) : null;
  panes.token.show(target.node, target.position, { ...had, weights, because: had.reason });
  if (side.name() !== "why" && colouring === "read") shading.show(weights, target);
}

/** Show what the selected token read: at once where it is at hand, exactly as soon as it is asked for.
 *  A trace's own rows are rounded to a byte. `loads`: although its model has to be loaded. */
async function showAttention(target, loads) {
  const mine = (question += 1);
  const { node, position } = target;
  const had = attentionOf(node, position);
  if (had.row || had.reason || (had.load && !loads)) showWeights(target, had);
  else panes.token.show(node, position, { isAsking: true });
  const refines = had.row?.isRough && mayAsk(node) && isResident(node) && !stage.replay.isOn;
  if (had.ask === undefined && !refines && !(had.load && loads)) return forget("attention");
  try {
    const row = await askRow(node, had.row?.layer ?? had.ask ?? currentLayer(), position);
    if (mine === question) showWeights(target, { row });
  } catch (failure) {
    if (mine === question && !had.row && !isGivenUp(failure)) showWeights(target, { reason: failure.message, hasFailed: true });
  }
  return undefined;
}

async function colourBy(name) {
  colouring = name;
  const node = current();
  if (name === "read") return draw();
  try {
    await readAll(node, (done, all) => stage.say(done < all ? inside.deciding(done, all) : ""));
    if (colouring === name && current() === node) shading.showDecided(node);
  } catch (failure) {
    if (!isGivenUp(failure)) stage.say(failure.message);
  }
  return undefined;
}

/** Fill the pane that is open. */
function showPane(loads = false) {
  const target = selected();
  const { node, position } = target;
  const name = side.name();
  for (const other of SLOW) if (other !== (name === "change" ? "parts" : name)) forget(other); // nobody waits for it any more
  if (name !== "token") panes[name].show(node, position);
  showAttention(target, loads);
  const token = tokenAt(node, position);
  if (name === "token" && token) panes.token.showLayers(node, position, token);
}

/** What is to be known about the whole answer. */
function note(node) {
  const row = node.tokens.length ? attentionOf(node, lastPosition(node)).row : null;
  if (isSavedOpen) stage.say(inside.savedTrace(saved.model || inside.fromFile), inside.closeSaved, () => { isSavedOpen = false; render(); });
  else if (isBlind(node)) stage.say(inside.blind, inside.look, mayComplete(node) ? () => look(node) : null);
  else if (row?.start > 0 && row.state === "truncated") stage.say(inside.truncated);
  else stage.say("");
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

/** Build what the answer needs; `isNew` although it is the same one. */
function render(isNew = false) {
  if (state.view !== "inside") return undefined;
  const node = current();
  if (!node || (!node.tokens?.length && !node.live)) {
    stage.node = null;
    return showEmpty(root, node, openSaved);
  }
  if (!stage.element.isConnected) {
    root.classList.add("inside");
    root.replaceChildren(h("h1", { class: "sr", text: inside.title }), stage.element, side.element);
  }
  const others = othersOf(node, saved);
  if (node.live && node.twin) compareBy(node, node.twin);
  if (stage.compared && !others.includes(stage.compared)) compareBy(node, null);
  if (isNew || stage.node !== node || stage.isOutdated) stage.show(node, stage.compared, others);
  stage.comparer.hidden = others.length === 0 || Boolean(stage.compared) || Boolean(node.live);
  stage.replay.setCount(node.live || stage.compared ? 0 : node.tokens.length);
  stage.colour.disabled = Boolean(node.live || node.isSaved || stage.compared) || state.anatomy?.lens?.available === false;
  root.toggleAttribute("data-live", Boolean(node.live));
  note(node);
  return node.live ? schedule() : draw();
}

/** Show the selection as it is now. */
function draw() {
  if (state.view !== "inside" || !stage.node) return;
  const { node, position } = selected();
  stage.forks?.draw();
  for (const tape of stage.tapes) tape.append();
  if (position >= 0) stage.press(node, position);
  showPane();
  if (colouring === "decided" && !node.live) shading.showDecided(baseOf(node));
  if (colouring === "pushed" && !node.live) shading.showPushed(stage.node);
}

const isNearEnd = () => stage.element.scrollHeight - stage.element.scrollTop - stage.element.clientHeight < NEAR_END;

/** One frame: read boxes, then write. */
function drawFrame(now) {
  frame = 0;
  if (state.view !== "inside" || !stage.node) return;
  const isLive = Boolean(stage.node.live);
  const arcs = shading.measure();
  const isFollowing = isLive && !state.isPinned && isNearEnd();
  arcs?.();
  if (stage.isOutdated) stage.show(stage.node, stage.compared, othersOf(stage.node, saved));
  stage.forks?.draw();
  if (isLive) writeLive(now, isFollowing);
}

/** The newest tokens, and the panel as often as it may. */
function writeLive(now, isFollowing) {
  const came = stage.grow();
  const target = selected();
  const { node, position } = target;
  if (position >= 0 && node.tokens.length) {
    stage.press(node, position);
    const isPanelDue = pane.comes(target, now);
    const isShadeDue = shade.comes(target, now);
    if (isPanelDue || isShadeDue) {
      const had = attentionOf(node, position);
      const weights = had.row ? weightsOf(had.row, state.head, state.hideFirst) : null;
      if (isPanelDue && side.name() === "token") panes.token.show(node, position, { ...had, because: had.reason, weights });
      if (isShadeDue && colouring === "read") shading.show(weights, target);
    }
  }
  if (isFollowing && came) stage.element.scrollTop = 1e9;
  schedule();
}

function schedule() {
  frame ||= requestAnimationFrame(drawFrame);
}

async function openSaved() {
  const trace = await openTrace();
  if (!trace) return;
  saved = trace;
  isSavedOpen = true;
  colouring = stage.colour.value = "read";
  set({ selection: null, isPinned: false, layer: trace.layer ?? state.layer });
  context.show("inside");
  render(true);
}

function replayTo(count) {
  const node = current();
  const position = count === null ? null : promptLength(node) + count - 1;
  stage.of(node).tape.hideAfter(position);
  if (position !== null) pick(node, position, { isQuiet: true });
}

/** The other run, and the colours that are about it. */
function compareBy(node, other) {
  stage.compared = other;
  colouring = stage.colour.value = other && other === node.twin ? "pushed" : "read";
}

function compareWith(other) {
  compareBy(current(), other);
  render(true);
}

function makePanes() {
  const addEdit = (edit) => {
    side.open("change");
    panes.change.add(edit);
  };
  const point = (position) => {
    root.querySelector(".tok.hot")?.classList.remove("hot");
    if (position !== null) stage.chipAt(selected().node, position)?.classList.add("hot");
  };
  return {
    token: tokenPane({
      onStep: step, onLive: () => { set({ isPinned: false, selection: null }); schedule(); }, onPoint: point,
      onPick: (position) => pick(selected().node, position), onBranch: (candidate) => branch(selected().node, selected().position, candidate),
      onExpected: () => look(baseOf(selected().node)), onLoad: () => showPane(true), again: () => showPane(),
      showRequest: () => requestOf(selected(), context.showRequest),
    }),
    heads: heads(() => side.open("token"), addEdit),
    matrix: matrix((position) => pick(selected().node, position), addEdit),
    change: change((answer, before) => { if (current() === answer) compareWith(answer.twin ?? before); }),
    why: why((scores) => (scores ? shading.showScores(scores, selected()) : shading.show(null, selected()))),
  };
}

export function mount(element, shared) {
  root = element;
  context = shared;
  stage = new Stage({
    onPick: pick, onStep: replayTo, onColour: colourBy, onCompare: () => compareWith(othersOf(current(), saved).at(-1)),
    onChoose: compareWith, onEndCompare: () => compareWith(null), onMeasured: () => draw(),
    fileEntries: () => fileEntries(current(), stage.tapes[0], { say: (text) => stage.say(text), done: () => note(current()), open: openSaved }),
  });
  shading = new Shading(stage, schedule);
  panes = makePanes();
  side = panel(panes, () => { if (stage.node) draw(); });
  on("chat", () => { isSavedOpen = false; });
  for (const key of ["view", "path", "anatomy", "writing"]) on(key, () => render());
  for (const key of ["selection", "layer", "head", "hideFirst"]) on(key, () => (state.view === "inside" && stage.node && current() === stage.node ? draw() : render()));
  onForks(() => {
    schedule();
    if (stage.node && !liveForks(stage.node).length) render();
  });
  addEventListener("resize", () => { if (state.view === "inside" && stage.node) shading.again(); });
  on("view", keepEdits);
  startKeys({ selected, pick, stop: () => stage.node !== null && stopForks(stage.node) });
}
