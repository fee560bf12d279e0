// Branches: another token in the place of one that was written, and what follows it. They go on from
// exactly the token ids that were read; no text is tokenised again. Each is a request of its own.
import { editsOf } from "../chat/changed.js";
import { tracedLayer } from "../chat/request_body.js";
import { keepVersion } from "../chat/run.js";
import { json, stream } from "../core/api.js";
import { percent, spoken } from "../core/format.js";
import { announce, notice } from "../core/notice.js";
import { set, state } from "../core/state.js";
import { newId } from "../core/tree.js";
import { inside } from "../words/inside.js";
import { complete, mayComplete } from "./blind.js";
import { takeCompletion } from "./chunks.js";
import { isResident } from "./model.js";
import { idsUpTo, promptLength } from "./tokens.js";

const LEAST = 48; // tokens of a branch, at least
const listeners = new Set();

/** Call `listener` when a branch changes. */
export const onForks = (listener) => listeners.add(listener);
const changed = () => { for (const listener of listeners) listener(); };

/** The answer under which a node's branches stand: a branch of a branch stands beside it. */
export const baseOf = (node) => node.fork?.base ?? node;
export const forksOf = (node) => node.forks ?? [];
export const liveForks = (node) => forksOf(node).filter(({ node: { live } }) => live);

/** What is noted of every token of a branch, if there is room. */
function traceOf(node) {
  const layer = isResident(node) ? tracedLayer() : null;
  return { topk: 10, specials: true, required: false, ...(layer === null ? {} : { layers: [layer], attn: "u8" }) };
}

function forcedToken(token, candidate) {
  const rank = token.topk.findIndex(({ id }) => id === candidate.id);
  return {
    id: candidate.id, text: candidate.text, position: token.position, surprisal: -Math.log(candidate.p), entropy: token.entropy,
    rank: rank < 0 ? null : rank, prob: candidate.p, topk: token.topk, attn: token.attn, forced: true,
  };
}

/** Write what follows `candidate` in the place of the token at `position` of `source`. */
export async function branch(source, position, candidate) {
  const base = baseOf(source);
  const index = position - promptLength(source);
  const exists = forksOf(base).some((fork) => fork.source === source && fork.index === index && fork.candidate.id === candidate.id);
  if (exists) return;
  const controller = new AbortController();
  const node = {
    id: newId(), parent: base.parent, role: "assistant", text: "", model: source.model, prompt: source.prompt, verified: source.verified,
    tokens: [...source.tokens.slice(0, index), forcedToken(source.tokens[index], candidate)], live: "write", branched: true, ...editsOf(source), edits: source.edits,
  };
  const fork = { base, source, index, candidate, node, stop: () => controller.abort() };
  node.fork = fork;
  base.forks = [...forksOf(base), fork];
  changed();
  try {
    await write(fork, controller.signal);
    node.live = null;
    if (mayComplete(node)) await complete(node);
    announce(inside.branchDone(spoken(candidate.text)));
  } catch (failure) {
    if (failure.name === "AbortError") node.finish = "stopped";
    else {
      node.finish = "failed";
      notice(inside.branchFailed(failure.message));
    }
  }
  node.live = null;
  changed();
}

async function write({ node, base }, signal) {
  const prompt = idsUpTo(node, Infinity);
  const room = state.anatomy?.context ? state.anatomy.context - prompt.length : Infinity;
  const most = Math.max(1, Math.min(room, Math.max(LEAST, base.tokens.length)));
  const body = {
    model: node.model, ...editsOf(node, prompt.length + most), prompt, max_tokens: most,
    temperature: Number(state.settings.temperature || 0), return_token_ids: true, trace: traceOf(node),
  };
  const onEvent = (chunk) => {
    takeCompletion(node, chunk);
    changed();
  };
  await stream("/v1/completions", body, { signal, panel: "branch", onEvent });
}

export function removeFork(fork) {
  fork.stop();
  fork.base.forks = forksOf(fork.base).filter((other) => other !== fork);
  if (state.selection?.node === fork.node) set({ selection: null, isPinned: false });
  changed();
}

/** Stop all that are being written; true where there were any. */
export function stopForks(node) {
  const forks = liveForks(node);
  for (const fork of forks) fork.stop();
  return forks.length > 0;
}

/** The text that all tokens spell: a character may be of several tokens. */
async function textOf(node) {
  const end = node.finish === "stop" ? -1 : undefined; // what ended it has no text
  const tokens = node.tokens.slice(0, end);
  const text = tokens.map((token) => token.text).join("");
  if (!text.includes("�") && tokens.every((token) => token.text)) return text;
  const answer = await json("/detokenize", { body: { model: node.model, tokens: tokens.map(({ id }) => id) } });
  return answer.prompt;
}

/** Make the branch a version of the answer. */
export async function keepFork(fork) {
  const { base, node, index } = fork;
  let text;
  try {
    text = await textOf(node);
  } catch (failure) {
    notice(inside.branchFailed(failure.message));
    return;
  }
  const { tokens, prompt, model, verified, finish, edits } = node;
  base.forks = forksOf(base).filter((other) => other !== fork);
  const version = keepVersion(base.parent, { text: text.trim(), tokens, prompt, model, verified, finish, edits, ...editsOf(node) });
  set({ selection: { node: version, position: tokens[index].position }, isPinned: true });
}

export const odds = ({ candidate }) => percent(candidate.p);
