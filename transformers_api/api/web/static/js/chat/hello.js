// The empty chat: what makes this page different, before a word is typed.
import { byId, h, svg } from "../core/dom.js";
import { on, state } from "../core/state.js";
import { chat as words } from "../words/chat.js";
import { say } from "./run.js";

// A picture of what is inside: layer 23 of SmolLM2, the mean of its heads, the first token left out.
const SENTENCE = [
  ["What", 2], ["is", 2], ["the", 3], ["capital", 38], ["of", 8], ["France", 100], ["?", 4], ["The", 14], ["capital", 22], ["of", 4], ["France", 70], ["is", 6], ["Paris", 0],
];
const WRITTEN = SENTENCE.length - 1;
const ANSWER = 7; // its first word; what is before is left out where it is narrow
const ARCS = [[5, 0.5], [10, 0.3], [3, 0.15], [8, 0.1]];

function arc(from, to, weight) {
  const up = 14 + Math.abs(from[0] - to[0]) * 0.12;
  return svg("path", {
    d: `M${from[0]} ${from[1]} C${from[0]} ${from[1] - up},${to[0]} ${to[1] - up},${to[0]} ${to[1]}`,
    pathLength: 1, "stroke-width": (1.2 + 6 * weight).toFixed(1), opacity: (0.4 + weight).toFixed(2),
  });
}

function specimen() {
  const box = h("div", { class: "spec", role: "img", "aria-label": words.specimen, dir: "ltr", lang: "en" });
  const spans = SENTENCE.map(([word, weight], i) => h("span", { class: i === WRITTEN ? "at" : i < ANSWER ? "far" : "", vars: { "--a": weight }, text: word }));
  spans.forEach((span, i) => box.append(span, i === 5 || i === WRITTEN ? "" : i === 6 ? "   " : " "));
  const draw = () => {
    box.querySelector("svg")?.remove();
    const frame = box.getBoundingClientRect();
    if (!frame.width) return;
    const top = (span) => {
      const place = span.getBoundingClientRect();
      return [place.left - frame.left + place.width / 2, place.top - frame.top - 1];
    };
    const arcs = svg("svg", { "aria-hidden": "true" });
    for (const [i, weight] of ARCS) if (spans[i].offsetWidth) arcs.append(arc(top(spans[i]), top(spans[WRITTEN]), weight));
    box.append(arcs);
  };
  new ResizeObserver(draw).observe(box);
  return box;
}

function sentences() {
  const { status, reach, model } = state;
  if (reach === "no") return [words.notThere, words.aboutNotThere];
  if (!status) return [words.connecting, words.aboutReady];
  if (status.loading) return [words.isLoading(status.loading.model), words.aboutLoading];
  if (!status.resident) return [words.noModel, words.aboutNoModel(model)];
  return model && model !== status.resident.model
    ? [words.isReady(status.resident.model), words.aboutNoModel(model)]
    : [words.isReady(status.resident.model), words.aboutReady];
}

const starter = ([title, more, question]) => h("button", { class: "start", type: "button", onclick: () => say(question, null, { isCalm: true }) },
  h("b", { text: title }), h("span", { text: more }));

export function startHello() {
  const heading = h("h1", { dir: "auto" });
  const about = h("p");
  byId("hello").append(specimen(), heading, about, h("div", { class: "starts" }, ...words.starters.map(starter)), h("p", { class: "hint", text: words.startersHint }));
  const draw = () => {
    const [title, more] = sentences();
    if (heading.textContent !== title) heading.textContent = title;
    if (about.textContent !== more) about.textContent = more;
  };
  for (const key of ["status", "reach", "model"]) on(key, draw);
  draw();
}
