// One inspection at a time: the newest question of a panel takes the place of its older one, which is
// given up; those of other panels wait their turn.
import { json } from "../core/api.js";

const waiting = new Map(); // panel → {path, body, resolve, reject}
let running = null; // {panel, controller}

export const isGivenUp = (error) => error?.name === "AbortError";
const abandoned = () => new DOMException("Another question took its place", "AbortError");

async function next() {
  if (running || waiting.size === 0) return;
  const [panel, question] = waiting.entries().next().value;
  waiting.delete(panel);
  const controller = new AbortController();
  running = { panel, controller };
  try {
    question.resolve(await json(question.path, { body: question.body, signal: controller.signal, panel }));
  } catch (error) {
    question.reject(error);
  } finally {
    running = null;
    next();
  }
}

/** Ask `/inspect/<what>`; throws Failure, or AbortError where a newer question of `panel` came. */
export function inspect(panel, what, body) {
  forget(panel);
  return new Promise((resolve, reject) => {
    waiting.set(panel, { path: `/inspect/${what}`, body, resolve, reject });
    next();
  });
}

/** Give up what `panel` asked. */
export function forget(panel) {
  waiting.get(panel)?.reject(abandoned());
  waiting.delete(panel);
  if (running?.panel === panel) running.controller.abort();
}
