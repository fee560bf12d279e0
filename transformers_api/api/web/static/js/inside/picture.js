// The tape as a picture: drawn again from the boxes of its tokens.
import { colour, save } from "../core/dom.js";
import { inside } from "../words/inside.js";

const MARGIN = 24;
const LINES = [0, 1.5, 3, 4.5, 6];

/** Offer a PNG of the tape as it stands there. */
export function savePicture(tape, name) {
  const base = tape.element.getBoundingClientRect();
  const ratio = 2;
  const canvas = document.createElement("canvas");
  canvas.width = Math.round((base.width + 2 * MARGIN) * ratio);
  canvas.height = Math.round(Math.min(8000, base.height + 2 * MARGIN) * ratio);
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  context.fillStyle = colour("--paper");
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.translate(MARGIN, MARGIN);
  const box = (rectangle) => [rectangle.left - base.left, rectangle.top - base.top, rectangle.width, rectangle.height];
  const ink = { text: colour("--ink"), hint: colour("--ink3"), accent: colour("--accent"), soft: colour("--accent-soft"), heat: colour("--heat"), arc: colour("--arc") };
  for (const word of tape.element.querySelectorAll(".tok .t")) drawWord(context, word, box, ink);
  for (const label of tape.element.querySelectorAll(".seg > .role, .tpl button, .tpl .share")) drawText(context, label, box(label.getBoundingClientRect()), ink.hint);
  context.strokeStyle = ink.arc;
  for (const path of tape.arcs.querySelectorAll("path")) {
    context.lineWidth = Number(path.getAttribute("stroke-width"));
    context.globalAlpha = Number(path.getAttribute("opacity"));
    context.stroke(new Path2D(path.getAttribute("d")));
  }
  canvas.toBlob((blob) => save(`${inside.fileName(name)}.png`, blob, "image/png"));
}

function drawWord(context, word, box, ink) {
  const [first] = word.getClientRects();
  if (!first?.width) return;
  const token = word.parentElement;
  const isPressed = token.getAttribute("aria-pressed") === "true";
  const [left, top, width, height] = box(first);
  context.globalAlpha = isPressed ? 1 : Number(token.style.getPropertyValue("--a") || 0) / 100;
  context.fillStyle = isPressed ? ink.soft : ink.heat;
  context.beginPath();
  context.roundRect(left, top, width, height, 6);
  context.fill();
  context.globalAlpha = 1;
  if (isPressed) {
    context.strokeStyle = ink.accent;
    context.lineWidth = 2;
    context.stroke();
  }
  drawText(context, word, [left, top, width, height], token.classList.contains("sp") ? ink.hint : ink.text);
  context.fillStyle = ink.accent;
  context.fillRect(left, top + height, width, LINES[token.dataset.s] ?? 0);
}

function drawText(context, element, [left, top, width, height], ink) {
  const style = getComputedStyle(element);
  context.font = `${style.fontWeight} ${style.fontSize} ${style.fontFamily}`;
  context.fillStyle = ink;
  context.letterSpacing = "0.01px"; // no ligatures: <|im_end|> would become a picture
  context.textBaseline = "middle";
  context.direction = style.direction;
  context.textAlign = "center";
  context.fillText(element.textContent, left + width / 2, top + height / 2, width);
}
