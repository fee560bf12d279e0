// Why this token: what each token before it did for its prediction, by taking it away or by gradients.
import { askedOf, editsOf } from "../chat/changed.js";
import { button, h } from "../core/dom.js";
import { visible } from "../core/format.js";
import { requestButton } from "../shell/request_dialog.js";
import { inside } from "../words/inside.js";
import { rowList, section, write } from "./lists.js";
import { isResident, mayAsk } from "./model.js";
import { inspect, isGivenUp } from "./queue.js";
import { idsUpTo, isGiven, tokenAt } from "./tokens.js";

const ROWS = 10;
const kept = new WeakMap(); // node → Map of `position:method` → answer

/** The pane "Why"; `onScores(scores or null)` shades the tape by them. */
export function why(onScores) {
  const method = h("select", { class: "sel", "aria-label": inside.method }, ...Object.entries(inside.methods).map(([value, text]) => h("option", { value, text })));
  const { element, heading } = section(inside.why, "", method);
  const help = h("p", { class: "hint" });
  const asker = button(inside.askWhy, ask, { cls: "btn" });
  const target = h("p", { class: "readout", dir: "auto" });
  const list = rowList(inside.whyList, "scores", makeRow, fillRow);
  const message = h("p", { class: "hint", dir: "auto" });
  element.append(help, asker, target, list.element, message);
  heading.after(requestButton("why"));
  let current = null; // {node, position}
  let most = 1;

  const known = () => kept.get(current.node)?.get(`${current.position}:${method.value}`);

  function makeRow() {
    const row = { name: h("span", { class: "name", dir: "auto" }), place: h("small"), share: h("span", { class: "p" }) };
    row.element = h("li", {}, h("span", { class: "where" }, row.name, row.place), row.share);
    return row;
  }

  function fillRow(row, { position, score }) {
    row.element.style.setProperty("--w", ((100 * Math.abs(score)) / most).toFixed(1));
    row.element.dataset.sign = score < 0 ? "minus" : "plus";
    write(row.name, visible(tokenAt(current.node, position)?.text ?? ""));
    write(row.place, String(position));
    write(row.share, `${score < 0 ? "−" : "+"}${Math.abs(score).toFixed(2)}`);
    row.element.title = score < 0 ? inside.hurt : inside.helped;
  }

  function fill(answer) {
    const places = answer.scores.map((score, position) => ({ position, score })).filter(({ score }) => score !== null).sort((a, b) => Math.abs(b.score) - Math.abs(a.score)).slice(0, ROWS);
    most = Math.abs(places[0]?.score ?? 1) || 1;
    list.show(places);
    write(target, `${visible(answer.target.token)} · ${answer.unit}`);
    write(message, [answer.note, answer.convergence_delta === null ? "" : inside.whyNote(Math.abs(answer.convergence_delta).toFixed(2))].filter(Boolean).join(" "));
    asker.hidden = true;
    onScores(answer.scores);
  }

  async function ask() {
    const asked = current;
    const chosen = method.value;
    asker.disabled = true;
    write(message, inside.askingWhy);
    try {
      const body = { model: asked.node.model, ...editsOf(asked.node, asked.position), token_ids: idsUpTo(asked.node, asked.position), target_token_id: tokenAt(asked.node, asked.position).id, method: chosen };
      const answer = await inspect("why", "attribution", body);
      if (!kept.has(asked.node)) kept.set(asked.node, new Map());
      kept.get(asked.node).set(`${asked.position}:${chosen}`, answer);
      if (current === asked && method.value === chosen) fill(answer);
    } catch (failure) {
      if (current === asked) write(message, isGivenUp(failure) ? "" : failure.message);
    } finally {
      asker.disabled = false;
    }
  }

  function show(node, position) {
    if (current?.node !== node || current?.position !== position) current = { node, position };
    write(help, [inside.whyHelp[method.value], askedOf(node, position)].filter(Boolean).join(" "));
    const cannot = node.live ? inside.lensLater : isGiven(node, position) || position === 0 ? inside.whyGiven : !mayAsk(node) || !isResident(node) ? inside.rowGone : "";
    const answer = cannot ? null : known();
    asker.hidden = Boolean(cannot || answer);
    if (answer) return fill(answer);
    list.show([]);
    write(target, cannot ? "" : `${visible(tokenAt(node, position)?.text ?? "")}`);
    write(message, cannot);
    return onScores(null);
  }
  method.addEventListener("change", () => current && show(current.node, current.position));
  return { element, show };
}
