// A chunk of /v1/completions, as a branch is written, into a node.
import { traced, untraced } from "../chat/chunks.js";

export function takeCompletion(node, chunk) {
  const choice = chunk.choices?.[0];
  const { trace } = chunk;
  const text = choice?.text ?? "";
  if (trace?.header?.verified !== undefined) node.verified = trace.header.verified;
  node.text += text;
  if (trace?.token_id !== undefined) node.tokens.push(traced(trace, text));
  else (choice?.token_ids ?? []).forEach((id, at) => node.tokens.push(untraced(id, at ? "" : text, node.tokens.at(-1).position + 1)));
  if (choice?.finish_reason) node.finish = choice.finish_reason;
}
