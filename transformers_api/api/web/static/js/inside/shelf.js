// The shelf: the edits as rows with a switch and a slider, what the server said of each, and the form that adds one.
import { button, copy, h } from "../core/dom.js";
import { announce } from "../core/notice.js";
import { change as words } from "../words/change.js";
import { editForm } from "./edit_form.js";
import { KINDS } from "./edit_kinds.js";
import { add, adopt, all, alter, fromLink, intervention, link, nameOf, refused, remove, saying } from "./edits.js";
import { section, write } from "./lists.js";

/** {element, draw(), add(edit), aim(node, position), refuse(failure)}; `onChange()` after every change of the edits. */
export function shelf(onChange) {
  const { element } = section(words.title);
  const list = h("ul", { class: "shelf", "aria-label": words.shelf });
  const none = h("p", { class: "hint", text: words.none });
  const came = h("p", { class: "hint strong", role: "status", text: fromLink ? words.fromLink(fromLink) : "" });
  const code = h("code");
  const source = h("details", { class: "source" }, h("summary", { text: words.json }), h("pre", { tabindex: "0", dir: "ltr" }, code));
  const linker = button(words.copyLink, () => copy(`${location.origin}${location.pathname}#inside${link()}`, linker, words.copied), { cls: "btn small" });
  const form = editForm(take);
  element.append(h("p", { class: "hint", text: words.help }), came, list, none, form.element, source, h("div", { class: "row" }, linker));
  const problems = new Map(); // edit → what the server said of it

  function row(edit) {
    const name = nameOf(edit);
    const text = h("span", { class: "name", text: saying(edit), dir: "auto" });
    const used = h("input", { type: "checkbox", "aria-label": words.isOn(name), checked: edit.isOn });
    used.addEventListener("change", () => { alter(edit, { isOn: used.checked }); problems.delete(edit); changed(); });
    const { range } = KINDS[edit.kind];
    const slider = range && h("input", { type: "range", "aria-label": words.size(name), min: range.min, max: range.max, step: range.step, value: edit.size });
    slider?.addEventListener("input", () => {
      alter(edit, { size: Number(slider.value) });
      text.textContent = saying(edit);
      changed(false);
    });
    const removing = button(words.remove(name), () => { remove(edit); problems.delete(edit); changed(); }, { cls: "icon", glyph: "x" });
    const problem = problems.has(edit) ? h("p", { class: "problem", role: "alert", text: problems.get(edit), dir: "auto" }) : null;
    return h("li", { class: [edit.isOn ? "" : "unused", slider ? "" : "plain"].join(" ").trim() }, used, text, slider, removing, problem);
  }

  function draw() {
    form.draw();
    none.hidden = all().length > 0;
    source.hidden = !intervention();
    linker.parentElement.hidden = !link();
    code.textContent = JSON.stringify({ intervene: intervention() }, null, 2);
  }

  function changed(redraws = true) {
    if (redraws) list.replaceChildren(...all().map(row));
    draw();
    onChange();
  }

  function take(edit) {
    const isThere = add(edit);
    write(came, isThere ? "" : words.noEdit);
    if (isThere) announce(words.onShelf(nameOf(edit)));
    changed();
  }

  /** Show a refusal beside the edit that it names; false where it names none. */
  function refuse(failure) {
    problems.clear();
    const edit = failure ? refused(failure) : null;
    if (edit) problems.set(edit, failure.message);
    list.replaceChildren(...all().map(row));
    return Boolean(edit);
  }

  addEventListener("hashchange", () => {
    const count = adopt();
    if (!count) return;
    write(came, words.fromLink(count));
    changed();
  });
  list.replaceChildren(...all().map(row));
  draw();
  return { element, draw, add: take, aim: form.aim, refuse };
}
