// Chats as files: one or all as JSON, one as Markdown, and back. What comes in is as untrusted as a model.
import { chooseFile, save } from "../core/dom.js";
import { notice } from "../core/notice.js";
import { set, state } from "../core/state.js";
import { allChats, keep, plain } from "../core/store.js";
import { newId, titleOf, VERSION } from "../core/tree.js";
import { chat as words } from "../words/chat.js";
import { common } from "../words/common.js";
import { openChat } from "./chats.js";

const FORMAT = "transformers-api.chat/1";
const ALL_FORMAT = "transformers-api.chats/1";
const ROLES = new Set(["user", "assistant", "tool"]);
const MOST_NODES = 20_000;
const MOST_CANDIDATES = 20; // of a token
const MOST_EDITS = 32; // of an answer

const json = (value) => JSON.stringify(value, null, 1);
const fileName = (title) => title.normalize("NFKD").replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-+|-+$/g, "").slice(0, 60) || "chat";

export function exportChat() {
  save(`${fileName(state.chat.title)}.json`, json({ format: FORMAT, chat: plain(state.chat) }), "application/json");
}

export async function exportAll() {
  if (state.chat.leaf) await keep(state.chat);
  save("chats.json", json({ format: ALL_FORMAT, chats: (await allChats()).map(plain) }), "application/json");
}

export function saveMarkdown() {
  const turns = state.path.map((node) => {
    const name = { user: words.you, tool: words.toolResult(node.call?.name ?? ""), assistant: node.model ?? words.model }[node.role];
    const calls = (node.calls ?? []).map((call) => `\`\`\`json\n${call.name}(${call.arguments})\n\`\`\``);
    return [`## ${name}`, node.text, ...calls].filter(Boolean).join("\n\n");
  });
  save(`${fileName(state.chat.title)}.md`, `# ${state.chat.title}\n\n${turns.join("\n\n")}\n`, "text/markdown");
}

const text = (value, most = 4_000_000) => (typeof value === "string" ? value.slice(0, most) : undefined);
const number = (value) => (Number.isFinite(value) ? value : undefined);
const ids = (value) => (Array.isArray(value) && value.every(Number.isInteger) ? value : undefined);
const array = (value) => (Array.isArray(value) ? value : undefined);
const list = (value, item) => (Array.isArray(value) ? value.map(item).filter(Boolean) : undefined);
const object = (value) => (value && typeof value === "object" && !Array.isArray(value) ? value : null);

function token(value) {
  if (!object(value) || !Number.isInteger(value.id) || typeof value.text !== "string") return null;
  const { surprisal, entropy, rank, prob, position } = value;
  return {
    id: value.id, text: value.text, position: number(position), surprisal: number(surprisal), entropy: number(entropy), rank: number(rank), prob: number(prob),
    topk: list(array(value.topk)?.slice(0, MOST_CANDIDATES), (one) => (object(one) && Number.isInteger(one.id) && typeof one.text === "string" && Number.isFinite(one.p) ? { id: one.id, text: one.text, p: one.p } : null)) ?? [],
    ...(value.forced === true ? { forced: true } : {}), ...(Number.isFinite(value.margin) && Number.isFinite(value.varentropy) ? { margin: value.margin, varentropy: value.varentropy } : {}),
  };
}

/** The tokens of an answer, at the places behind its prompt. */
function tokens(value, behind) {
  const all = list(value, token);
  const start = behind?.token_ids.length ?? Math.max(0, Math.trunc(all?.[0]?.position ?? 0));
  return all?.map((one, i) => ({ ...one, position: start + i }));
}

function prompt(value) {
  if (!object(value) || !ids(value.token_ids)) return undefined;
  const span = (one) => (object(one) && Number.isInteger(one.start) && Number.isInteger(one.end) ? { role: text(one.role, 40), section: text(one.section, 40), start: one.start, end: one.end } : null);
  return { token_ids: value.token_ids, tokens: list(value.tokens, (one) => (typeof one === "string" ? { text: one } : null))?.map((one) => one.text), spans: list(value.spans, span) ?? [] };
}

function usage(value) {
  if (!object(value)) return undefined;
  const cached = number(value.prompt_tokens_details?.cached_tokens);
  return { prompt_tokens: number(value.prompt_tokens), completion_tokens: number(value.completion_tokens), ...(cached === undefined ? {} : { prompt_tokens_details: { cached_tokens: cached } }) };
}

/** The edits that an answer was written with; the server refuses what are none. */
function intervene(value) {
  const edits = list(array(value.intervene?.edits ?? value.asked?.intervene?.edits)?.slice(0, MOST_EDITS), (one) => (object(one) && typeof one.do === "string" ? one : null));
  return edits?.length ? { edits } : undefined;
}

const call = (value) => (object(value) ? { id: text(value.id, 200) ?? "", name: text(value.name, 200) ?? "", arguments: text(value.arguments) ?? "" } : null);

/** A message of a file, with the fields that are ours and of our types; null where it is none. */
function node(value, renamed) {
  if (!object(value) || !ROLES.has(value.role) || typeof value.text !== "string") return null;
  const error = object(value.error);
  const read = prompt(value.prompt);
  const fields = {
    id: renamed.get(value.id), parent: renamed.get(value.parent) ?? null, at: number(value.at) ?? 0, role: value.role, text: text(value.text), model: text(value.model, 300),
    prompt: read, tokens: tokens(value.tokens, read), usage: usage(value.usage), finish: text(value.finish, 40), took: number(value.took), wait: number(value.wait),
    verified: typeof value.verified === "boolean" ? value.verified : undefined, branched: value.branched === true || undefined, reasoning: text(value.reasoning), thought: number(value.thought),
    calls: list(value.calls, call), call: value.role === "tool" ? { id: text(value.call?.id, 200) ?? "", name: text(value.call?.name, 200) ?? "" } : undefined, intervene: intervene(value), blind: text(value.blind, 60),
    error: error ? { status: number(error.status) ?? 0, code: text(error.code, 60) ?? null, message: text(error.message, 4000) ?? "" } : undefined,
  };
  return Object.fromEntries(Object.entries(fields).filter(([, field]) => field !== undefined));
}

/** A chat of a file under ids of our own; null where it is none. */
export function chatOf(value) {
  if (!object(value) || !object(value.nodes)) return null;
  const entries = Object.values(value.nodes).filter(object).slice(0, MOST_NODES);
  const renamed = new Map(entries.map((entry) => [entry.id, newId()]));
  const nodes = entries.map((entry) => node(entry, renamed)).filter(Boolean);
  if (!nodes.length) return null;
  const leaf = renamed.get(value.leaf) ?? nodes.at(-1).id;
  const first = nodes.find((one) => one.role === "user");
  return {
    id: newId(), title: text(value.title, 200) || titleOf(first?.text ?? common.newChat), made: number(value.made) ?? Date.now(), changed: Date.now(),
    leaf: nodes.some((one) => one.id === leaf) ? leaf : nodes.at(-1).id, nodes: Object.fromEntries(nodes.map((one) => [one.id, one])), v: VERSION,
  };
}

/** Import the text of a file; tells the user where it is none of ours. */
export async function importText(content) {
  let file = null;
  try {
    file = JSON.parse(content);
  } catch { /* told below */ }
  const values = object(file) ? (Array.isArray(file.chats) ? file.chats : [file.chat]) : [];
  const chats = String(file?.format ?? "").startsWith("transformers-api.chat") ? values.map(chatOf).filter(Boolean) : [];
  if (!chats.length) {
    notice(common.notAChat);
    return;
  }
  for (const chat of chats) await keep(chat);
  set({ chats: [...chats, ...state.chats] });
  openChat(chats[0]);
  notice(common.imported(chats.length), { kind: "info", seconds: 6 });
}

export async function importFile() {
  const content = await chooseFile(".json,application/json");
  if (content !== null) await importText(content);
}

export function menuEntries() {
  const none = () => notice(common.nothingToExport, { kind: "info", seconds: 6 });
  const some = (act) => () => (state.path.length ? act() : none());
  return [
    [common.menu.exportChat, some(exportChat)],
    [common.menu.saveMarkdown, some(saveMarkdown)],
    [common.menu.print, some(() => print())],
    [common.menu.exportAll, () => (state.chats.length ? exportAll() : none())],
    [common.menu.importChat, importFile],
  ];
}
