// An answer that is finished, written once more: token by token, at a pace at which one can look.
import { button, h, icon } from "../core/dom.js";
import { inside } from "../words/inside.js";
import { write } from "./lists.js";

const PACE_MS = 450;

/** `onStep(step or null)`: the number of tokens that are shown, null for all. */
export class Replay {
  constructor(onStep) {
    this.onStep = onStep;
    this.timer = null;
    this.step = null; // null: the whole answer stands there
    this.count = 0;
    this.opener = button(inside.replay, () => this.begin(), { cls: "ghost", glyph: "go", shows: true, "aria-label": inside.replay, title: inside.replay });
    this.toggle = h("button", { type: "button", class: "icon", onclick: () => (this.timer ? this.pause() : this.play()) });
    this.slider = h("input", { type: "range", min: "1", "aria-label": inside.stepName, oninput: () => this.jump(Number(this.slider.value)) });
    this.text = h("output");
    this.bar = h("div", { class: "replay" }, this.toggle, this.slider, this.text, button(inside.endReplay, () => this.end(), { cls: "icon", glyph: "x" }));
    this.element = h("div", { class: "replaybox" }, this.opener, this.bar);
    this.show();
  }

  get isOn() {
    return this.step !== null;
  }

  /** The answer has so many tokens. */
  setCount(count) {
    if (count !== this.count) this.end();
    this.count = count;
    this.slider.max = String(count);
    this.element.hidden = count < 2;
  }

  begin() {
    this.go(1);
    this.play();
    this.toggle.focus();
  }

  play() {
    if (this.step >= this.count) this.go(1);
    this.timer = setInterval(() => (this.step < this.count ? this.go(this.step + 1) : this.pause()), PACE_MS);
    this.show();
  }

  pause() {
    clearInterval(this.timer);
    this.timer = null;
    this.show();
  }

  jump(step) {
    this.pause();
    this.go(step);
  }

  go(step) {
    this.step = step;
    this.show();
    this.onStep(step);
  }

  end() {
    if (!this.isOn) return;
    this.pause();
    this.step = null;
    this.show();
    this.onStep(null);
  }

  show() {
    this.opener.hidden = this.isOn;
    this.bar.hidden = !this.isOn;
    this.element.parentElement?.toggleAttribute("data-replay", this.isOn);
    const name = this.timer ? inside.pause : inside.replay;
    if (this.toggle.getAttribute("aria-label") !== name) {
      this.toggle.setAttribute("aria-label", name);
      this.toggle.replaceChildren(icon(this.timer ? "pause" : "go"));
    }
    if (!this.isOn) return;
    this.slider.value = String(this.step);
    write(this.text, inside.stepOf(this.step, this.count));
  }
}
