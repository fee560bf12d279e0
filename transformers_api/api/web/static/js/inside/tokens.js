// A conversation as the model saw it: the tokens of the exact prompt, then those of the answer.
// A position counts both, from 0.
const asked = new WeakMap(); // node → what /inspect/tokens told of each position

export const promptLength = (node) => node.prompt?.token_ids?.length ?? node.tokens?.[0]?.position ?? 0;
export const lastPosition = (node) => promptLength(node) + (node.tokens?.length ?? 0) - 1;
export const isGiven = (node, position) => position < promptLength(node);
const hasPrompt = (node) => Boolean(node.prompt?.token_ids?.length);

/** The token at a position: {id, text, position, surprisal?, …}; null where there is none. */
export function tokenAt(node, position) {
  const start = promptLength(node);
  if (position >= start) return node.tokens?.[position - start] ?? null;
  if (position < 0 || !hasPrompt(node)) return null;
  const facts = asked.get(node)?.[position];
  return { id: node.prompt.token_ids[position], text: node.prompt.tokens?.[position] ?? "�", position, isGiven: true, ...facts };
}

/** The ids of the first `end` tokens; never text that would be tokenised again. */
export const idsUpTo = (node, end) => [...(node.prompt?.token_ids ?? []), ...(node.tokens ?? []).map(({ id }) => id)].slice(0, end);

/** Note how expected each given token was. */
export const noteFacts = (node, facts) => asked.set(node, facts);
export const hasFacts = (node) => asked.has(node);

/** What /inspect/tokens answers with `logprobs`, as one object per position. */
export function factsOf(answer) {
  return answer.token_ids.map((id, at) => (answer.surprisal[at] === null ? {} : {
    surprisal: answer.surprisal[at], entropy: answer.entropy[at], rank: answer.rank[at], prob: Math.exp(-answer.surprisal[at]),
    topk: answer.topk[at].map((candidate) => ({ id: candidate.token_id, text: candidate.token, p: Math.exp(candidate.logprob) })),
  }));
}

/** The prompt in runs of one role, "template" for what nobody said: [{role, start, end}]. */
function segments(node) {
  const length = hasPrompt(node) ? node.prompt.token_ids.length : 0;
  const roles = new Array(length).fill("template");
  for (const span of node.prompt?.spans ?? []) {
    if (span.section === "template") continue; // what the template adds stays what it is
    for (let at = Math.max(0, span.start); at < Math.min(span.end, length); at += 1) roles[at] = span.role;
  }
  if (length && !roles.some((role) => role !== "template")) return [{ role: "prompt", start: 0, end: length }];
  const runs = [];
  for (let at = 0; at < length; at += 1) {
    const run = runs.at(-1);
    if (run?.role === roles[at]) run.end = at + 1;
    else runs.push({ role: roles[at], start: at, end: at + 1 });
  }
  return runs;
}

/** Rows of the tape: each has a role, and the runs that stand in it; a template's run stands before
 *  what it introduces, the first of all in a row of its own. */
export function rowsOf(node) {
  const rows = [];
  let held = [];
  for (const run of segments(node)) {
    if (run.role !== "template") {
      rows.push({ role: run.role, runs: [...held, run] });
      held = [];
    } else if (rows.length === 0) rows.push({ role: "template", runs: [run] });
    else held.push(run);
  }
  return { rows, introduction: held };
}

/** 0 to 4: how thick the underline is, from 0.35, 1, 2.2 and 4 nats on. */
export function level(surprisal) {
  if (surprisal === null || surprisal === undefined || surprisal < 0.35) return 0;
  if (surprisal < 1) return 1;
  if (surprisal < 2.2) return 2;
  return surprisal < 4 ? 3 : 4;
}

/** exp(entropy): among so many words; one decimal below 10. */
export function choices(entropy) {
  const words = Math.exp(entropy);
  return words < 10 ? words.toFixed(1) : String(Math.round(words));
}
