// What /status has said in the last minutes, kept in the tab: tokens a second, answers that are written.
import { state } from "../core/state.js";

export const KEPT_S = 180;
export const series = { at: [], rate: [], running: [] };
let last = null;

/** The tokens a second since the status before; null where another model, or none, was in memory. */
function rate(resident, now) {
  const tokens = resident?.generated_tokens;
  if (tokens === undefined) return null;
  const before = last;
  last = { model: resident.model, since: resident.since, tokens, now };
  const isSame = before && before.model === resident.model && before.since === resident.since && now > before.now;
  return isSame ? Math.max(0, (tokens - before.tokens) / (now - before.now)) : null;
}

/** Note the newest status. */
export function note() {
  const now = performance.now() / 1000;
  const { resident } = state.status ?? {};
  if (series.at.at(-1) === now) return;
  series.at.push(now);
  series.rate.push(rate(resident, now));
  series.running.push(resident?.running ?? 0);
  while (series.at[0] < now - KEPT_S) for (const list of Object.values(series)) list.shift();
}

export const newestRate = () => series.rate.at(-1) ?? null;
