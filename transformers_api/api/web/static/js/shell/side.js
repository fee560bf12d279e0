// The side "Conversations": chats by day, search, rename, delete. A drawer where the page is narrow.
import { openChat, removeChat, renameChat } from "../chat/chats.js";
import { button, byId, h } from "../core/dom.js";
import { on, state } from "../core/state.js";
import { hasWords } from "../core/tree.js";
import { common } from "../words/common.js";

const DAY_MS = 86_400_000;

function dayOf(time) {
  const midnight = new Date().setHours(0, 0, 0, 0);
  if (time >= midnight) return common.today;
  if (time >= midnight - DAY_MS) return common.yesterday;
  return time >= midnight - 7 * DAY_MS ? common.thisWeek : common.earlier;
}

function renaming(chat) {
  const field = h("input", { class: "rename", "aria-label": common.chatTitle, maxlength: "120", dir: "auto" });
  field.value = chat.title;
  let isOver = false;
  isRenaming = true;
  const end = async (keeps, hadFocus) => {
    if (isOver) return;
    isOver = true;
    isRenaming = false;
    if (keeps) await renameChat(chat, field.value);
    draw();
    if (hadFocus) openers.get(chat.id)?.focus();
  };
  field.addEventListener("keydown", (event) => {
    if (event.isComposing || !["Enter", "Escape"].includes(event.key)) return;
    event.preventDefault();
    event.stopPropagation();
    end(event.key === "Enter", true);
  });
  field.addEventListener("blur", () => end(true, false));
  openers.get(chat.id).closest("li").replaceChildren(field);
  field.select();
}

const openers = new Map();
let isRenaming = false; // the list waits until that is over

function entry(chat) {
  const isOpen = chat.id === state.chat.id;
  const title = chat.title || common.newChat;
  const opener = h("button", {
    class: "open", type: "button", dir: "auto", text: title, "aria-current": isOpen ? "true" : null,
    onclick: () => { openChat(chat); closeSide(); if (state.view === "models") byId("tab-chat").click(); },
    ondblclick: () => renaming(chat),
    onkeydown: (event) => { if (event.key === "F2") renaming(chat); },
  });
  openers.set(chat.id, opener);
  return h("li", { class: "chat", data: { chat: chat.id, ...(isOpen ? { open: "" } : {}) } }, opener,
    button(common.renameChat(title), () => renaming(chat), { cls: "act", glyph: "pen" }),
    button(common.deleteChat(title), () => removeChat(chat), { cls: "act bad", glyph: "trash" }));
}

function draw() {
  if (isRenaming) return;
  const words = byId("find").value.trim();
  const chats = state.chats.filter((chat) => !words || hasWords(chat, words));
  openers.clear();
  const rows = [];
  let day = "";
  for (const chat of chats) {
    if (dayOf(chat.changed) !== day) rows.push(h("li", { class: "when", text: (day = dayOf(chat.changed)) }));
    rows.push(entry(chat));
  }
  if (!chats.length && words) rows.push(h("li", { class: "when", text: common.noChatHas }));
  const list = byId("chats");
  const { scrollTop } = list;
  const focused = list.contains(document.activeElement) ? document.activeElement : null;
  const row = focused?.closest("[data-chat]");
  const place = row ? [...row.children].indexOf(focused) : -1;
  list.replaceChildren(...rows);
  list.scrollTop = scrollTop;
  if (place >= 0) list.querySelector(`[data-chat="${CSS.escape(row.dataset.chat)}"]`)?.children[place]?.focus();
}

function openSide() {
  byId("side").dataset.open = "";
  byId("scrim").hidden = false;
  byId("menu").setAttribute("aria-expanded", "true");
  byId("main").inert = true;
  byId("side-close").focus();
}

/** Close the drawer; true where it was open. */
export function closeSide() {
  if (!("open" in byId("side").dataset)) return false;
  delete byId("side").dataset.open;
  byId("scrim").hidden = true;
  byId("menu").setAttribute("aria-expanded", "false");
  byId("main").inert = false;
  byId("menu").focus();
  return true;
}

export function start() {
  for (const key of ["chats", "chat"]) on(key, draw);
  byId("find").addEventListener("input", draw);
  byId("menu").addEventListener("click", openSide);
  byId("side-close").addEventListener("click", closeSide);
  byId("scrim").addEventListener("click", closeSide);
  matchMedia("(min-width: 900.02px)").addEventListener("change", closeSide);
}
