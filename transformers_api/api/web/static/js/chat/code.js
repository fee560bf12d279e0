// A block of code: its language, a button that copies it, colours once it is whole.
import DOMPurify from "../../vendor/purify.es.js";
import { button, copy, h } from "../core/dom.js";
import { chat as words } from "../words/chat.js";

const LANGUAGES = new Set(["bash", "cpp", "css", "go", "java", "javascript", "json", "markdown", "python", "rust", "sql", "xml"]);
const ALIASES = {
  "c++": "cpp", c: "cpp", h: "cpp", html: "xml", js: "javascript", jsx: "javascript", md: "markdown", py: "python", python3: "python",
  rs: "rust", sh: "bash", shell: "bash", svg: "xml", ts: "javascript", tsx: "javascript", typescript: "javascript", zsh: "bash",
};
const LONGEST = 100_000; // letters that are coloured

/** Colour `code`, with a library that is loaded when the first block needs it. */
async function paint(code, language) {
  if (!LANGUAGES.has(language) || code.textContent.length > LONGEST) return;
  try {
    const [{ default: hljs }, { default: grammar }] = await Promise.all([import("../../vendor/hljs-core.js"), import(`../../vendor/hljs-${language}.js`)]);
    if (!hljs.getLanguage(language)) hljs.registerLanguage(language, grammar);
    const html = hljs.highlight(code.textContent, { language }).value;
    code.replaceChildren(DOMPurify.sanitize(html, { ALLOWED_TAGS: ["span"], ALLOWED_ATTR: ["class"], RETURN_DOM_FRAGMENT: true }));
  } catch { /* the server has other files by now: it stays without colours */ }
}

/** The element of a code token of marked; `isWhole` where no more will come. */
export function codeBlock(token, isWhole) {
  const named = (token.lang ?? "").trim().split(/\s/)[0].toLowerCase();
  const code = h("code", { text: token.text });
  const copying = button(words.copyCode, () => copy(code.textContent, copying, words.copied), { cls: "copy", glyph: "copy" });
  const figure = h("figure", { class: "code", dir: "ltr" },
    h("header", {}, h("span", { text: named || words.plainText }), copying),
    h("pre", { tabindex: "0" }, code));
  if (isWhole) paint(code, ALIASES[named] ?? named);
  return figure;
}

/** Write the longer text of the same block into its element; false where it is not the same. */
export function growCode(figure, before, token) {
  if (before.type !== "code" || token.type !== "code" || before.lang !== token.lang || !token.text.startsWith(before.text)) return false;
  const code = figure.querySelector("code");
  if (code.firstChild?.nodeType === Node.TEXT_NODE) code.firstChild.appendData(token.text.slice(before.text.length));
  else code.textContent = token.text;
  return true;
}
