// The dialog that asks for an API key. It opens once after a refusal, and from the menu.
import { key } from "../core/api.js";
import { button, h } from "../core/dom.js";
import { on, state } from "../core/state.js";
import { retry } from "../core/status.js";
import { common } from "../words/common.js";
import { isDialogOpen, openDialog } from "./dialog.js";

export function askKey() {
  openDialog(common.keyTitle, (close) => {
    const secret = h("input", { type: "password", name: "key", autocomplete: "off", spellcheck: "false", dir: "ltr" });
    const remembers = h("input", { type: "checkbox" });
    const form = h("form", { method: "dialog" },
      h("h2", { text: common.keyTitle }), h("p", { text: key.get() && state.needsKey ? common.keyWrong : common.keyMore }),
      h("label", { class: "field" }, h("span", { text: common.keyTitle }), secret),
      h("label", { class: "check" }, remembers, h("span", { text: common.keyRemember })),
      h("div", { class: "row" }, button(common.cancel, close), h("button", { class: "btn pri", text: common.useKey })));
    form.addEventListener("submit", () => {
      key.set(secret.value.trim(), remembers.checked);
      retry();
    });
    return form;
  });
}

export const start = () => on("needsKey", (needs) => { if (needs && !isDialogOpen()) askKey(); });
