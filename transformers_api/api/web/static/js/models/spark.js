// The line of the last minutes, by uPlot, which is fetched when the view is first opened.
import { colour, h } from "../core/dom.js";
import { onPaint } from "../shell/theme.js";
import { KEPT_S, series } from "./series.js";

const HEIGHT = 72;
let uPlot = null;
let plot = null;

async function fetched() {
  if (!uPlot) {
    const sheet = new URL("../../vendor/uPlot.min.css", import.meta.url).href;
    document.head.append(h("link", { rel: "stylesheet", href: sheet }));
    uPlot = (await import("../../vendor/uPlot.esm.js")).default;
    onPaint(() => plot?.redraw(false));
  }
  return uPlot;
}

function made(place, width) {
  const line = (name, more) => ({ stroke: () => colour(name), points: { show: false }, ...more });
  return new uPlot({
    width, height: HEIGHT, padding: [6, 0, 2, 0], legend: { show: false }, cursor: { show: false },
    scales: {
      x: { time: false, range: () => [performance.now() / 1000 - KEPT_S, performance.now() / 1000] },
      rate: { range: (_, __, most) => [0, Math.max(1, 1.1 * (most ?? 0))] },
      running: { range: (_, __, most) => [0, Math.max(4, most ?? 0)] },
    },
    axes: [{ show: false }, { show: false }, { show: false }],
    series: [{}, line("--accent", { scale: "rate", width: 2, fill: () => colour("--accent-soft"), spanGaps: false }), line("--arc", { scale: "running", width: 1.5 })],
  }, [series.at, series.rate, series.running], place);
}

/** Draw the line in `place`, as wide as that is. */
export async function drawSpark(place) {
  await fetched();
  const width = place.clientWidth;
  if (!width) return;
  if (!plot || plot.root.parentNode !== place) {
    plot?.destroy();
    plot = made(place, width);
    return;
  }
  if (plot.width !== width) plot.setSize({ width, height: HEIGHT });
  plot.setData([series.at, series.rate, series.running]);
}
