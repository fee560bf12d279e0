// The native select "Model". Choosing says what it will cost, before it does it.
import { json, modelPath } from "../core/api.js";
import { byId, h } from "../core/dom.js";
import { notice } from "../core/notice.js";
import { on, set, state } from "../core/state.js";
import { refresh } from "../core/status.js";
import { choice, keepChoice } from "../core/store.js";
import { common } from "../words/common.js";

/** True for a model that writes text: encoders are in the table of Models, not here. */
export function writes(model) {
  if (Array.isArray(model.capabilities)) return model.capabilities.includes("chat") || model.capabilities.includes("completion");
  return model.max_model_len !== undefined || model.owned_by !== "local";
}

const isHere = (model) => model.local ?? model.owned_by === "local";

function groups() {
  const all = state.models.filter(writes);
  return [
    [common.inMemory, all.filter((model) => model.loaded)],
    [common.loadedWhenAsked, all.filter((model) => !model.loaded && isHere(model))],
    [common.onTheHub, all.filter((model) => !model.loaded && !isHere(model))],
  ].filter(([, models]) => models.length);
}

function draw() {
  const select = byId("model");
  const ids = new Set(state.models.map((model) => model.id));
  const option = (model) => h("option", { value: model.id, text: model.id });
  const shape = JSON.stringify(groups().map(([label, models]) => [label, models.map((model) => model.id)]));
  if (select.dataset.shape !== shape) {
    select.dataset.shape = shape;
    select.replaceChildren(...groups().map(([label, models]) => h("optgroup", { label }, ...models.map(option))));
  }
  if (state.models.length && !ids.has(state.model)) {
    set({ model: state.status?.resident?.model ?? state.models.find(writes)?.id ?? null });
  }
  if (state.model) select.value = state.model;
}

let withdraw = () => {}; // what was said of an earlier choice

function loadNow(id) {
  json(modelPath(id, "load"), { method: "POST" }).then(refresh, (failure) => notice(failure.message));
}

/** Choose a model, as the select does. */
export function choose(id) {
  set({ model: id });
  keepChoice("model", id);
  byId("model").value = id;
  withdraw();
  const resident = state.status?.resident?.model;
  if (!state.status || resident === id || state.status.loading?.model === id) return;
  const text = resident ? common.willReplace(id, resident) : common.willLoad(id);
  withdraw = notice(text, { kind: "info", actions: [[common.loadNow, () => loadNow(id)]] });
}

export function start() {
  state.model = choice("model", null);
  on("models", draw);
  on("model", draw);
  on("status", (status) => { if (status?.resident?.model === state.model) withdraw(); });
  byId("model").addEventListener("change", (event) => choose(event.target.value));
}
