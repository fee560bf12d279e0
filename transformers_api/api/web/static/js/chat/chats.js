// The list of chats: opening, starting, renaming, deleting with a way back.
import { notice } from "../core/notice.js";
import { set, state, touch } from "../core/state.js";
import { forget, keep, keepChoice } from "../core/store.js";
import { newChat, path } from "../core/tree.js";
import { common } from "../words/common.js";

const UNDO_S = 8;

function show(chat) {
  state.writing?.stop();
  keepChoice("chat", chat.leaf ? chat.id : null);
  set({ chat, selection: null, isPinned: false, compared: null });
}

export const openChat = (chat) => { if (chat !== state.chat) show(chat); };

/** Start a chat, which is kept from its first message on. Returns it. */
export function startChat() {
  show(newChat());
  return state.chat;
}

/** The open chat has its first message, or changed: it stands at the head of the list. */
export function listChat(chat) {
  chat.changed = Date.now();
  keepChoice("chat", chat.id);
  set({ chats: [chat, ...state.chats.filter((other) => other !== chat)] });
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
  chat.title = title.trim() || chat.title;
  await keep(chat);
  touch("chats", "chat");
}

export async function removeChat(chat) {
  const at = state.chats.indexOf(chat);
  if (state.chat === chat) startChat(); // which ends what is being written
  await forget(chat.id);
  set({ chats: state.chats.filter((other) => other !== chat) });
  const back = async () => {
    await keep(chat);
    const chats = [...state.chats];
    chats.splice(at, 0, chat);
    set({ chats });
  };
  notice(common.deleted(chat.title), { kind: "info", actions: [[common.undo, back]], seconds: UNDO_S });
}
