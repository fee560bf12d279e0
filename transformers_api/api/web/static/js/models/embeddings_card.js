// Embeddings tried out: two texts, their vectors by /v1/embeddings, the angle between them.
import { json } from "../core/api.js";
import { button, h } from "../core/dom.js";
import { announce } from "../core/notice.js";
import { state } from "../core/state.js";
import { refresh, refreshModels } from "../core/status.js";
import { requestButton } from "../shell/request_dialog.js";
import { models as words } from "../words/models.js";
import { write } from "./facts.js";

let opened = null; // the card's own: {pick, first}

/** The cosine of the angle between two vectors; 0 beside one of zeros. */
export function cosine(one, other) {
  let [product, length, width] = [0, 0, 0];
  one.forEach((value, at) => {
    product += value * other[at];
    length += value * value;
    width += other[at] * other[at];
  });
  return length && width ? product / Math.sqrt(length * width) : 0;
}

/** Go to the card with this model chosen. */
export function tryEmbeddings(id) {
  if (!opened) return;
  opened.pick.value = id;
  opened.first.focus();
  opened.first.scrollIntoView({ block: "center" });
}

const field = (label, control) => h("label", { class: "field" }, h("span", { text: label }), control);

function result() {
  const value = h("b", { class: "big num" });
  const nearness = h("span");
  const bar = h("i", { class: "w" });
  const more = h("p", { class: "hint" });
  const failed = h("p", { class: "failed", role: "alert", dir: "auto", hidden: true });
  const found = h("div", { class: "near", hidden: true },
    h("div", { class: "lab" }, h("span", { text: words.similarity }), value), h("div", { class: "meter" }, bar), nearness, more);
  const show = (answer, seconds) => {
    const [one, other] = answer.data.map((each) => each.embedding);
    const near = cosine(one, other);
    write(value, words.cosine(near));
    write(nearness, words.nearness(near));
    write(more, words.cosineMore(one.length, answer.usage.prompt_tokens, seconds));
    bar.style.width = `${100 * Math.max(0, near)}%`;
    found.hidden = false;
    failed.hidden = true;
    announce(`${words.similarity} ${words.cosine(near)}, ${words.nearness(near)}`);
  };
  const fail = (failure) => {
    found.hidden = true;
    write(failed, failure.message);
    failed.hidden = false;
  };
  return { elements: [found, failed], show, fail };
}

/** The card; `show()` follows the models that there are. */
export function embeddingsCard() {
  const pick = h("select", { class: "sel" });
  const first = h("textarea", { rows: "2", dir: "auto", maxlength: "20000" });
  const second = h("textarea", { rows: "2", dir: "auto", maxlength: "20000" });
  [first.value, second.value] = words.examples;
  const found = result();
  const compare = h("button", { type: "submit", class: "btn pri", text: words.compare });
  const off = h("p", { class: "hint", text: words.embeddingsOff });
  const form = h("form", { class: "two-texts" },
    h("p", { class: "hint", text: words.embeddingsMore }), field(words.embeddingModel, pick),
    field(words.first, first), field(words.second, second), h("div", { class: "row" }, compare), ...found.elements);
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (compare.disabled) return;
    compare.disabled = true;
    write(compare, words.comparing);
    const began = performance.now();
    try {
      const body = { model: pick.value, input: [first.value, second.value] };
      const answer = await json("/v1/embeddings", { body, panel: "embeddings" });
      found.show(answer, (performance.now() - began) / 1000);
    } catch (failure) {
      found.fail(failure);
    }
    compare.disabled = false;
    write(compare, words.compare);
    await refresh(); // the encoder is in memory now
    await refreshModels();
  });
  const element = h("section", { class: "card", "aria-label": words.embeddings },
    h("header", { class: "cap" }, h("h2", { text: words.embeddings }), requestButton("embeddings")), off, form);
  opened = { pick, first };
  const show = () => {
    const ids = state.models.filter((model) => model.capabilities?.includes("embedding")).map(({ id }) => id);
    off.hidden = ids.length > 0;
    form.hidden = !ids.length;
    if (pick.dataset.ids === ids.join("\n")) return;
    pick.dataset.ids = ids.join("\n");
    const chosen = pick.value;
    pick.replaceChildren(...ids.map((id) => h("option", { value: id, text: id })));
    if (ids.includes(chosen)) pick.value = chosen;
  };
  return { element, show };
}
