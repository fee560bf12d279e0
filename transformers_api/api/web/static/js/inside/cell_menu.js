// The menu of a cell of a canvas: what can be done to the part of the model that it shows. A button opens it, a
// right click, and the keys that open menus.
import { button } from "../core/dom.js";
import { menu } from "../shell/menu.js";
import { change as words } from "../words/change.js";

/** The button of the menu of `canvas`'s cells; `point(event)` moves to the cell of a right click, false where there is
 *  none, `place()` is the box of the cell that is pointed at, `entries()` what can be done with it. */
export function cellMenu(canvas, id, { point, place, entries }) {
  const opener = button(words.cellMenu, null, { cls: "btn small", id, "aria-haspopup": "menu", "aria-expanded": "false", "aria-label": words.cellMenu });
  const open = menu(opener, entries);
  canvas.addEventListener("contextmenu", (event) => {
    event.preventDefault();
    if (point(event)) open({ left: event.clientX, right: event.clientX, top: event.clientY, bottom: event.clientY }, canvas);
  });
  canvas.addEventListener("keydown", (event) => {
    if (event.key !== "ContextMenu" && !(event.key === "F10" && event.shiftKey)) return;
    event.preventDefault();
    event.stopPropagation();
    open(place(), canvas);
  });
  return opener;
}
