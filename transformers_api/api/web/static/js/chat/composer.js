// The box that Chat and Inside share: a draft for each chat, Send, Stop, the count while it writes.
import { byId } from "../core/dom.js";
import { notice } from "../core/notice.js";
import { on, set, state } from "../core/state.js";
import { choice, keepChoice } from "../core/store.js";
import { VERSION } from "../core/tree.js";
import { show } from "../shell/views.js";
import { chat as words } from "../words/chat.js";
import { toEnd } from "./log.js";
import { onFrame, say } from "./run.js";
import { openSettings } from "./settings_dialog.js";
import { summary } from "./settings.js";
import { speed } from "./statistics.js";

const DRAFTS = 50; // of the newest chats
const COUNT_EVERY_MS = 250;
const box = byId("message");
const drafts = new Map(Object.entries(choice("drafts", {})));
let counted = 0;

const draftKey = () => (state.chat.leaf ? state.chat.id : "new");

function keepDraft() {
  drafts.delete(draftKey());
  if (box.value) drafts.set(draftKey(), box.value);
  keepChoice("drafts", Object.fromEntries([...drafts].slice(-DRAFTS)));
}

function size() {
  if (!CSS.supports("field-sizing", "content")) {
    box.style.height = "auto";
    box.style.height = `${box.scrollHeight}px`;
  }
  byId("send").disabled = !box.value.trim() || Boolean(state.writing);
}

function fill(text) {
  box.value = text;
  size();
}

function send(event) {
  event.preventDefault();
  if (!box.value.trim() || state.writing) return undefined;
  if (state.chat.v > VERSION) return say(box.value); // which says why not
  const text = box.value;
  fill("");
  keepDraft();
  if (state.view === "models") show("chat");
  toEnd();
  return say(text);
}

function onKey(event) {
  const isPhone = matchMedia("(pointer: coarse) and (max-width: 620px)").matches;
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229 || isPhone) return;
  event.preventDefault();
  byId("composer").requestSubmit();
}

function showWriting(writing) {
  const hadFocus = [byId("send"), byId("stop")].includes(document.activeElement);
  byId("send").hidden = Boolean(writing);
  byId("stop").hidden = !writing;
  if (!writing) byId("count").textContent = "";
  size();
  if (hadFocus) (writing ? byId("stop") : box).focus();
  requestAnimationFrame(() => { // what was pressed may have gone with the answer that it belonged to
    const isNowhere = document.activeElement === document.body && !matchMedia("(pointer: coarse)").matches;
    if (isNowhere && state.view !== "models") box.focus();
  });
}

function count(node) {
  const now = performance.now();
  const { clock } = state.writing ?? {};
  if (!clock?.first || now - counted < COUNT_EVERY_MS) return;
  counted = now;
  const tokens = node.tokens.length;
  const took = clock.last - clock.first;
  byId("count").textContent = words.writingNow(tokens, took > 500 && !clock.took ? speed(tokens, took) : "");
}

/** The text of a file that is dropped into the box. */
async function drop(event) {
  const [file] = event.dataTransfer?.files ?? [];
  if (!file) return;
  event.preventDefault();
  const text = await file.text();
  if (text.includes("\u0000")) notice(words.noText(file.name));
  else box.setRangeText(text.slice(0, box.maxLength - box.value.length), box.selectionStart, box.selectionEnd, "end");
  size();
  keepDraft();
}

export function startComposer() {
  box.addEventListener("input", () => { size(); keepDraft(); });
  box.addEventListener("keydown", onKey);
  box.addEventListener("drop", drop);
  byId("composer").addEventListener("submit", send);
  byId("stop").addEventListener("click", () => { state.writing?.stop(); box.focus(); });
  byId("settings").addEventListener("click", openSettings);
  let open = state.chat;
  on("chat", (chat) => {
    if (open !== chat) fill(drafts.get(draftKey()) ?? "");
    open = chat;
  });
  on("draft", (text) => {
    if (text === null) return;
    fill(text);
    keepDraft();
    set({ draft: null });
    box.focus();
  });
  on("writing", showWriting);
  on("settings", (settings) => { byId("settings-sum").textContent = summary(settings); });
  onFrame(count);
  fill(box.value || (drafts.get(draftKey()) ?? "")); // somebody may have begun before this was here
  byId("settings-sum").textContent = summary(state.settings);
}
