// What the browser keeps: chats in IndexedDB, choices in localStorage. Nothing is on the server.
import { openDB } from "../../vendor/idb.js";
import { common } from "../words/common.js";
import { notice } from "./notice.js";
import { newId, VERSION } from "./tree.js";

const DATABASE = "transformers-api";
const PREFIX = "transformers-api.";
const SAVE_AFTER_MS = 300;
const SAVE_SHARE = 50; // a long chat takes longer to write, and is written so much less often while it grows
const BATCH = 25; // chats that are listed together
const FULL = 0.8; // of the quota: candidates of old chats go first
const memory = new Map();
const waiting = new Map(); // chat id → its timer, and the chat
const writings = new Set(); // those that are not done, each with its chat
const tab = newId(); // this one, among those that write
const removed = new Set(); // ids of nodes that this tab took away
let database = null;
let cost = 0; // ms that the last writing kept the page from drawing
let isFull = false; // the last chat could not be kept

const kindOf = (value) => (Array.isArray(value) ? "array" : typeof value);

/** A choice of the user's; `fallback` where there is none, or something of another kind. */
export function choice(name, fallback) {
  try {
    const value = JSON.parse(localStorage.getItem(PREFIX + name)) ?? fallback;
    return fallback === null || kindOf(value) === kindOf(fallback) ? value : fallback;
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
      const db = await openDB(DATABASE, 3, {
        upgrade(db, version) {
          if (version < 1) db.createObjectStore("chats", { keyPath: "id" });
          if (version < 2) db.createObjectStore("writers"); // chat id → the tab that wrote it last
          db.createObjectStore("left"); // chat id, tab → what a tab had not written when it was closed
        },
        blocking: (current, later, event) => event.target.close(), // a newer page waits for it
      });
      await takeLeft(db).catch(() => {}); // the next page will
      database = db;
    } catch {
      database = false;
    }
  }
  return database;
}

/** True where chats outlive this tab. */
export const isLasting = async () => Boolean(await open());

function lasting({ live, isEdited, forks, tokens, twin, ...node }) {
  return {
    ...node, ...(tokens ? { tokens: tokens.map(({ attn, lens, ...token }) => token) } : {}), ...(twin ? { twin: lasting(twin) } : {}),
  };
}

/** A chat without what only the tab knows: rows of attention, and that an answer is being written. */
export function plain(chat) {
  return { ...chat, nodes: Object.fromEntries(Object.values(chat.nodes).map((node) => [node.id, lasting(node)])) };
}

/** All chats, whole: what an export needs. */
export async function allChats() {
  const db = await open();
  const chats = db ? await db.getAll("chats") : [...memory.values()];
  return chats.sort((a, b) => b.changed - a.changed);
}

/** One chat, whole; undefined where there is none. */
export async function chatById(id) {
  const db = await open();
  if (id === null) return undefined;
  return db ? db.get("chats", id) : memory.get(id);
}

/** A chat for the list and its search: without tokens, which are most of it. */
function light(chat) {
  const nodes = Object.values(chat.nodes).map(({ tokens, prompt, twin, ...node }) => [node.id, node]);
  return { ...chat, nodes: Object.fromEntries(nodes), isLight: true };
}

/** Call `take` with all chats, light, some at a time: reading them all at once takes seconds where they are many. */
export async function eachChat(take) {
  const db = await open();
  if (!db) return;
  let chats = [];
  let cursor = await db.transaction("chats").store.openCursor();
  while (cursor) {
    chats.push(light(cursor.value));
    if (chats.length === BATCH) {
      take(chats);
      chats = [];
    }
    cursor = await cursor.continue();
  }
  take(chats);
}

/** Write a chat now. A chat of a later version of the page is left as it is. */
export async function keep(chat) {
  clearTimeout(waiting.get(chat.id)?.timer);
  waiting.delete(chat.id);
  if (chat.v > VERSION) return;
  const writing = { chat };
  writings.add(writing);
  await write(chat);
  writings.delete(writing);
}

async function write(chat) {
  const db = await open();
  if (!db) {
    memory.set(chat.id, plain(chat));
    return;
  }
  try {
    await put(db, chat).catch(async (error) => {
      if (error.name !== "QuotaExceededError") throw error;
      await makeRoom(db, chat.id);
      await put(db, chat);
    });
    isFull = false;
  } catch {
    if (!isFull) notice(common.notKept);
    isFull = true;
  }
}

/** Write a chat, with what another tab has added to it meanwhile. */
async function put(db, chat) {
  const transaction = db.transaction(["chats", "writers", "left"], "readwrite");
  const [chats, writers, left] = ["chats", "writers", "left"].map((name) => transaction.objectStore(name));
  const writing = async () => {
    if ((await writers.get(chat.id)) !== tab) {
      const { nodes = {} } = (await chats.get(chat.id)) ?? {};
      for (const node of Object.values(nodes)) if (!removed.has(node.id)) chat.nodes[node.id] ??= node;
    }
    const begun = performance.now();
    const written = chats.put(plain(chat)); // which copies it at once
    cost = performance.now() - begun;
    await Promise.all([written, writers.put(tab, chat.id), left.delete([chat.id, tab])]);
  };
  await Promise.all([writing(), transaction.done]);
}

/** What is not written yet is left for the next tab: this one is closed before it could read another's writing. */
function leave() {
  if (!database) return;
  const chats = new Set([...waiting.values(), ...writings].map(({ chat }) => chat));
  for (const chat of chats) {
    const transaction = database.transaction("left", "readwrite");
    transaction.store.put({ chat: plain(chat), removed: [...removed] }, [chat.id, tab]).catch(() => {});
    transaction.done.catch(() => {}); // there is nobody to tell
    transaction.commit();
  }
}

/** Write what tabs have left, together with what others wrote to the same chats. */
async function takeLeft(db) {
  const transaction = db.transaction(["chats", "writers", "left"], "readwrite");
  const [chats, writers, left] = ["chats", "writers", "left"].map((name) => transaction.objectStore(name));
  for (const { chat, removed: gone } of await left.getAll()) {
    const kept = await chats.get(chat.id);
    if (kept?.v > VERSION) continue;
    const [older, newer] = kept?.changed > chat.changed ? [chat, kept] : [kept, chat];
    const nodes = { ...older?.nodes, ...newer.nodes };
    for (const id of gone) delete nodes[id];
    await Promise.all([chats.put({ ...newer, nodes }), writers.put(tab, chat.id)]);
  }
  await left.clear();
  await transaction.done;
}

/** Take a node away for good: what another tab kept of it does not bring it back. */
export function removeNode(chat, id) {
  delete chat.nodes[id];
  removed.add(id);
}

/** Write a chat soon; further changes until then are written with it. */
export function keepSoon(chat) {
  if (waiting.has(chat.id)) return;
  waiting.set(chat.id, { chat, timer: setTimeout(() => keep(chat), Math.max(SAVE_AFTER_MS, SAVE_SHARE * cost)) });
}

/** Write now what would be written soon; nothing else, as another tab may have a newer version of it. */
export function keepWaiting() {
  for (const { chat } of waiting.values()) keep(chat);
}

/** The same, where the page may end before it is written. */
export function keepAtEnd() {
  leave();
  keepWaiting();
}

export async function forget(id) {
  clearTimeout(waiting.get(id)?.timer);
  waiting.delete(id);
  const db = await open();
  if (!db) memory.delete(id);
  else await Promise.all([db.delete("chats", id), db.delete("writers", id), db.delete("left", IDBKeyRange.bound([id], [id, []]))]);
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
    for (const node of Object.values(chat.nodes)) for (const token of [...(node.tokens ?? []), ...(node.twin?.tokens ?? [])]) token.topk = [];
    await db.put("chats", chat);
  }
}
