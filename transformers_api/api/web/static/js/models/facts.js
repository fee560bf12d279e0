// Pairs of a name and a value, and gauges: made once, changed in place, so that nothing jumps or loses the focus.
import { h } from "../core/dom.js";

/** A list of facts; `show([[name, value], …])` changes it. */
export function facts() {
  const element = h("dl", { class: "kv" });
  const show = (pairs) => {
    const names = pairs.map(([name]) => name).join("\n");
    if (element.dataset.names !== names) {
      element.dataset.names = names;
      element.replaceChildren(...pairs.flatMap(([name]) => [h("dt", { text: name }), h("dd")]));
    }
    const places = element.querySelectorAll("dd");
    pairs.forEach(([, value], at) => write(places[at], value));
  };
  return { element, show };
}

/** Set the text of `element` where it is another one. */
export function write(element, text) {
  if (element.textContent !== String(text)) element.textContent = text;
}

/** A bar of shares; `show({value, name, parts: [[kind, share, words]]})`. A part of kind null has no colour. */
export function gauge(label, kinds) {
  const value = h("b");
  const bars = kinds.map((kind) => h("i", { class: kind }));
  const legend = kinds.map((kind) => [h("i", { class: kind }), h("span")]);
  const meter = h("div", { class: "meter", role: "img", "aria-label": label }, ...bars);
  const element = h("div", { class: "gauge" },
    h("div", { class: "lab" }, h("span", { text: label }), value), meter,
    h("div", { class: "legend" }, ...legend.map(([mark, words]) => h("span", {}, mark, words))));
  const show = ({ value: text, name, parts }) => {
    write(value, text);
    meter.setAttribute("aria-label", name);
    parts.forEach(([share, words], at) => {
      bars[at].style.width = `${100 * Math.max(share > 0 ? 0.008 : 0, Math.min(1, share))}%`;
      write(legend[at][1], words);
    });
  };
  return { element, show };
}

/** A bar of progress named `name`; `show(share)`: 0 or less is not known. */
export function progress(name) {
  const bar = h("i");
  const element = h("div", { class: "prog", role: "progressbar", "aria-label": name, "aria-valuemin": "0", "aria-valuemax": "100" }, bar);
  const show = (share) => {
    const isUnknown = !(share > 0);
    element.classList.toggle("any", isUnknown);
    if (isUnknown) element.removeAttribute("aria-valuenow");
    else element.setAttribute("aria-valuenow", String(Math.round(100 * share)));
    bar.style.width = isUnknown ? "" : `${100 * share}%`;
  };
  return { element, show };
}
