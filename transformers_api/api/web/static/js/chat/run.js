// Answers: asking for one, writing it down as it comes, ending it. One at a time.
import { stream } from "../core/api.js";
import { Failure } from "../core/errors.js";
import { announce, notice } from "../core/notice.js";
import { set, state, touch } from "../core/state.js";
import { refresh } from "../core/status.js";
import { keep, keepSoon, removeNode } from "../core/store.js";
import { addNode, leafBelow, titleOf, VERSION } from "../core/tree.js";
import { chat as words } from "../words/chat.js";
import { common } from "../words/common.js";
import { listChat } from "./chats.js";
import { editsOf } from "./changed.js";
import { take } from "./chunks.js";
import { askedNow, bodyOf } from "./request_body.js";

const PATH = "/v1/chat/completions";
const PATIENCE_MS = 2000; // with the page's own questions about the model, which say what can be noted of an answer
const callbacks = new Set();
let frame = 0;

/** Call `callback(node)` at most once a frame while an answer is written, and in the next one where it returns true:
 *  it has left something for later. Returns a function that stops it. */
export function onFrame(callback) {
  callbacks.add(callback);
  return () => callbacks.delete(callback);
}

function draw(node) {
  frame ||= requestAnimationFrame(() => {
    frame = 0;
    let isBehind = false;
    for (const callback of callbacks) isBehind = callback(node) === true || isBehind;
    if (isBehind) draw(node); // although nothing may come for a long time
  });
}

function ended(node, clock) {
  const now = performance.now();
  const first = clock.first ?? now;
  node.took = (clock.took ?? 0) + (clock.last ?? now) - first;
  node.wait ??= Math.round(first - clock.begun);
  node.took = Math.round(node.took);
  if (node.reasoning && node.thought === undefined) node.thought = Math.round((clock.answer ?? now) - first);
  if (node.twin && node.usage) node.usage = { ...node.usage, completion_tokens: node.usage.completion_tokens - node.twin.tokens.length };
  delete node.twin?.live;
  if (clock.usage && node.usage) {
    node.usage = { ...clock.usage, completion_tokens: clock.usage.completion_tokens + node.usage.completion_tokens };
  }
  delete node.live;
}

function sayEnd(node) {
  const count = node.usage?.completion_tokens ?? node.tokens.length;
  if (node.finish === "stopped") announce(words.saidStopped);
  else if (node.finish === "length") announce(words.saidCut(count));
  else if (!node.error) announce(words.saidComplete(count));
}

function noteFailure(node, error) {
  if (error.name === "AbortError") node.finish = "stopped";
  else if (error instanceof Failure) node.error = error.plain;
  else node.error = { status: 0, code: "refused_here", message: error.message };
}

/** Until `promise` is settled, or for `ms`. */
const within = (ms, promise) => Promise.race([promise, new Promise((resolve) => { setTimeout(resolve, ms); })]);

/** False while another answer is written, and in a chat of a later version of the page. */
function mayWrite() {
  const isLater = state.chat.v > VERSION;
  if (isLater) notice(common.laterVersion);
  return !state.writing && !isLater;
}

async function write(chat, node, leaf, { continues = false, isCalm = false, intervene, edits } = {}) {
  const control = new AbortController();
  const clock = { begun: performance.now(), took: node.took, usage: continues ? node.usage : null };
  const onEvent = (chunk) => {
    const now = performance.now();
    if (take(chunk.choices?.[0]?.index ? node.twin : node, chunk)) {
      clock.first ??= now;
      clock.last = now;
      if (node.text) clock.answer ??= now;
      if (node.live !== "write") {
        node.live = "write";
        touch("chat");
      }
    }
    keepSoon(chat);
    draw(node);
  };
  node.live = "wait";
  if (edits) node.edits = edits;
  if (intervene?.compare === "free") node.twin = { id: `${node.id}-twin`, role: "assistant", text: "", tokens: [], model: node.model, live: "wait" };
  set({ writing: { node, chat, stop: () => control.abort(), clock }, compared: null, selection: null, isPinned: false });
  touch("chat");
  announce(words.saidWaiting);
  const asked = refresh();
  try {
    if (state.anatomy?.id !== state.model) await within(PATIENCE_MS, asked);
    node.asked = { ...askedNow({ isCalm }), intervene: intervene ?? (continues ? editsOf(node).intervene : undefined) };
    await stream(PATH, bodyOf(chat, leaf, node.asked, { continues }), { signal: control.signal, panel: "answer", onEvent });
  } catch (error) {
    noteFailure(node, error);
  }
  ended(node, clock);
  chat.changed = Date.now();
  await keep(chat); // what looks finished outlives a reload
  set({ writing: null });
  touch("chat", "chats");
  sayEnd(node);
  draw(node);
  refresh();
}

/** The request that an answer was asked with, also after a reload. */
export const requestOf = (chat, node) => ({
  method: "POST", path: PATH, body: { ...bodyOf(chat, node.parent, node.asked), stream: true, stream_options: { include_usage: true } },
});

/** Ask for an answer below `parent`. Returns it. */
async function answer(chat, parent, options) {
  const node = addNode(chat, parent, { role: "assistant", text: "", tokens: [], model: state.model });
  await write(chat, node, parent, options);
  return node;
}

/** Send a message below `parent`, and ask for the answer; `isCalm`: the likeliest one. */
export async function say(text, parent = state.chat.leaf, { isCalm = false } = {}) {
  const { chat } = state;
  if (!text.trim() || !mayWrite()) return;
  chat.title ||= titleOf(text);
  const node = addNode(chat, parent, { role: "user", text });
  listChat(chat);
  keep(chat); // what was asked outlives whatever becomes of the answer
  await answer(chat, node.id, { isCalm });
}

/** Take an answer away that failed before its first word, and show the other one again. */
function takeBack(node, other) {
  const { chat } = state;
  removeNode(chat, node.id);
  chat.leaf = leafBelow(chat, other.id);
  touch("chat");
  keep(chat);
}

/** Write another version of an answer; one that failed before its first word makes room for it. Returns
 *  the new one. `intervene`: what is changed in the model for it, `edits` the same in words; refused, it is no version. */
export async function again(node, options = {}) {
  const { chat } = state;
  if (!mayWrite()) return null;
  const isNothing = node.error && !node.text && !node.calls?.length;
  if (isNothing) removeNode(chat, node.id);
  listChat(chat);
  const written = await answer(chat, node.parent, options);
  if (options.intervene && written.error && !written.text && chat.nodes[node.id]) takeBack(written, node);
  return written;
}

/** Go on with an answer that was cut. */
export async function resume(node) {
  const { chat } = state;
  if (!mayWrite()) return;
  delete node.finish;
  delete node.error;
  await write(chat, node, node.id, { continues: true });
}

/** Give the results of an answer's calls, {call id: text}, and ask for the next answer. */
export async function giveResults(node, results) {
  const { chat } = state;
  if (!mayWrite()) return;
  let parent = node.id;
  for (const call of node.calls) {
    parent = addNode(chat, parent, { role: "tool", text: results[call.id], call: { id: call.id, name: call.name } }).id;
  }
  await answer(chat, parent);
}

/** Show another version of a message, with what followed it. */
export function turnTo(node) {
  if (state.writing) return;
  const { chat } = state;
  chat.leaf = leafBelow(chat, node.id);
  set({ selection: null, isPinned: false });
  touch("chat");
  keepSoon(chat);
}

/** A version that was written elsewhere, as a fork in Inside, takes its place in the chat. Returns it. */
export function keepVersion(parent, content) {
  const node = addNode(state.chat, parent, { role: "assistant", branched: true, ...content });
  listChat(state.chat);
  touch("chat");
  keep(state.chat);
  return node;
}
