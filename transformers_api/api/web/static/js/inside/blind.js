// Answers whose tokens are known by their ids alone: written without a trace, or read from a file.
import { editsOf } from "../chat/changed.js";
import { bodyOf } from "../chat/request_body.js";
import { state, touch } from "../core/state.js";
import { keep } from "../core/store.js";
import { isResident, mayAsk } from "./model.js";
import { inspect } from "./queue.js";
import { factsOf, idsUpTo, noteFacts, promptLength } from "./tokens.js";

const isUnknown = (token) => token.surprisal === null || token.surprisal === undefined;

/** True where something of its written tokens has to be asked for. */
export const isBlind = (node) => !node.live && !node.isSaved && Boolean(node.tokens?.some(isUnknown));
export const mayComplete = (node) => isBlind(node) && mayAsk(node) && isResident(node);

/** Who said what in the prompt, where the answer did not tell: of the same messages, if they still give the
 *  same tokens. */
async function spansOf(node) {
  if (state.chat.nodes[node.id] !== node) return [];
  const { messages } = bodyOf(state.chat, node.parent);
  const answer = await inspect(`spans ${node.id}`, "tokens", { model: node.model, messages });
  const isSame = answer.token_ids.length === node.prompt.token_ids.length && answer.token_ids.every((id, at) => id === node.prompt.token_ids[at]);
  return isSame ? answer.spans : [];
}

/** One question about all tokens: how expected the given ones were, and what is missing of the written. */
export async function complete(node) {
  const answer = await inspect(`expected ${node.id}`, "tokens", { model: node.model, ...editsOf(node), token_ids: idsUpTo(node, Infinity), logprobs: true, topk: 10 });
  const facts = factsOf(answer);
  noteFacts(node, facts);
  const start = promptLength(node);
  node.prompt = { ...node.prompt, tokens: answer.tokens.slice(0, start) };
  if (!node.prompt.spans?.length) node.prompt.spans = await spansOf(node).catch(() => []);
  node.tokens.forEach((token, at) => {
    if (isUnknown(token)) Object.assign(token, facts[start + at], { text: answer.tokens[start + at], position: start + at });
  });
  if (state.chat.nodes[node.id] === node) {
    touch("chat");
    await keep(state.chat);
  }
}
