// Formulas in TeX become MathML, by a library that is loaded when the first whole formula is there.
import DOMPurify from "../../vendor/purify.es.js";

const LONGEST = 4000; // letters of one formula
const BLOCK = /^(?:\$\$([^]+?)\$\$|\\\[([^]+?)\\\])(?:\n|$)/;
const INLINE = /^(?:\$\$([^$]+?)\$\$|\\\(([^]+?)\\\)|\\\[([^]+?)\\\]|\$(?![\s$])((?:[^$\\\n]|\\.)*?)(?<![\s\\])\$(?![\d$]))/;
let library = null;

function rule(name, level, start, pattern, escaped) {
  return {
    name,
    level,
    start: (source) => source.match(start)?.index,
    tokenizer(source) {
      const match = pattern.exec(source);
      const tex = match?.slice(1).find((part) => part !== undefined);
      return tex?.trim() ? { type: name, raw: match[0], tex, isDisplay: /^(?:\$\$|\\\[)/.test(match[0]) } : undefined;
    },
    renderer: ({ tex, isDisplay }) => `<span class="maths${isDisplay ? " display" : ""}">${escaped(tex)}</span>`,
  };
}

/** Rules of marked: $…$, $$…$$, \(…\) and \[…\]; amounts of money are none. */
export const mathsRules = (escaped) => [
  rule("mathsBlock", "block", /(?:^|\n)(?:\$\$|\\\[)/, BLOCK, escaped),
  rule("maths", "inline", /\$|\\[([]/, INLINE, escaped),
];

function load() {
  library ??= new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = new URL("../../vendor/temml.js", import.meta.url);
    script.addEventListener("load", () => resolve(globalThis.temml));
    script.addEventListener("error", reject);
    document.head.append(script);
  });
  return library;
}

/** Replace the formulas in `element`, which stand there as TeX, and stay so where they cannot be read. */
export async function mathsOf(element) {
  const formulas = element.querySelectorAll("span.maths");
  if (!formulas.length) return;
  const temml = await load().catch(() => null);
  if (!temml) return;
  for (const formula of formulas) {
    const tex = formula.textContent;
    if (tex.length > LONGEST) continue;
    try {
      const mathml = temml.renderToString(tex, { displayMode: formula.classList.contains("display"), trust: false, maxExpand: 200, maxSize: [20, 20], throwOnError: true });
      // Even reading a style attribute is against the page's policy.
      const fragment = DOMPurify.sanitize(mathml.replace(/ style="[^"]*"/g, ""), { USE_PROFILES: { mathMl: true }, FORBID_ATTR: ["href", "xlink:href", "style"], RETURN_DOM_FRAGMENT: true });
      formula.title = tex;
      formula.replaceChildren(fragment);
    } catch { /* no TeX that is understood: it stays as it was written */ }
  }
}
