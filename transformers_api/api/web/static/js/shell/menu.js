// The menu "More", as in the ARIA pattern. Entries are [label, action] or null for a line.
import { byId, h } from "../core/dom.js";

/** Make `opener` open a menu beside itself; `entries()` is asked each time. Returns a function that opens it at
 *  a place {left, right, top, bottom}, from an element that gets the focus back. */
export function menu(opener, entries) {
  const pop = byId("pop");
  let origin = opener;
  const isOurs = () => pop.dataset.of === opener.id;
  const close = ({ focus = false } = {}) => {
    if (pop.hidden || !isOurs()) return;
    pop.hidden = true;
    opener.setAttribute("aria-expanded", "false");
    if (focus) origin.focus();
  };
  const item = ([label, act]) => h("button", {
    type: "button", role: "menuitem", tabindex: "-1", text: label,
    onclick: () => { close({ focus: true }); act(); },
  });
  const open = (place = opener.getBoundingClientRect(), from = opener) => {
    origin = from;
    pop.dataset.of = opener.id;
    pop.setAttribute("aria-label", opener.getAttribute("aria-label"));
    pop.replaceChildren(...entries().map((entry) => (entry ? item(entry) : h("hr"))));
    pop.hidden = false;
    opener.setAttribute("aria-expanded", "true");
    const fits = place.bottom + 6 + pop.offsetHeight < innerHeight;
    pop.style.top = `${fits ? place.bottom + 6 : Math.max(8, place.top - 6 - pop.offsetHeight)}px`;
    pop.style.left = `${Math.max(8, Math.min(innerWidth - pop.offsetWidth - 8, place.right - pop.offsetWidth))}px`;
    pop.querySelector("[role=menuitem]").focus();
  };
  opener.addEventListener("click", () => (pop.hidden || !isOurs() ? open() : close()));
  document.addEventListener("pointerdown", (event) => { if (!pop.contains(event.target) && !opener.contains(event.target)) close(); }, true);
  pop.addEventListener("focusout", (event) => { if (event.relatedTarget && !pop.contains(event.relatedTarget) && event.relatedTarget !== opener) close(); });
  pop.addEventListener("keydown", (event) => {
    if (!isOurs()) return;
    const items = [...pop.querySelectorAll("[role=menuitem]")];
    const at = items.indexOf(document.activeElement);
    const next = { ArrowDown: at + 1, ArrowUp: at - 1 + items.length, Home: 0, End: items.length - 1 }[event.key];
    if (next !== undefined) {
      event.preventDefault();
      items[next % items.length].focus();
    } else if (event.key === "Escape") {
      event.preventDefault();
      close({ focus: true });
    } else if (event.key === "Tab") close();
    else if (event.key.length === 1) items.find((entry) => entry.textContent.toLowerCase().startsWith(event.key.toLowerCase()))?.focus();
  });
  return open;
}
