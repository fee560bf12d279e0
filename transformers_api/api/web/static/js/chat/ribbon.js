// The ribbon: a bar for each token, as high as the token was surprising to the model.
import { colour } from "../core/dom.js";
import { onPaint } from "../shell/theme.js";

const HEIGHT = 26;
const WIDEST = 12;
const MOST = 6; // nats, of the highest bar
let colours = null;

onPaint(() => { colours = null; });

/** The width of one token's bar, for so many in so many pixels. */
export const stepOf = (count, width) => Math.min(WIDEST, width / Math.max(1, count));

/** The index of the token under `x`. */
export const tokenAt = (x, count, width) => Math.max(0, Math.min(count - 1, Math.floor(x / stepOf(count, width))));

function sized(canvas, width) {
  const ratio = devicePixelRatio || 1;
  if (canvas.width !== Math.round(width * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(HEIGHT * ratio);
  }
  const pen = canvas.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, HEIGHT);
  return pen;
}

/** Draw the tokens; `newest` marks the last one. Where there are more than pixels a bar is the highest of several. */
export function drawRibbon(canvas, tokens, { newest = false } = {}) {
  const width = canvas.parentElement?.clientWidth;
  if (!width || !tokens.length) return;
  colours ??= { accent: colour("--accent"), line: colour("--line"), arc: colour("--arc") };
  const step = stepOf(tokens.length, width);
  const bar = Math.max(1, step);
  const bars = Math.min(tokens.length, Math.floor(width / bar));
  const isRtl = getComputedStyle(canvas).direction === "rtl";
  const pen = sized(canvas, width);
  pen.fillStyle = colours.line;
  const used = Math.min(width, bars * bar);
  pen.fillRect(isRtl ? width - used : 0, HEIGHT - 2, used, 1);
  for (let i = 0; i < bars; i += 1) {
    const from = Math.floor((i * tokens.length) / bars);
    const to = Math.max(from + 1, Math.floor(((i + 1) * tokens.length) / bars));
    let surprisal = 0;
    for (let k = from; k < to; k += 1) surprisal = Math.max(surprisal, tokens[k].surprisal ?? 0);
    const isNewest = newest && to >= tokens.length;
    const height = Math.max(2, Math.sqrt(Math.min(1, surprisal / MOST)) * (HEIGHT - 4));
    pen.fillStyle = isNewest ? colours.arc : colours.accent;
    pen.globalAlpha = isNewest ? 1 : 0.3 + 0.7 * Math.min(1, surprisal / 3);
    const x = isRtl ? width - (i + 1) * bar : i * bar;
    pen.fillRect(x, HEIGHT - 2 - height, Math.max(1, bar - (bar > 3 ? 1.5 : 0)), height);
  }
  pen.globalAlpha = 1;
}
