// The first card: the model in memory, the one that comes, or nothing.
import { button, h } from "../core/dom.js";
import { bytes } from "../core/format.js";
import { announce } from "../core/notice.js";
import { state } from "../core/state.js";
import { requestButton } from "../shell/request_dialog.js";
import { common } from "../words/common.js";
import { models as words } from "../words/models.js";
import { cancelLoad, mayChange, unload } from "./actions.js";
import { facts, gauge, progress, write } from "./facts.js";

let shown = { kind: null, show: () => {} };
let before = null; // what was in memory before the one that comes

const card = (title, ...children) => h("section", { class: "card", "aria-label": title },
  h("header", { class: "cap" }, h("h2", { text: title }), requestButton("status")), ...children);

const listed = (id) => state.models.find((model) => model.id === id);

function pills(resident) {
  const model = listed(resident.model);
  const anatomy = state.anatomy?.id === resident.model ? state.anatomy : null;
  const layers = anatomy?.attention?.per_layer?.filter((layer) => layer.available).length;
  return [
    model?.parameters && words.parameters(model.parameters), resident.dtype,
    resident.quantization && resident.quantization !== "none" && resident.quantization,
    resident.kernels && words.kernels(resident.kernels), resident.device,
    resident.max_model_len && words.context(resident.max_model_len),
    resident.load_s !== undefined && words.loadedIn(resident.load_s),
    resident.mode === "sequential" && words.oneAtATime,
    anatomy && (layers ? words.attention(layers, anatomy.attention.verified) : words.noAttention),
    anatomy?.lens?.available && words.lens,
  ].filter(Boolean);
}

function kvGauge() {
  const bar = gauge(words.memory, ["w", "k", "o", "f"]);
  const show = ({ bytes: weights, kv_cache: kv }) => {
    const all = Math.max(weights + kv.budget_bytes, 1);
    const aside = Math.max(0, kv.bytes - kv.used_bytes);
    const free = Math.max(0, all - weights - kv.used_bytes - aside);
    bar.show({
      value: words.memoryOf(bytes(weights + kv.used_bytes + aside), bytes(all)),
      name: words.memoryName(bytes(weights), bytes(kv.used_bytes), bytes(all)),
      parts: [
        [weights / all, words.weights(bytes(weights))], [kv.used_bytes / all, words.conversations(bytes(kv.used_bytes))],
        [aside / all, words.setAside(bytes(aside))], [free / all, words.budget(bytes(free))],
      ],
    });
  };
  return { element: bar.element, show };
}

function machineGauge() {
  const bar = gauge(words.machine, ["w", "o"]);
  const show = ({ memory }) => {
    bar.element.hidden = !memory?.machine_bytes;
    if (bar.element.hidden) return;
    const { process_bytes: own, machine_bytes: all, free_bytes: free } = memory;
    const others = Math.max(0, all - free - (own ?? 0));
    bar.show({
      value: words.memoryOf(bytes(all - free), bytes(all)),
      name: words.machineName(bytes(own), bytes(others), bytes(all)),
      parts: [[(own ?? 0) / all, words.process(bytes(own))], [others / all, words.others(bytes(others))]],
    });
  };
  return { element: bar.element, show };
}

function residentCard(id) {
  const description = h("p", { class: "hint", dir: "auto" });
  const facts = h("div", { class: "pills" });
  const memory = kvGauge();
  const leaving = h("p", { class: "hint", hidden: true, text: words.draining });
  const act = button(words.unload, () => unload(id), { cls: "btn small", "aria-label": words.unloadName(id) });
  const element = card(words.inMemory,
    h("div", { class: "now" }, h("div", {}, h("p", { class: "nm", text: id, dir: "auto" }), description), act),
    facts, leaving, memory.element);
  const show = ({ resident }) => {
    write(description, listed(id)?.description ?? "");
    const texts = pills(resident);
    if (facts.dataset.texts !== texts.join()) {
      facts.dataset.texts = texts.join();
      facts.replaceChildren(...texts.map((text) => h("span", { class: "pill", text })));
    }
    act.hidden = !mayChange();
    act.disabled = Boolean(resident.draining);
    leaving.hidden = !resident.draining;
    memory.element.hidden = !resident.kv_cache;
    if (resident.kv_cache) memory.show(resident);
  };
  return { element, show };
}

function loadingCard(id) {
  const stage = h("span");
  const share = h("b");
  const bar = progress(words.loadingName(id));
  const hint = h("p", { class: "hint" });
  const list = facts();
  const act = button(common.cancel, () => { act.disabled = true; cancelLoad(id); }, { cls: "btn small", "aria-label": words.cancelName(id) });
  const element = card(words.loading,
    h("div", { class: "now" }, h("p", { class: "nm", text: id, dir: "auto" }), act),
    h("div", { class: "gauge" }, h("div", { class: "lab" }, stage, share), bar.element), hint, list.element);
  element.classList.add("loading");
  const show = (status) => {
    const { progress: done, doing, stage: name, since, last_load_s: last } = status.loading;
    write(stage, name === "waiting" ? words.stages.waiting : words.doing(doing) || words.stages[name] || words.loading);
    write(share, name !== "waiting" && done > 0 ? words.percent(done) : "");
    bar.show(name === "waiting" ? 0 : done);
    act.hidden = !mayChange() || !["preparing", "waiting"].includes(name);
    write(hint, name === "waiting" && status.resident ? words.waitTurn(status.resident.model) : words.wait);
    list.show([
      [words.since, since ? words.seconds(Date.now() / 1000 - since) : words.unknown],
      ...(last ? [[words.lastTime, words.seconds(last)]] : []),
      [words.queued, status.queued?.[id] ?? 0],
      [words.before, status.resident?.model ?? before ?? words.none],
    ]);
  };
  return { element, show };
}

function emptyCard() {
  const failed = h("p", { class: "failed", role: "alert", dir: "auto", hidden: true });
  const element = card(words.inMemory,
    h("div", { class: "now" }, h("div", {}, h("p", { class: "nm", text: words.nothing }), h("p", { class: "hint", text: words.nothingMore }))), failed);
  const show = (status) => {
    const reason = status.failed?.[state.model];
    failed.hidden = !reason;
    write(failed, reason ? `${words.hasFailed(state.model)}: ${reason}` : "");
  };
  return { element, show };
}

/** Say what has happened to the model that was on its way. */
function tell(kind, status) {
  const [what, id] = shown.kind?.split(" ", 2) ?? [];
  if (what !== "loading" || kind === shown.kind) return;
  if (status.resident?.model === id) announce(words.isReady(id));
  else if (status.failed?.[id]) announce(words.hasFailed(id));
}

/** Show `status` in `place`; the card stays the same as long as the same model is in the same state. */
export function drawMemory(place, status) {
  const { resident, loading } = status;
  const kind = loading ? `loading ${loading.model}` : resident ? `resident ${resident.model}` : "empty";
  if (resident && !loading) before = resident.model;
  if (shown.kind !== kind || !place.firstChild) {
    tell(kind, status);
    const made = loading ? loadingCard(loading.model) : resident ? residentCard(resident.model) : emptyCard();
    const machine = machineGauge();
    made.element.append(machine.element);
    place.replaceChildren(made.element);
    shown = { kind, show: (newest) => { made.show(newest); machine.show(newest); } };
  }
  shown.show(status);
}
