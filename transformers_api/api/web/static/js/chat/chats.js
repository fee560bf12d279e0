// The list of chats: opening, starting, renaming, deleting with a way back. Chats that were not opened yet are
// light: without tokens, which the store has.
import { notice } from "../core/notice.js";
import { set, state, touch } from "../core/state.js";
import { chatById, eachChat, forget, keep, keepChoice } from "../core/store.js";
import { newChat, path } from "../core/tree.js";
import { common } from "../words/common.js";

const UNDO_S = 8;
const gone = new Set(); // ids of chats that were deleted while the list was being read
let opening = null;

const wholeOf = async (chat) => (chat.isLight ? ((await chatById(chat.id)) ?? chat) : chat);

/** List `chats`, each in the place of one with its id, newest first. */
function list(chats) {
  const ids = new Set(chats.map(({ id }) => id));
  const others = state.chats.filter(({ id }) => !ids.has(id));
  set({ chats: [...chats, ...others].sort((a, b) => b.changed - a.changed) });
}

/** List all that the browser keeps; those that are here already stay as they are. */
export const listKept = () => eachChat((chats) => {
  const ids = new Set(state.chats.map(({ id }) => id));
  list(chats.filter(({ id }) => !ids.has(id) && !gone.has(id)));
});

function show(chat) {
  state.writing?.stop();
  opening = null;
  keepChoice("chat", chat.leaf ? chat.id : null);
  set({ chat, selection: null, isPinned: false, compared: null });
}

export async function openChat(chat) {
  if (chat.id === state.chat.id) return;
  opening = chat.id;
  const whole = await wholeOf(chat);
  if (opening !== chat.id) return; // another one was chosen meanwhile
  show(whole);
  list([whole]);
}

/** Show the open chat as another tab has gone on with it. */
export async function catchUp() {
  const kept = await chatById(state.chat.id);
  if (!kept || state.writing || kept.id !== state.chat.id || kept.changed <= state.chat.changed) return;
  set({ chat: kept, selection: null, isPinned: false, compared: null });
  list([kept]);
}

/** Start a chat, which is kept from its first message on. Returns it. */
export function startChat() {
  show(newChat());
  return state.chat;
}

/** The open chat has its first message, or changed: it stands at the head of the list. */
export function listChat(chat) {
  chat.changed = Date.now();
  keepChoice("chat", chat.id);
  list([chat]);
}

/** A chat of its own with the messages up to `node`. */
export function splitChat(node) {
  const chat = newChat();
  chat.title = state.chat.title;
  for (const message of path(state.chat, node.id)) chat.nodes[message.id] = structuredClone(message);
  chat.leaf = node.id;
  show(chat);
  listChat(chat);
  return keep(chat);
}

export async function renameChat(chat, title) {
  const whole = await wholeOf(chat);
  whole.title = title.trim() || whole.title;
  await keep(whole);
  list([whole]);
  if (whole === state.chat) touch("chat");
}

export async function removeChat(chat) {
  const whole = await wholeOf(chat);
  if (state.chat.id === chat.id) startChat(); // which ends what is being written
  gone.add(chat.id);
  await forget(chat.id);
  set({ chats: state.chats.filter(({ id }) => id !== chat.id) });
  const back = async () => {
    gone.delete(whole.id);
    await keep(whole);
    list([whole]);
  };
  notice(common.deleted(chat.title), { kind: "info", actions: [[common.undo, back]], seconds: UNDO_S });
}
