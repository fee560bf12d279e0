// What the page says beside its views: to a screen reader, in a box at the top, in a tip at the pointer.
import { common } from "../words/common.js";
import { byId, button, h } from "./dom.js";

let waiting = null;
let last = 0;

/** Say `text` in the one status line, at most twice a second; the newest wins. */
export function announce(text) {
  const said = byId("said");
  const show = () => {
    waiting = null;
    last = performance.now();
    if (said.textContent !== text) said.textContent = text;
  };
  clearTimeout(waiting);
  const left = 500 - (performance.now() - last);
  if (left <= 0) show();
  else waiting = setTimeout(show, left);
}

/** Show a box over the view until it is dismissed, or for `seconds`. Returns a function that removes it. */
export function notice(text, { kind = "error", actions = [], seconds = 0 } = {}) {
  const remove = () => box.remove();
  const box = h("div", { class: "alert", role: "alert", data: { kind } },
    h("span", { text, dir: "auto" }),
    ...actions.map(([label, run]) => button(label, () => { remove(); run(); }, { cls: "btn small" })),
    button(common.dismiss, remove, { cls: "icon", glyph: "x" }));
  byId("alerts").replaceChildren(box);
  if (seconds) setTimeout(remove, 1000 * seconds);
  return remove;
}

let tipped = null; // whose tip is shown

function hideTip() {
  tipped = null;
  byId("tip").hidden = true;
}

// Also where the element went from under the pointer.
document.addEventListener("pointerover", (event) => { if (tipped && !tipped.contains(event.target)) hideTip(); });
document.addEventListener("keydown", hideTip);
document.addEventListener("scroll", hideTip, { capture: true, passive: true });

/** Show a tip beside `element` while the mouse is over it; `text` may be a function of the event. */
export function tip(element, text) {
  const box = byId("tip");
  element.addEventListener("pointerenter", (event) => {
    if (event.pointerType !== "mouse") return;
    const words = typeof text === "function" ? text(event) : text;
    if (!words) return;
    box.textContent = words;
    box.hidden = false;
    tipped = element;
    const target = element.getBoundingClientRect();
    const left = target.left + target.width / 2 - box.offsetWidth / 2;
    const above = target.top - box.offsetHeight - 8;
    box.style.left = `${Math.max(8, Math.min(innerWidth - box.offsetWidth - 8, left))}px`;
    box.style.top = `${above < 4 ? target.bottom + 8 : above}px`;
  });
  element.addEventListener("pointerleave", hideTip);
  element.addEventListener("pointerdown", hideTip);
}
