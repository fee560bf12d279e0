// One modal dialog at a time; the element closes itself on Escape and gives the focus back.
import { byId } from "../core/dom.js";

/** Open the dialog `name` with what `make(close)` returns. */
export function openDialog(name, make) {
  const dialog = byId("dialog");
  const close = () => dialog.close();
  if (dialog.open) close();
  dialog.setAttribute("aria-label", name);
  dialog.replaceChildren(make(close));
  dialog.showModal();
  dialog.scrollTop = 0;
  return dialog;
}

export const isDialogOpen = () => byId("dialog").open;

export function start() {
  const dialog = byId("dialog");
  dialog.addEventListener("pointerdown", (event) => { if (event.target === dialog) dialog.close(); });
  dialog.addEventListener("close", () => dialog.replaceChildren()); // a key that was typed goes, too
}
