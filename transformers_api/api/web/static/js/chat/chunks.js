// One chunk of an answer's stream into a message: text, thoughts, calls, tokens with their traces.

/** The token of a trace: its facts are the model's own, before temperature. */
export function traced(trace, text) {
  const topk = (trace.topk ?? []).map((one) => ({ id: one.token_id, text: one.token, p: Math.exp(one.logprob) }));
  return {
    id: trace.token_id, text: trace.token ?? topk.find((one) => one.id === trace.token_id)?.text ?? text, position: trace.position,
    surprisal: trace.surprisal, entropy: trace.entropy, rank: trace.rank, prob: Math.exp(trace.logprob), topk,
    ...(trace.uncertainty ? { margin: trace.uncertainty.margin, varentropy: trace.uncertainty.varentropy } : {}),
    ...(trace.attn ? { attn: trace.attn } : {}),
  };
}

/** A token of which only the id is known. */
export const untraced = (id, text, position) => ({ id, text, position, surprisal: null, entropy: null, rank: null, prob: null, topk: [] });

/** The tokens of an answer that goes on, as the server reads them now. */
function rejoin(node, prompt) {
  const start = node.prompt.token_ids.length;
  if (node.prompt.token_ids.some((id, i) => prompt.token_ids[i] !== id)) { // the template begins otherwise now
    node.prompt = prompt;
    node.tokens = [];
    return;
  }
  const old = node.tokens;
  node.tokens = prompt.token_ids.slice(start).map((id, i) => (old[i]?.id === id ? old[i] : untraced(id, prompt.tokens?.[start + i] ?? "", start + i)));
}

function takePrompt(node, choice, header) {
  const prompt = header?.prompt ?? (choice?.prompt_token_ids && { token_ids: choice.prompt_token_ids, spans: [] });
  if (header?.noted === false) node.blind = header.code ?? "unavailable";
  if (header?.verified !== undefined) node.verified = header.verified;
  if (!prompt) return;
  if (node.prompt && node.tokens.length) rejoin(node, prompt);
  else node.prompt = prompt;
}

function takeCalls(node, deltas) {
  node.calls ??= [];
  for (const { index, id, function: called } of deltas) {
    const call = (node.calls[index] ??= { id: "", name: "", arguments: "" });
    if (id) call.id = id;
    if (called?.name) call.name += called.name;
    if (called?.arguments) call.arguments += called.arguments;
  }
}

function takeTokens(node, choice, trace, text) {
  if (trace?.token_id !== undefined) {
    node.tokens.push(traced(trace, text));
    return;
  }
  const start = node.prompt?.token_ids.length ?? 0;
  (choice?.token_ids ?? []).forEach((id, i) => node.tokens.push(untraced(id, i ? "" : text, start + node.tokens.length)));
}

/** Put a chunk into `node`. True where something was written. */
export function take(node, chunk) {
  const choice = chunk.choices?.[0];
  const delta = choice?.delta ?? {};
  const { trace } = chunk;
  node.model = chunk.model ?? node.model;
  if (trace?.noted === false || trace?.prompt || choice?.prompt_token_ids) takePrompt(node, choice, trace);
  const thought = delta.reasoning_content ?? "";
  const text = delta.content ?? "";
  node.text += text;
  if (thought) node.reasoning = (node.reasoning ?? "") + thought;
  if (delta.tool_calls) takeCalls(node, delta.tool_calls);
  if (!choice?.prompt_token_ids) takeTokens(node, choice, trace, text || thought);
  if (choice?.finish_reason) node.finish = choice.finish_reason;
  if (chunk.usage) node.usage = chunk.usage;
  return Boolean(text || thought || delta.tool_calls);
}
