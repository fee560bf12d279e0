// What an answer took, in numbers.
import { h } from "../core/dom.js";
import { chat as words } from "../words/chat.js";

export const tokenCount = (node) => node.usage?.completion_tokens ?? node.tokens?.length ?? 0;

export const speed = (tokens, ms) => ((1000 * (tokens - 1)) / ms).toFixed(1);

/** [number, words] of an answer. */
export function figures(node) {
  const tokens = tokenCount(node);
  if (!tokens) return [];
  const rows = [[String(tokens), words.tokens(tokens)]];
  if (node.took > 0 && tokens > 1 && !node.branched) rows.push([speed(tokens, node.took), words.perSecond]);
  if (node.wait) rows.push([`${(node.wait / 1000).toFixed(2)} s`, words.toFirst]);
  if (node.usage?.prompt_tokens) rows.push([String(node.usage.prompt_tokens), words.read(node.usage.prompt_tokens_details?.cached_tokens)]);
  return rows;
}

export const statistics = (node) => h("div", { class: "stats" },
  ...figures(node).map(([number, what]) => h("span", {}, h("b", { text: number }), ` ${what}`)));
