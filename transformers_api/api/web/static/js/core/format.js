// Numbers and tokens as people read them. A space stands before every unit.
const SILENT = /^<\|?[^<>\s]+\|?>$/;
const INVISIBLE = /[^\s\u00ad\u200b-\u200f\u2060\ufeff\ufe0f]/u;

export function bytes(count) {
  if (count === null || count === undefined) return "–";
  if (count < 1e6) return `${Math.round(count / 1e3)} kB`;
  if (count < 1e9) return `${(count / 1e6).toFixed(count < 1e7 ? 1 : 0)} MB`;
  return `${(count / 1e9).toFixed(2)} GB`;
}

/** A probability with two decimals. */
export function percent(share) {
  if (share >= 0.0001) return `${(100 * share).toFixed(2)} %`;
  return share > 0 ? "<0.01 %" : "0.00 %";
}

export function duration(seconds) {
  if (seconds < 60) return `${Math.round(seconds)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min`;
  if (seconds < 86_400) return `${Math.floor(seconds / 3600)} h ${Math.floor((seconds % 3600) / 60)} min`;
  return `${Math.floor(seconds / 86_400)} d ${Math.floor((seconds % 86_400) / 3600)} h`;
}

export const count = (n, one, many) => `${n} ${n === 1 ? one : many}`;

/** True for what a template writes, such as <|im_end|>. */
export const isSpecial = (text) => SILENT.test(text);

/** A token's text where it stands alone: spaces, line ends and what shows nothing become visible. */
export function visible(text) {
  if (text && !INVISIBLE.test(text) && !/^[ \n\t]+$/.test(text)) {
    return [...text].map((c) => `U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`).join(" ");
  }
  const shown = text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/^ +| +$/g, (run) => "·".repeat(run.length));
  return shown || "∅";
}

/** A token's text in an accessible name. */
export function spoken(text) {
  const trimmed = text.trim();
  if (trimmed) return trimmed;
  if (text.includes("\n")) return "line break";
  return text ? "space" : "nothing";
}
