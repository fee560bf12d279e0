// Lists whose rows stay: rows that are there are written anew, so that a list that changes ten times a
// second costs no layout of new elements.
import { h } from "../core/dom.js";

/** A list `label`. `make()` gives a row {element, …}; `fill(row, item, index)` writes an item into it. */
export function rowList(label, cls, make, fill) {
  const rows = [];
  const element = h("ul", { class: cls, "aria-label": label });
  const show = (items) => {
    while (rows.length > items.length) rows.pop().element.remove();
    while (rows.length < items.length) {
      const row = make();
      rows.push(row);
      element.append(row.element);
    }
    items.forEach((item, index) => fill(rows[index], item, index));
    element.hidden = items.length === 0;
  };
  return { element, show, rows };
}

/** Write text only where it changes. */
export function write(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** A section of the panel with a heading and a note beside it. */
export function section(title, note = "", extra = null) {
  const heading = h("h3", { text: title });
  const more = h("p", { text: note });
  const header = h("header", {}, heading, more, extra);
  return { element: h("section", { class: "sec" }, header), heading, more };
}
