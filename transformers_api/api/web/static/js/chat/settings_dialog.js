// The dialog "Settings".
import { button, h } from "../core/dom.js";
import { set, state } from "../core/state.js";
import { keepChoice } from "../core/store.js";
import { openDialog } from "../shell/dialog.js";
import { chat } from "../words/chat.js";
import { fieldsOf, NUMBERS } from "./settings.js";

const words = chat.settings;

function field(name, label, hint, control) {
  control.name = name;
  control.value = state.settings[name] ?? "";
  return h("label", { class: "field" }, h("span", { text: label }), control, hint ? h("small", { text: hint }) : null);
}

const numbered = (name) => field(name, ...words[name], h("input", { type: "number", inputmode: "decimal", ...Object.fromEntries(Object.entries(NUMBERS[name]).map(([key, value]) => [key, String(value)])) }));

const area = (name, label, hint, attributes) => field(name, label, hint, h("textarea", { rows: "3", spellcheck: "false", ...attributes }));

function choosing() {
  const select = h("select", {}, ...words.thinksOptions.map(([value, text]) => h("option", { value, text })));
  return field("thinks", words.thinks, null, select);
}

function body(close) {
  const wrong = h("p", { class: "wrong", role: "alert", hidden: true });
  const more = h("details", { class: "more" }, h("summary", { text: words.more }),
    h("div", { class: "two" }, numbered("min_p"), numbered("repetition_penalty"), numbered("presence_penalty"), numbered("frequency_penalty")),
    area("stop", ...words.stop, { rows: "2", dir: "auto" }), choosing(),
    area("form", words.form, words.formHint, { class: "mono", placeholder: words.formExample, dir: "ltr" }),
    area("tools", words.tools, words.toolsHint, { class: "mono", placeholder: words.toolsExample, dir: "ltr" }));
  const form = h("form", { method: "dialog" }, h("h2", { text: words.title }),
    area("system", words.system, null, { placeholder: words.systemHint, dir: "auto", spellcheck: "true" }),
    h("div", { class: "two" }, numbered("temperature"), numbered("top_p"), numbered("max_tokens"), numbered("seed")),
    more, wrong,
    h("div", { class: "row end" }, button(words.reset, () => { for (const control of form.elements) if (control.name) control.value = ""; }), h("button", { class: "btn pri", text: words.done })));
  more.open = ["min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "stop", "thinks", "form", "tools"].some((name) => state.settings[name]);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const settings = Object.fromEntries([...form.elements].filter((control) => control.name).map((control) => [control.name, control.value]));
    try {
      fieldsOf(settings);
    } catch (error) {
      more.open = true;
      wrong.hidden = false;
      wrong.textContent = error.message;
      return;
    }
    keepChoice("settings", settings);
    set({ settings });
    close();
  });
  return form;
}

export const openSettings = () => openDialog(words.title, body);
