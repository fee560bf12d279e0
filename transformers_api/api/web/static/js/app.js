// The wiring: what the browser kept, the frame's parts, the three views. core/state.js has the contract.
import { catchUp, listKept, openChat, startChat } from "./chat/chats.js";
import { importFile, menuEntries } from "./chat/transfer.js";
import * as chatView from "./chat/view.js";
import { byId } from "./core/dom.js";
import { notice } from "./core/notice.js";
import { on, set, state, touch } from "./core/state.js";
import * as status from "./core/status.js";
import { chatById, choice, isLasting, keepAtEnd, keepWaiting, tidy } from "./core/store.js";
import { newChat } from "./core/tree.js";
import * as dialog from "./shell/dialog.js";
import * as keyDialog from "./shell/key_dialog.js";
import * as keys from "./shell/keys.js";
import { menu } from "./shell/menu.js";
import * as modelPicker from "./shell/model_picker.js";
import { showRequest } from "./shell/request_dialog.js";
import * as serverLine from "./shell/server_line.js";
import * as side from "./shell/side.js";
import * as theme from "./shell/theme.js";
import * as views from "./shell/views.js";
import { common } from "./words/common.js";

// Loaded when they are first opened, or soon will be: the first answer is written, or the pointer comes near.
const LATER = { inside: () => import("./inside/view.js"), models: () => import("./models/view.js") };
const mounted = new Map();

function freshChat() {
  startChat();
  side.closeSide();
  if (state.view === "models") views.show("chat");
  byId("message").focus();
}

function moreEntries() {
  return [
    ...menuEntries(),
    null,
    [common.menu.request, () => showRequest(state.view === "models" ? "status" : "answer")],
    [common.menu.key, keyDialog.askKey],
    null,
    [common.menu.keys, keys.showKeys],
    [keys.lettersOn() ? common.menu.lettersOff : common.menu.lettersOn, keys.switchLetters],
    [common.menu.docs, () => window.open("/docs", "_blank", "noopener")],
  ];
}

function startFrame() {
  dialog.start();
  keyDialog.start();
  theme.start();
  modelPicker.start();
  serverLine.start();
  side.start();
  menu(byId("more"), moreEntries);
  byId("new").addEventListener("click", freshChat);
  byId("served").addEventListener("click", () => { side.closeSide(); views.show("models"); });
  addEventListener("pagehide", keepAtEnd);
  document.addEventListener("visibilitychange", () => (document.hidden ? keepWaiting() : catchUp()));
  on("chat", (chat) => { document.title = chat.title || common.pageTitle; });
}

function mountLater(view, context) {
  if (!LATER[view] || mounted.has(view)) return;
  const mounting = LATER[view]().then(({ mount }) => {
    mount(byId(`view-${view}`), context);
    if (state.view === view) touch("view");
  });
  mounted.set(view, mounting.catch(() => {
    mounted.delete(view);
    if (state.view === view) notice(common.viewMissing, { actions: [[common.reload, () => location.reload()]] });
  }));
}

async function start() {
  startFrame();
  const kept = await chatById(choice("chat", null));
  const chat = kept ?? newChat();
  set({ chats: kept ? [kept] : [], chat, settings: choice("settings", {}) });
  const context = { show: views.show, showRequest, openChat, newChat: freshChat, importFile };
  chatView.mount(byId("view-chat"), context);
  on("view", (view) => mountLater(view, context));
  on("writing", () => mountLater("inside", context));
  byId("views").addEventListener("pointerover", () => Object.keys(LATER).forEach((view) => mountLater(view, context)), { once: true });
  views.start();
  keys.start({ show: views.show, newChat: freshChat, closeSide: side.closeSide });
  if (!matchMedia("(pointer: coarse)").matches && state.view === "chat") byId("message").focus();
  document.documentElement.dataset.ready = "";
  listKept();
  if (!(await isLasting())) notice(common.memoryOnly, { kind: "info" });
  tidy(chat.id);
  await status.start();
}

start();
