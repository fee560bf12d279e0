// A chunk of a stream that is traced becomes the token of an answer.

/** The token of a trace: its facts are the model's own, before temperature. */
export function tokenOf(trace, text) {
  const topk = (trace.topk ?? []).map((candidate) => ({ id: candidate.token_id, text: candidate.token, p: Math.exp(candidate.logprob) }));
  return {
    id: trace.token_id, text: topk.find(({ id }) => id === trace.token_id)?.text ?? text, position: trace.position,
    surprisal: trace.surprisal, entropy: trace.entropy, rank: trace.rank, prob: Math.exp(trace.logprob), topk, attn: trace.attn, lens: trace.lens,
  };
}

/** Take a chunk of /v1/completions into a node. */
export function takeCompletion(node, chunk) {
  const [choice] = chunk.choices ?? [];
  const { trace } = chunk;
  if (trace?.header) node.verified = trace.header.verified;
  node.text += choice?.text ?? "";
  if (trace?.token_id !== undefined) node.tokens.push(tokenOf(trace, choice?.text ?? ""));
  else {
    (choice?.token_ids ?? []).forEach((id, at) => {
      node.tokens.push({ id, text: at ? "" : choice.text, position: node.tokens.at(-1).position + 1, topk: [] });
    });
  }
  if (choice?.finish_reason) node.finish = choice.finish_reason;
}
