// Light, dark, or as the system has it. Canvases listen to "paint" of the document.
import { byId } from "../core/dom.js";
import { choice, keepChoice } from "../core/store.js";
import { common } from "../words/common.js";

const THEMES = ["system", "light", "dark"];
let theme = choice("theme", "system");

function dress() {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  byId("theme").setAttribute("aria-label", common.theme[theme]);
  document.dispatchEvent(new CustomEvent("paint"));
}

/** Call `listener` when colours have changed. */
export const onPaint = (listener) => document.addEventListener("paint", listener);

export function start() {
  if (!THEMES.includes(theme)) theme = "system";
  byId("theme").addEventListener("click", () => {
    theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
    keepChoice("theme", theme);
    dress();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", dress);
  dress();
}
