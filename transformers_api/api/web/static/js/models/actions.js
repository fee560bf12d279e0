// Loading and unloading: for a key of the scope admin, which is who /status answers.
import { json, modelPath } from "../core/api.js";
import { button, h } from "../core/dom.js";
import { announce, notice } from "../core/notice.js";
import { state } from "../core/state.js";
import { refresh, refreshModels } from "../core/status.js";
import { openDialog } from "../shell/dialog.js";
import { common } from "../words/common.js";
import { models as words } from "../words/models.js";

/** True where this key may change what is in memory. */
export const mayChange = () => Boolean(state.status) && !state.status.isPartial;

/** Requests that hold the model in memory. */
const held = () => Math.max(state.status?.resident?.running ?? 0, state.status?.resident?.leases ?? 0);

async function changed(call, said) {
  try {
    await call;
    announce(said);
  } catch (failure) {
    notice(failure.message);
  }
  await refresh();
}

export const load = (id) => changed(json(modelPath(id, "load"), { method: "POST", panel: "load" }), words.loadingName(id));

async function unloadNow(id) {
  const isEncoder = state.status?.encoder === id;
  const path = isEncoder ? `/v1/models/${encodeURIComponent(id)}` : modelPath(id, "unload");
  await changed(json(path, { method: "DELETE", panel: "load" }), words.unloading(id));
  if (isEncoder) await refreshModels();
}

/** Take back a load that has not begun to read the model; its download ends. */
export const cancelLoad = (id) =>
  changed(json(modelPath(id, "unload"), { method: "DELETE", panel: "load" }), words.cancelled(id));

/** Unload, and ask before that while answers are being written. */
export function unload(id) {
  const count = state.status?.resident?.model === id ? held() : 0;
  if (!count) {
    unloadNow(id);
    return;
  }
  openDialog(words.unloadTitle(id), (close) => h("div", { class: "in" },
    h("h2", { text: words.unloadTitle(id), dir: "auto" }), h("p", { text: words.unloadMore(count) }),
    h("div", { class: "row" }, button(common.cancel, close),
      button(words.unload, () => { close(); unloadNow(id); }, { cls: "btn pri" }))));
}
