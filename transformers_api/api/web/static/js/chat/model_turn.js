// What the model wrote: thoughts, Markdown, calls, ribbon, statistics, and what can be done with it.
import { button, copy, h, icon } from "../core/dom.js";
import { tip } from "../core/notice.js";
import { remember } from "../core/request.js";
import { set, state } from "../core/state.js";
import { showRequest } from "../shell/request_dialog.js";
import { show } from "../shell/views.js";
import { chat as words } from "../words/chat.js";
import { callCards } from "./calls.js";
import { changedPill } from "./changed.js";
import { splitChat } from "./chats.js";
import { failure } from "./failure.js";
import { Markdown } from "./markdown.js";
import { drawRibbon, tokenAt } from "./ribbon.js";
import { again, requestOf, resume } from "./run.js";
import { statistics } from "./statistics.js";
import { versionGroup } from "./versions.js";
import { waitingLine } from "./waiting.js";

const RIBBON_EVERY_MS = 50;

const hasSurprisal = (node) => Boolean(node.tokens?.some((token) => token.surprisal !== null && token.surprisal !== undefined));

function look(node, index) {
  const token = node.tokens[index];
  if (token) set({ selection: { node, position: token.position }, isPinned: true });
  show("inside", { focus: true });
}

function showAsked(node) {
  remember("answer", requestOf(state.chat, node));
  showRequest("answer");
}

function endLine(node) {
  if (node.live || node.error) return null;
  if (node.finish === "length") return h("p", { class: "cut" }, h("span", { text: words.cut }),
    node.calls?.length ? null : button(words.goOn, () => resume(node), { cls: "link" }));
  if (node.finish === "stopped") return h("p", { class: "cut", text: words.stopped });
  return node.finish ? null : h("p", { class: "cut", text: words.unfinished });
}

function thoughts(node) {
  if (!node.reasoning) return null;
  const isThinking = node.live && !node.text;
  return h("details", { class: "thought" },
    h("summary", {}, h("span", { text: isThinking ? words.thinking : words.thought(node.thought) })),
    h("div", { class: "thinking", dir: "auto", text: node.reasoning }));
}

/** One model turn: its article, drawn once, and what changes while it is written. */
export class ModelTurn {
  constructor(node, { isLast, awaitsResults }) {
    this.node = node;
    this.prose = h("div", { class: "prose", dir: "auto" });
    this.markdown = new Markdown(this.prose);
    this.canvas = h("canvas", { "aria-hidden": "true" });
    this.ribbon = h("button", { type: "button", class: "ribbon", onclick: (event) => this.lookAt(event) }, this.canvas);
    this.thoughts = thoughts(node);
    this.calls = h("div", { class: "calls" });
    this.waiting = node.live === "wait" ? waitingLine() : null;
    this.ribbonDrawn = 0;
    this.ribbonShows = 0; // tokens
    this.isDrawn = false;
    tip(this.ribbon, words.ribbonTip);
    this.drawCalls(awaitsResults);
    this.nameRibbon();
    this.element = h("article", { class: `msg bot${isLast ? " last" : ""}`, "aria-label": words.model, "aria-busy": node.live ? "true" : null, data: { node: node.id } },
      h("div", { class: "who" }, h("b", { text: node.model ?? "", dir: "auto" }), node.branched ? h("span", { class: "pill", text: words.branch }) : null, changedPill(node)),
      this.waiting, this.thoughts, this.prose, this.calls, node.error ? failure(node, again) : null, this.ribbon, endLine(node),
      node.blind && !node.live && !hasSurprisal(node) ? h("p", { class: "hint", text: words.blind(node.blind) }) : null,
      node.live ? null : this.actions(Boolean(node.error) && !node.text));
  }

  /** The line below; of an answer that failed before its first word only the versions. */
  actions(isNothing) {
    const { node } = this;
    if (isNothing) return h("div", { class: "under" }, versionGroup(node));
    const copying = button(words.copy, () => copy(node.text, copying, words.copied), { cls: "icon", glyph: "copy" });
    return h("div", { class: "under" }, versionGroup(node),
      node.tokens?.length ? h("div", { class: "acts always" }, h("button", { type: "button", class: "look", onclick: () => look(node, 0) }, icon("eye"), h("span", { text: words.lookInside }))) : null,
      statistics(node),
      h("div", { class: "acts end" }, node.text ? copying : null,
        button(words.fromHere, () => splitChat(node), { cls: "icon", glyph: "fork", disabled: Boolean(state.writing) }),
        node.asked ? button(words.showRequest, () => showAsked(node), { cls: "icon", glyph: "braces" }) : null,
        button(words.regenerate, () => again(node), { cls: "icon", glyph: "again", disabled: Boolean(state.writing) })));
  }

  lookAt(event) {
    const { tokens } = this.node;
    const width = this.canvas.clientWidth;
    const isRtl = getComputedStyle(this.canvas).direction === "rtl";
    const x = isRtl ? width - event.offsetX : event.offsetX;
    look(this.node, event.detail ? tokenAt(x, tokens.length, width) : 0);
  }

  nameRibbon() {
    this.ribbon.hidden = !hasSurprisal(this.node);
    this.ribbon.setAttribute("aria-label", words.ribbon(this.node.tokens?.length ?? 0));
  }

  drawCalls(awaitsResults) {
    if (this.node.calls?.length) this.calls.replaceChildren(...callCards(this.node, awaitsResults));
  }

  /** Until the reader comes near, an old answer is its plain text, which is found by a search and as high. */
  drawPlain() {
    if (this.isDrawn) return;
    this.prose.textContent = this.node.text;
    this.prose.classList.add("plain");
  }

  drawWhole() {
    if (this.isDrawn) return;
    this.isDrawn = true;
    if (this.prose.classList.contains("plain")) {
      this.prose.classList.remove("plain");
      this.prose.replaceChildren();
    }
    this.markdown.draw(this.node.text, { live: Boolean(this.node.live) });
    this.drawRibbon();
  }

  drawRibbon() {
    drawRibbon(this.canvas, this.node.tokens ?? [], { newest: Boolean(this.node.live) });
    this.ribbonDrawn = performance.now();
    this.ribbonShows = this.node.tokens?.length;
  }

  /** Draw what has come since the last frame; true where some of it is left to the next. */
  grow() {
    const { node } = this;
    this.isDrawn = true;
    this.markdown.last?.classList.remove("caret");
    this.markdown.draw(node.text, { live: true });
    this.markdown.last?.classList.add("caret");
    if (node.reasoning && !this.thoughts) {
      this.thoughts = thoughts(node);
      this.prose.before(this.thoughts);
    } else if (this.thoughts) {
      this.thoughts.lastChild.textContent = node.reasoning;
      if (node.text) this.thoughts.firstChild.textContent = words.thought(node.thought);
    }
    this.drawCalls(false);
    if (this.ribbonShows !== node.tokens?.length && performance.now() - this.ribbonDrawn >= RIBBON_EVERY_MS) {
      this.nameRibbon();
      this.drawRibbon();
    }
    return this.markdown.text !== node.text || this.ribbonShows !== node.tokens?.length;
  }
}

