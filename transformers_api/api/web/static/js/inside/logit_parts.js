// Which part said it: the shares of the selected token's logit, each with a switch that takes the part away.
import { askedOf, editsOf } from "../chat/changed.js";
import { button, h } from "../core/dom.js";
import { visible } from "../core/format.js";
import { requestButton } from "../shell/request_dialog.js";
import { change as words } from "../words/change.js";
import { rowList, section, write } from "./lists.js";
import { isResident, mayAsk } from "./model.js";
import { inspect, isGivenUp } from "./queue.js";
import { idsUpTo, isGiven, tokenAt } from "./tokens.js";

const ROWS = 12;
const kept = new WeakMap(); // node → Map of `position:by` → answer

/** The edit that takes a part away; null where that is no edit. */
function without({ part, layer, head, neuron }) {
  if (part === "head" || part === "source") return { kind: "head", layer, head };
  if (part === "neuron") return { kind: "neuron", layer, neuron, size: 0 };
  return ["attn", "mlp"].includes(part) ? { kind: part, layer, size: 0 } : null;
}

const nameOf = (share) => (share.part === "edit" ? words.edited : words.share[share.part] ?? words.other)({ ...share, token: share.token && visible(share.token) });
const signed = (value) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(2)}`;

/** {element, show(node, position)}; `onOff(edit)` where a part is to be switched off. */
export function logitParts(onOff) {
  const by = h("select", { class: "sel", "aria-label": words.by }, ...Object.entries(words.bys).map(([value, text]) => h("option", { value, text })));
  const { element, heading } = section(words.parts, "", by);
  const asker = button(words.askParts, ask, { cls: "btn" });
  const target = h("p", { class: "readout", dir: "auto" });
  const list = rowList(words.partsList, "scores parts", makeRow, fillRow);
  const message = h("p", { class: "hint", dir: "auto" });
  const help = h("p", { class: "hint" });
  element.append(help, asker, target, list.element, message);
  heading.after(requestButton("parts"));
  let current = null; // {node, position}
  let most = 1;

  function makeRow() {
    const row = { name: h("span", { class: "name", dir: "auto" }), share: h("span", { class: "p" }), off: button(words.off, () => onOff(row.edit), { cls: "go" }) };
    row.element = h("li", {}, row.name, row.share, row.off);
    return row;
  }

  function fillRow(row, share) {
    row.edit = without(share);
    row.off.hidden = !row.edit;
    row.off.setAttribute("aria-label", words.switchOff(nameOf(share)));
    row.element.style.setProperty("--w", ((100 * Math.abs(share.value)) / most).toFixed(1));
    row.element.dataset.sign = share.value < 0 ? "minus" : "plus";
    write(row.name, nameOf(share));
    write(row.share, signed(share.value));
  }

  function fill(answer) {
    const shares = answer.parts.toSorted((a, b) => Math.abs(b.value) - Math.abs(a.value));
    most = Math.abs(shares[0]?.value ?? 1) || 1;
    list.show(shares);
    write(target, visible(answer.target.token));
    write(message, [words.sums(signed(answer.logit), signed(answer.rest)), answer.note].filter(Boolean).join(". "));
    asker.hidden = true;
  }

  async function ask() {
    const asked = current;
    const chosen = by.value;
    asker.disabled = true;
    write(message, words.asking);
    try {
      const { node, position } = asked;
      const body = { model: node.model, ...editsOf(node, position), token_ids: idsUpTo(node, position), token: tokenAt(node, position).id, against: "mean", by: chosen, topk: ROWS };
      const answer = await inspect("parts", "logit_parts", body);
      if (!kept.has(node)) kept.set(node, new Map());
      kept.get(node).set(`${position}:${chosen}`, answer);
      if (current === asked && by.value === chosen) fill(answer);
    } catch (failure) {
      if (current === asked) write(message, isGivenUp(failure) ? "" : failure.message);
    } finally {
      asker.disabled = false;
    }
  }

  function show(node, position) {
    if (current?.node !== node || current?.position !== position) current = { node, position };
    const cannot = node.live || !mayAsk(node) || !isResident(node) ? words.cannot : isGiven(node, position) || position === 0 ? words.given : "";
    const answer = cannot ? null : kept.get(node)?.get(`${position}:${by.value}`);
    asker.hidden = Boolean(cannot || answer);
    write(help, [words.partsHelp, askedOf(node, position)].filter(Boolean).join(" "));
    if (answer) return fill(answer);
    list.show([]);
    write(target, cannot ? "" : visible(tokenAt(node, position)?.text ?? ""));
    return write(message, cannot);
  }
  by.addEventListener("change", () => current && show(current.node, current.position));
  return { element, show };
}
