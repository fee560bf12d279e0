// Every model: where it is, how large, what can be asked of it, and what can be done about it.
import { button, h } from "../core/dom.js";
import { bytes } from "../core/format.js";
import { state } from "../core/state.js";
import { choose, writes } from "../shell/model_picker.js";
import { requestButton } from "../shell/request_dialog.js";
import { show as showView } from "../shell/views.js";
import { models as words } from "../words/models.js";
import { load, mayChange, unload } from "./actions.js";
import { tryEmbeddings } from "./embeddings_card.js";

const isHere = (model) => model.local ?? model.owned_by === "local";
const embeds = (model) => model.capabilities?.includes("embedding") && !writes(model);

/** "memory", "loading", "failed", "never", "disk", "hub", or "away" of what else has to be fetched. */
function place(model) {
  const { status } = state;
  if (status?.loading?.model === model.id) return "loading";
  if (model.loaded || status?.resident?.model === model.id || status?.encoder === model.id) return "memory";
  if (model.servable === false && !model.capabilities?.length) return "never";
  if (status?.failed?.[model.id]) return "failed";
  if (isHere(model)) return "disk";
  return model.owned_by === "huggingface" ? "hub" : "away";
}

const PLACES = {
  memory: ["ready", words.inMemory], loading: ["busy", words.isLoading], failed: ["off", words.hasFailedShort],
  never: ["wait", words.never], disk: ["wait", words.onDisk], hub: ["wait", words.onTheHub], away: ["wait", words.notHere],
};
const FEW = 12; // rows that are shown at once, however many are elsewhere
const ORDER = ["memory", "loading", "failed", "disk", "away", "hub", "never"];

function actions(model, where) {
  const { id } = model;
  const small = (text, act, name) => button(text, act, { cls: "btn small", "aria-label": name, data: { of: id } });
  const goChat = () => { choose(id); showView("chat", { focus: false }); };
  const buttons = [];
  if (embeds(model)) buttons.push(small(words.tryIt, () => tryEmbeddings(id), words.tryName(id)));
  else if (where === "memory" && writes(model)) buttons.push(small(words.chat, goChat, words.chatName(id)));
  if (!mayChange() || where === "never") return buttons;
  if (where === "memory") buttons.push(small(words.unload, () => unload(id), words.unloadName(id)));
  else if (where === "failed") buttons.push(small(words.again, () => load(id), words.againName(id)));
  else if (where !== "loading" && !embeds(model)) buttons.push(small(words.load, () => load(id), words.loadName(id)));
  return buttons;
}

function row(model) {
  const where = place(model);
  const [dot, text] = PLACES[where];
  const standing = () => h("span", { class: "st" }, h("span", { class: "dot", data: { state: dot } }), text);
  const reason = { failed: state.status?.failed?.[model.id], never: model.reason }[where];
  const abilities = [model.parameters && words.parameters(model.parameters), ...(model.capabilities ?? []).map((name) => words.abilities[name])].filter(Boolean).join(" · ");
  const context = model.max_model_len ?? model.context_length;
  return h("tr", { data: { place: where } },
    h("td", {}, h("span", { class: "m" },
      h("b", { text: model.id, dir: "auto" }),
      model.description ? h("span", { text: model.description, dir: "auto" }) : null,
      abilities ? h("span", { class: "able", text: abilities }) : null,
      reason ? h("span", { class: "why", text: reason, dir: "auto" }) : null,
      h("span", { class: "narrow" }, standing()))),
    h("td", { class: "hide num", text: model.size_bytes ? bytes(model.size_bytes) : words.unknown }),
    h("td", { class: "hide num", text: context ? words.tokens(context) : words.unknown }),
    h("td", { class: "hide" }, standing()),
    h("td", { class: "act" }, h("span", { class: "acts2" }, ...actions(model, where))));
}

/** The section; `show()` draws what has changed. */
export function modelTable() {
  let filter = "";
  let showsAll = false;
  const body = h("tbody");
  const none = h("p", { class: "hint none", text: words.nothingFound, hidden: true });
  const more = h("button", { type: "button", class: "btn more", hidden: true, onclick: () => { showsAll = true; show(); body.querySelector("[data-place=away] button, [data-place=hub] button")?.focus(); } });
  const find = h("input", {
    type: "search", "aria-label": words.search, placeholder: words.search, autocomplete: "off",
    oninput: () => { filter = find.value.trim().toLowerCase(); show(); },
  });
  const head = h("thead", {}, h("tr", {},
    h("th", { scope: "col", text: words.model }), h("th", { scope: "col", class: "hide", text: words.size }),
    h("th", { scope: "col", class: "hide", text: words.contextHead }), h("th", { scope: "col", class: "hide", text: words.state }),
    h("th", { scope: "col" }, h("span", { class: "sr", text: words.action }))));
  const element = h("section", { class: "wrap", "aria-label": words.all },
    h("header", {}, h("h2", { text: words.all }), requestButton("models"), h("label", { class: "search" }, find)),
    h("table", { class: "mtable", "aria-label": words.title }, head, body), none, more);

  function matches(model) {
    const texts = [model.id, model.description, ...(model.capabilities ?? []).map((name) => words.abilities[name])];
    return texts.some((text) => text?.toLowerCase().includes(filter));
  }

  function show() {
    const listed = state.models.filter(matches).map((model) => [ORDER.indexOf(place(model)), model]);
    listed.sort(([one], [other]) => one - other);
    const isLong = listed.length > FEW && !showsAll && !filter;
    const rows = isLong ? listed.filter(([at]) => at < ORDER.indexOf("away")) : listed;
    more.hidden = !isLong;
    more.textContent = words.showMore(listed.length - rows.length);
    const shape = JSON.stringify([mayChange(), rows, state.status?.failed]);
    if (body.dataset.shape === shape) return;
    body.dataset.shape = shape;
    const focused = body.contains(document.activeElement) ? document.activeElement.dataset.of : null;
    body.replaceChildren(...rows.map(([, model]) => row(model)));
    none.hidden = listed.length > 0 || !state.models.length;
    if (focused) [...body.querySelectorAll("[data-of]")].find((each) => each.dataset.of === focused)?.focus();
  }
  return { element, show };
}
