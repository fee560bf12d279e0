// Elements without innerHTML, and icons.
const NS = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

/** A new element. Props: `text`, `data` (dataset), `vars` (custom properties), `onclick` and so on
 *  (listeners), objects and booleans as properties, strings as attributes; null and false are left out. */
export function h(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "vars") for (const [key, text] of Object.entries(value)) element.style.setProperty(key, text);
    else if (name === "data") Object.assign(element.dataset, value);
    else if (name === "text") element.textContent = value;
    else if (name in element && typeof value !== "string") element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export function svg(tag, attributes = {}) {
  const element = document.createElementNS(NS, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

const PATHS = {
  again: "M16 10a6 6 0 1 1-2-4.5M16 3v3.500h-3.500",
  braces: "M8 4c-2 0-2 1-2 2.500S6 9.500 4 10c2 .5 2 2 2 3.500S6 16 8 16M12 4c2 0 2 1 2 2.500s0 3 2 3.500c-2 .5-2 2-2 3.500S14 16 12 16",
  columns: "M3 4h6v12H3zM11 4h6v12h-6z",
  copy: "M7 7h9v9H7zM4 13V4h9",
  down: "M10 4v11M5 10l5 5 5-5",
  download: "M10 3v9M6 9l4 4 4-4M4 16h12",
  expand: "M4 8V4h4M16 8V4h-4M4 12v4h4M16 12v4h-4",
  eye: "M2 10s3-5 8-5 8 5 8 5-3 5-8 5-8-5-8-5zM10 8a2 2 0 1 1 0 4 2 2 0 0 1 0-4z",
  fork: "M6 6v8M14 7c0 4-8 2-8 6M4.500 4.500a1.500 1.500 0 1 0 3 0 1.500 1.500 0 1 0-3 0M4.500 15.500a1.500 1.500 0 1 0 3 0 1.500 1.500 0 1 0-3 0M12.500 5.500a1.500 1.500 0 1 0 3 0 1.500 1.500 0 1 0-3 0",
  go: "M7 4l7 6-7 6z",
  left: "M12 5l-5 5 5 5",
  live: "M10 7a3 3 0 1 1 0 6 3 3 0 0 1 0-6zM4 4a8 8 0 0 0 0 12M16 4a8 8 0 0 1 0 12",
  more: "M4 10h.01M10 10h.01M16 10h.01",
  pause: "M7 5v10M13 5v10",
  pen: "M4 16l1-4 8-8 3 3-8 8zM11 6l3 3",
  plus: "M10 4v12M4 10h12",
  right: "M8 5l5 5-5 5",
  shield: "M10 2l6 2v5c0 4-3 7-6 9-3-2-6-5-6-9V4zM7 10l2 2 4-4",
  tick: "M4 10.500l4 4 8-9",
  tool: "M12.500 3.500a4 4 0 0 0-4.500 5.500L3 14l3 3 5-5a4 4 0 0 0 5.500-4.500L14 10l-4-4z",
  trash: "M4 6h12M8 6V4h4v2M6 6l1 10h6l1-10",
  x: "M5 5l10 10M15 5L5 15",
};

/** An icon of 20 x 20, which says nothing to a screen reader. */
export function icon(name, cls = null) {
  const element = svg("svg", { viewBox: "0 0 20 20", "aria-hidden": "true", ...(cls ? { class: cls } : {}) });
  element.append(svg("path", { d: PATHS[name] }));
  return element;
}

/** A button of text, or of an icon with a name for those who do not see it. */
export function button(label, onclick, { cls = "btn", glyph = null, shows = !glyph, ...more } = {}) {
  const children = [glyph ? icon(glyph) : null, shows ? h("span", { text: label }) : null];
  return h("button", { type: "button", class: cls, onclick, ...(shows ? {} : { "aria-label": label, title: label }), ...more }, ...children);
}

/** Offer `text` as a file. */
export function save(name, text, type) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** Let the user choose one file; its text, or null. */
export function chooseFile(accept) {
  return new Promise((resolve) => {
    const input = h("input", { type: "file", accept });
    input.addEventListener("change", async () => resolve(input.files[0] ? await input.files[0].text() : null));
    input.addEventListener("cancel", () => resolve(null));
    input.click();
  });
}

/** Copy `text`, and say so on the button for a moment. */
export async function copy(text, pressed = null, word = null) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = h("textarea", { class: "sr" });
    area.value = text;
    (pressed?.closest("dialog") ?? document.body).append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  if (!pressed || !word) return;
  pressed.dataset.done = word;
  setTimeout(() => delete pressed.dataset.done, 1500);
}

/** The computed colour of a custom property, for canvases. */
export function colour(name) {
  const probe = h("i");
  probe.style.color = `var(${name})`;
  document.body.append(probe);
  const value = getComputedStyle(probe).color;
  probe.remove();
  return value;
}
