// The view Models: what is in memory, the server, every model, embeddings, the log of swaps.
import { h } from "../core/dom.js";
import { on, state } from "../core/state.js";
import { refresh } from "../core/status.js";
import { models as words } from "../words/models.js";
import { mayChange } from "./actions.js";
import { embeddingsCard } from "./embeddings_card.js";
import { drawMemory } from "./memory_card.js";
import { note } from "./series.js";
import { serverCard } from "./server_card.js";
import { swapsCard } from "./swaps_card.js";
import { modelTable } from "./table.js";

function empty() {
  const title = h("h2");
  const more = h("p");
  const element = h("div", { class: "empty" }, title, more);
  const show = () => {
    title.textContent = state.reach === "no" ? words.noServer : words.asking;
    more.textContent = state.reach === "no" ? words.noServerMore : "";
  };
  return { element, show };
}

export function mount(root) {
  const memory = h("div", { class: "slot" });
  const server = serverCard();
  const table = modelTable();
  const embeddings = embeddingsCard();
  const swaps = swapsCard();
  const nobody = empty();
  const looking = h("p", { class: "hint", text: words.mayLook, hidden: true });
  const page = h("div", { class: "page" },
    h("div", {}, h("h1", { text: words.title }), h("p", { class: "lead", text: words.lead }), looking),
    h("div", { class: "cards" }, memory, server.element), table.element,
    h("div", { class: "cards even" }, embeddings.element, swaps.element));
  root.replaceChildren(h("div", { class: "scroll", tabindex: "-1" }, page, nobody.element));

  function draw() {
    if (state.view !== "models") return;
    const { status } = state;
    page.hidden = !status;
    nobody.element.hidden = Boolean(status);
    nobody.show();
    if (!status) return;
    looking.hidden = mayChange();
    drawMemory(memory, status);
    server.show(status);
    table.show();
    embeddings.show();
    swaps.show(status.swaps);
  }

  on("status", () => { note(); draw(); });
  for (const key of ["models", "anatomy", "reach"]) on(key, draw);
  on("view", (view) => {
    if (view !== "models") return;
    draw();
    refresh();
  });
  addEventListener("resize", draw);
}
