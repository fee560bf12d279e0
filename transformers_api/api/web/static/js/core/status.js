// How the server is: asked every few seconds, faster while something happens, slower when nobody looks.
import { json } from "./api.js";
import { set, state } from "./state.js";

const CALM_MS = 4000;
const BUSY_MS = 1000;
const HIDDEN_MS = 15_000;
const PATIENCE_MS = 10_000; // with one call: polling never hangs on a connection that is dead
const RETRIES_MS = [1000, 2000, 4000, 8000, 15_000];
let timer = null;
let failures = 0;
let running = null;
let mayAskStatus = true;

/** What /health tells to everybody, in the shape of /status. */
function ofHealth(health) {
  const resident = health.current_model && { model: health.current_model, device: health.device, bytes: health.memory?.model_bytes ?? null, running: health.active_requests, waiting: 0 };
  return { ready: health.model_ready, state: resident ? "ready" : "empty", resident, loading: null, queued: {}, failed: {}, isPartial: true };
}

const patient = (panel) => ({ panel, signal: AbortSignal.timeout(PATIENCE_MS) });

async function ask() {
  if (mayAskStatus) {
    try {
      return await json("/status", patient("status"));
    } catch (failure) {
      if (![401, 403, 404].includes(failure.status)) throw failure;
      mayAskStatus = failure.status === 401; // a key without the scope, or a proxy: /health is open to all
    }
  }
  return ofHealth(await json("/health", patient("status")));
}

function pause() {
  if (failures) return RETRIES_MS[Math.min(failures, RETRIES_MS.length) - 1];
  if (document.hidden) return HIDDEN_MS;
  const { status } = state;
  const isBusy = status?.loading || state.writing || state.view === "models";
  return isBusy ? BUSY_MS : CALM_MS;
}

async function models() {
  const [list, described] = await Promise.all([json("/v1/models", patient("models")), json("/models", patient(null)).catch(() => [])]);
  const more = new Map((Array.isArray(described) ? described : described.models ?? []).map((model) => [model.name, model]));
  const merged = list.data.map((model) => ({ description: more.get(model.id)?.description, parameters: more.get(model.id)?.parameters, ...model }));
  set({ models: merged });
}

async function anatomy(resident) {
  if (!resident) {
    set({ anatomy: null });
    return;
  }
  const answer = await json(`/inspect/model?load=false&model=${encodeURIComponent(resident)}`, patient("anatomy")).catch(() => null);
  if (state.status?.resident?.model === resident) set({ anatomy: answer });
}

let shownModel;
let shownKey;

/** Ask for the models, and for what can be asked about the one in memory; after a change of it. */
export async function refreshModels() {
  shownModel = state.status?.resident?.model ?? null;
  shownKey = state.needsKey;
  try {
    await models();
  } catch {
    shownModel = undefined; // again with the next status
    return;
  }
  await anatomy(shownModel);
}

async function once() {
  try {
    const status = await ask();
    failures = 0;
    const isOther = status.resident?.model !== state.status?.resident?.model;
    set({ status, reach: "yes", ...(isOther && { anatomy: undefined }) }); // never another model's
  } catch (failure) {
    failures += 1;
    if (failure.status === 0 || failure.status >= 500) set({ reach: "no" });
  }
  if (!failures && (shownModel !== (state.status.resident?.model ?? null) || shownKey !== state.needsKey)) await refreshModels();
}

/** Ask now; what is being asked already counts. */
export function refresh() {
  clearTimeout(timer);
  running ??= once().finally(() => {
    running = null;
    clearTimeout(timer);
    timer = setTimeout(refresh, pause());
  });
  return running;
}

/** A key was entered: what was refused may be allowed now. */
export function retry() {
  mayAskStatus = true;
  set({ needsKey: false });
  return refresh();
}

export function start() {
  document.addEventListener("visibilitychange", refresh);
  addEventListener("online", refresh);
  addEventListener("offline", refresh);
  return refresh();
}
