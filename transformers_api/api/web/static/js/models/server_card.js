// The second card: the server, its machine, its limits and its last minutes.
import { h } from "../core/dom.js";
import { duration } from "../core/format.js";
import { requestButton } from "../shell/request_dialog.js";
import { models as words } from "../words/models.js";
import { facts } from "./facts.js";
import { newestRate } from "./series.js";
import { drawSpark } from "./spark.js";

const sum = (counts) => Object.values(counts ?? {}).reduce((all, count) => all + count, 0);

function rows(status) {
  const { resident, limits } = status;
  return [
    status.version && [words.version, status.version],
    status.uptime_s !== undefined && [words.runningFor, duration(status.uptime_s)],
    [words.beingWritten, resident?.running ?? 0],
    [words.waiting, (resident?.waiting ?? 0) + sum(status.queued)],
    resident?.generated_tokens !== undefined && [words.tokensPerSecond, words.rate(newestRate())],
    limits && [words.atOnce, words.tokens(limits.max_inflight)],
    limits && [words.mayWait, words.tokens(limits.max_queue)],
    limits && [words.perMinute, limits.rate_limit_per_min || words.noLimit],
    limits && [words.insidePerMinute, limits.inspections_per_min ?? words.noLimit],
  ].filter(Boolean);
}

/** The card; `show(status)` changes it. */
export function serverCard() {
  const list = facts();
  const spark = h("div", { class: "spark", role: "img", "aria-label": words.tokensPerSecond });
  const caption = h("p", { class: "sparkcap legend" },
    h("span", {}, h("i", { class: "w" }), words.tokensPerSecond), h("span", {}, h("i", { class: "k" }), words.beingWritten), h("span", { class: "when", text: words.lastMinutes }));
  const element = h("section", { class: "card", "aria-label": words.server },
    h("header", { class: "cap" }, h("h2", { text: words.server }), requestButton("status")),
    list.element, caption, spark);
  const show = (status) => {
    list.show(rows(status));
    caption.hidden = spark.hidden = Boolean(status.isPartial);
    spark.setAttribute("aria-label", words.sparkName(words.rate(newestRate()), status.resident?.running ?? 0));
    drawSpark(spark);
  };
  return { element, show };
}
