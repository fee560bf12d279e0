// What the browser keeps: chats in IndexedDB, choices in localStorage. Nothing is on the server.
import { openDB } from "../../vendor/idb.js";
import { VERSION } from "./tree.js";

const DATABASE = "transformers-api";
const PREFIX = "transformers-api.";
const SAVE_AFTER_MS = 300;
const FULL = 0.8; // of the quota: candidates of old chats go first
const memory = new Map();
const waiting = new Map(); // chat id → timer
let database = null;

/** A choice of the user's, or `fallback`. */
export function choice(name, fallback) {
  try {
    return JSON.parse(localStorage.getItem(PREFIX + name)) ?? fallback;
  } catch {
    return fallback;
  }
}

export function keepChoice(name, value) {
  try {
    localStorage.setItem(PREFIX + name, JSON.stringify(value));
  } catch { /* a private window, or full */ }
}

async function open() {
  if (database === null) {
    try {
      database = await openDB(DATABASE, 1, { upgrade: (db) => db.createObjectStore("chats", { keyPath: "id" }) });
    } catch {
      database = false;
    }
  }
  return database;
}

/** True where chats outlive this tab. */
export const isLasting = async () => Boolean(await open());

/** A chat without what only the tab knows: rows of attention, and that an answer is being written. */
export function plain(chat) {
  const nodes = Object.values(chat.nodes).map(({ live, isEdited, forks, tokens, ...node }) => [
    node.id, tokens ? { ...node, tokens: tokens.map(({ attn, lens, ...token }) => token) } : node,
  ]);
  return { ...chat, nodes: Object.fromEntries(nodes) };
}

export async function allChats() {
  const db = await open();
  const chats = db ? await db.getAll("chats") : [...memory.values()];
  return chats.sort((a, b) => b.changed - a.changed);
}

/** Write a chat now. A chat of a later version of the page is left as it is. */
export async function keep(chat) {
  clearTimeout(waiting.get(chat.id));
  waiting.delete(chat.id);
  if (chat.v > VERSION) return;
  const db = await open();
  if (!db) {
    memory.set(chat.id, plain(chat));
    return;
  }
  try {
    await db.put("chats", plain(chat));
  } catch (error) {
    if (error.name !== "QuotaExceededError") throw error;
    await makeRoom(db, chat.id);
    await db.put("chats", plain(chat));
  }
}

/** Write a chat soon; further changes until then are written with it. */
export function keepSoon(chat) {
  if (!waiting.has(chat.id)) waiting.set(chat.id, setTimeout(() => keep(chat), SAVE_AFTER_MS));
}

export async function forget(id) {
  clearTimeout(waiting.get(id));
  waiting.delete(id);
  const db = await open();
  if (db) await db.delete("chats", id);
  else memory.delete(id);
}

/** Let go of the candidates of the oldest chats, where the browser's room is nearly used up. */
export async function tidy(openId) {
  const { usage = 0, quota = 0 } = (await navigator.storage?.estimate?.()) ?? {};
  const db = await open();
  if (db && quota && usage > FULL * quota) await makeRoom(db, openId);
}

async function makeRoom(db, openId) {
  const chats = (await allChats()).reverse().filter((chat) => chat.id !== openId);
  for (const chat of chats.slice(0, Math.ceil(chats.length / 2))) {
    for (const node of Object.values(chat.nodes)) for (const token of node.tokens ?? []) token.topk = [];
    await db.put("chats", chat);
  }
}
