// A model's Markdown: marked splits it into blocks, DOMPurify has the last word, only the last blocks are drawn again.
import { marked } from "../../vendor/marked.esm.js";
import DOMPurify from "../../vendor/purify.es.js";
import { h } from "../core/dom.js";
import { chat as words } from "../words/chat.js";
import { codeBlock, growCode } from "./code.js";
import { mathsOf, mathsRules } from "./maths.js";

const OPEN_BLOCKS = 2; // at the end, which what comes may still change
const LONG_MS = 30; // for drawing once, after which it rests
const REST = 5;
const FIRST_HEADING = 3; // the page's own are above
const RULES = {
  ALLOWED_TAGS: [
    "a", "blockquote", "br", "code", "del", "em", "h3", "h4", "h5", "h6", "hr", "input", "li", "ol", "p", "pre", "span", "strong",
    "table", "tbody", "td", "th", "thead", "tr", "ul",
  ],
  ALLOWED_ATTR: ["align", "checked", "class", "disabled", "href", "start", "type"],
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  ADD_URI_SAFE_ATTR: ["align", "checked", "disabled", "start", "type"],
  RETURN_DOM_FRAGMENT: true,
};
const escaped = (text) => text.replace(/[&<>"']/g, (letter) => `&#${letter.charCodeAt(0)};`);

marked.use({
  gfm: true,
  breaks: true,
  extensions: mathsRules(escaped),
  renderer: {
    html: ({ text }) => escaped(text), // what a model wrote is shown, never run
    image: ({ href, text }) => `<a href="${escaped(href)}">${escaped(text || words.image)}</a>`, // no picture is ever fetched
    heading({ tokens, depth }) {
      const level = Math.min(depth + FIRST_HEADING - 1, 6);
      return `<h${level}>${this.parser.parseInline(tokens)}</h${level}>`;
    },
  },
});

DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (node.tagName === "A") {
    node.target = "_blank";
    node.rel = "noopener noreferrer nofollow";
  } else if (node.tagName === "INPUT") {
    if (node.type !== "checkbox") node.remove();
    else {
      node.disabled = true;
      node.setAttribute("aria-label", words.task);
    }
  }
  const isOurs = node.tagName === "SPAN" || node.tagName === "CODE";
  if (!isOurs && node.hasAttribute?.("class")) node.removeAttribute("class");
});

function wrapped(fragment) {
  const nodes = [...fragment.childNodes].filter((node) => node.nodeType === Node.ELEMENT_NODE || node.textContent.trim());
  const [only] = nodes;
  const element = nodes.length === 1 && only.nodeType === Node.ELEMENT_NODE && only.tagName !== "SPAN" ? only : h("p", {}, ...nodes);
  if (element.tagName !== "TABLE") return element;
  return h("div", { class: "table", tabindex: "0" }, element);
}

const plain = (text) => h("p", { class: "plain", text });

function drawn(token, isWhole) {
  if (token.type === "code") return codeBlock(token, isWhole);
  if (token.type === "plain") return plain(token.raw);
  let element;
  try {
    element = wrapped(DOMPurify.sanitize(marked.parser([token]), RULES));
  } catch { // too deep, as below
    return plain(token.raw);
  }
  if (isWhole) mathsOf(element);
  return element;
}

/** The blocks of a text; one of plain text where lists or quotes are deeper than the stack. */
function lexed(text) {
  try {
    return marked.lexer(text).filter((token) => token.type !== "space" && token.type !== "def");
  } catch {
    return [{ type: "plain", raw: text }];
  }
}

/** A text that grows, and its blocks as elements in `box`. */
export class Markdown {
  constructor(box) {
    this.box = box;
    this.blocks = []; // {token, element, isWhole}
    this.settled = 0; // letters of the text before the block `first`, which will not change
    this.first = 0;
    this.text = "";
    this.rests = 0; // the time before which what grows is not drawn again
  }

  /** Draw `text`; `live` where more will come, of which some is left to the next time if it takes long. */
  draw(text, { live = false } = {}) {
    const begun = performance.now();
    if (live && begun < this.rests) return;
    const grows = live && text.startsWith(this.text) && this.blocks.length > 0;
    if (!grows) this.settled = this.first = 0;
    const { first: from, settled: start } = this;
    const tokens = lexed(text.slice(start));
    tokens.forEach((token, i) => this.place(from + i, token, !live || i < tokens.length - 1));
    for (const gone of this.blocks.splice(from + tokens.length)) gone.element.remove();
    this.text = text;
    this.settle(text, tokens, from, start);
    const took = performance.now() - begun;
    this.rests = took > LONG_MS ? begun + took * REST : 0;
  }

  /** The last two blocks may become one: "2" after a list is a paragraph, "2. b" is the list's. */
  settle(text, tokens, from, start) {
    if (tokens.length <= OPEN_BLOCKS) return;
    let end = text.length;
    for (const token of tokens.slice(-OPEN_BLOCKS).reverse()) {
      end = text.lastIndexOf(token.raw, end - token.raw.length);
      if (end < start) return; // marked reads it with other white space than it was written
    }
    this.settled = end;
    this.first = from + tokens.length - OPEN_BLOCKS;
  }

  place(index, token, isWhole) {
    const old = this.blocks[index];
    if (old && old.token.raw === token.raw && old.isWhole === isWhole) return;
    if (old && !isWhole && growCode(old.element, old.token, token)) {
      old.token = token;
      return;
    }
    const element = drawn(token, isWhole);
    if (old) old.element.replaceWith(element);
    else this.box.append(element);
    this.blocks[index] = { token, element, isWhole };
  }

  /** The element of the last block, which carries the caret. */
  get last() {
    return this.blocks.at(-1)?.element ?? null;
  }
}
