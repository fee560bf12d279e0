// Every call of the page: only the public API, only this origin.
import { brokenOff, refusal, unreachable } from "./errors.js";
import { remember } from "./request.js";
import { events } from "./sse.js";
import { set } from "./state.js";

const KEY = "transformers-api.key";

function storage(kind) {
  try {
    return globalThis[kind];
  } catch { // switched off by the browser
    return null;
  }
}

/** The API key: of this tab, or of this browser where the user chose so. */
export const key = {
  get: () => storage("sessionStorage")?.getItem(KEY) ?? storage("localStorage")?.getItem(KEY) ?? "",
  set(secret, remembers) {
    try {
      storage("sessionStorage")?.setItem(KEY, secret);
      if (remembers) storage("localStorage")?.setItem(KEY, secret);
      else storage("localStorage")?.removeItem(KEY);
    } catch { /* a private window */ }
  },
};

async function call(path, { method = null, body, signal, panel, accept } = {}) {
  const verb = method ?? (body === undefined ? "GET" : "POST");
  if (panel) remember(panel, { method: verb, path, body });
  const headers = {};
  const secret = key.get();
  if (secret) headers.authorization = `Bearer ${secret}`;
  if (accept) headers.accept = accept;
  // Also without a body: other origins cannot send that type without being asked first.
  if (verb !== "GET") headers["content-type"] = "application/json";
  const text = body === undefined ? undefined : JSON.stringify(body);
  let answer;
  try {
    answer = await fetch(path, { method: verb, headers, body: text, signal, credentials: "same-origin", cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw unreachable();
  }
  if (answer.ok) return answer;
  const details = await answer.json().catch(() => null); // not JSON: a proxy in between
  // A refusal of a key that was changed meanwhile says nothing about the new one.
  if (answer.status === 401 && secret === key.get()) set({ needsKey: true });
  throw refusal(answer.status, details, answer.headers);
}

/** The JSON that `path` answers. `panel` names what the answer is shown in, for the dialog "{}".
 *  Throws Failure, or AbortError. */
export async function json(path, options = {}) {
  const answer = await call(path, options);
  try {
    return await answer.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw answer.headers.get("content-type")?.includes("json") ? brokenOff() : refusal(answer.status, null);
  }
}

/** The body that `path` answers, as text or a Blob ("text", "blob"); `accept` chooses a form. */
export async function raw(path, kind, options = {}) {
  const answer = await call(path, options);
  return answer[kind]();
}

/** Ask `path` for a stream and call `onEvent` with every chunk; returns at [DONE].
 *  Throws Failure, also for an error in the stream and for one that ends early, or AbortError. */
export async function stream(path, body, { signal, panel, onEvent }) {
  const asked = { ...body, stream: true, stream_options: { include_usage: true } };
  const answer = await call(path, { body: asked, signal, panel });
  await events(answer.body, (chunk) => {
    if (chunk.error) throw refusal(200, chunk);
    onEvent(chunk);
  });
}

/** The path of a model's route; a model's id may have a slash. */
export const modelPath = (id, action = "") => `/models/${encodeURIComponent(id)}${action && `/${action}`}`;

