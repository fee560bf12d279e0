// A grid of layers and places as a picture: brighter is more of the other text's answer. Arrows move, Enter and a
// click choose.
import { colour, h } from "../core/dom.js";
import { announce } from "../core/notice.js";
import { write } from "./lists.js";
import { cividis, pen } from "./palette.js";

const LEFT = 30; // px for the layers' numbers
const BELOW = 78; // px for the tokens
const LETTERS = 11;
const WIDEST = 44; // px of a cell

export class GridPicture {
  /** `onChoose(cell)`, `say(cell)`: its sentence; a cell is {layer, place, value}. */
  constructor({ label, onChoose, say }) {
    this.say = say;
    this.data = null; // {layers, places, cells, names}
    this.at = { row: 0, column: 0 };
    this.canvas = h("canvas", { role: "img", tabindex: "0", class: "headgrid", "aria-label": label });
    this.readOut = h("p", { class: "readout", dir: "auto" });
    this.element = h("div", { hidden: true }, this.canvas, this.readOut);
    this.canvas.addEventListener("pointermove", (event) => this.pointed(event));
    this.canvas.addEventListener("click", (event) => { if (this.pointed(event)) onChoose(this.cell()); });
    this.canvas.addEventListener("keydown", (event) => {
      const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      if (!this.data || (!step && event.key !== "Enter" && event.key !== " ")) return;
      event.preventDefault();
      event.stopPropagation();
      if (!step) onChoose(this.cell());
      else this.move(this.at.row + step[0], this.at.column + step[1], true);
    });
  }

  cell() {
    const { row, column } = this.at;
    const { layers, places, cells } = this.data;
    return { layer: layers[row], place: places[column], value: cells[row]?.[column] ?? null };
  }

  /** Move to the cell below the pointer; false where there is none. */
  pointed(event) {
    if (!this.data) return false;
    const box = this.canvas.getBoundingClientRect();
    const row = Math.floor((event.clientY - box.top) / this.high);
    const column = Math.floor((event.clientX - box.left - LEFT) / this.wide);
    if (row < 0 || column < 0 || row >= this.data.layers.length || column >= this.data.places.length) return false;
    this.move(row, column);
    return true;
  }

  move(row, column, isSpoken = false) {
    const { layers, places } = this.data;
    this.at = { row: Math.max(0, Math.min(layers.length - 1, row)), column: Math.max(0, Math.min(places.length - 1, column)) };
    this.paint();
    if (isSpoken) announce(this.readOut.textContent);
  }

  show(data) {
    const isNew = !this.data || String(this.data.places) !== String(data.places) || String(this.data.layers) !== String(data.layers);
    this.data = data;
    if (isNew) this.at = { row: 0, column: 0 };
    this.paint();
  }

  paint() {
    const { layers, places, cells, names } = this.data;
    const width = Math.max(160, this.element.clientWidth);
    this.wide = Math.min(WIDEST, (width - LEFT) / places.length);
    this.high = Math.max(9, Math.min(20, 360 / layers.length));
    const bottom = layers.length * this.high;
    const context = pen(this.canvas, LEFT + this.wide * places.length, bottom + BELOW);
    const [ink, empty] = [colour("--ink3"), colour("--line")];
    context.font = `10.5px ${getComputedStyle(document.body).fontFamily}`;
    context.textBaseline = "middle";
    layers.forEach((layer, row) => {
      context.fillStyle = ink;
      context.textAlign = "right";
      if (this.high >= 12 || row % 3 === 0) context.fillText(String(layer), LEFT - 7, (row + 0.5) * this.high);
      places.forEach((_, column) => {
        const value = cells[row]?.[column] ?? null;
        context.fillStyle = value === null ? empty : `rgb(${cividis(Math.max(0, Math.min(1, value))).join()})`;
        context.fillRect(LEFT + column * this.wide + 0.5, row * this.high + 0.5, this.wide - 1, this.high - 1);
      });
    });
    context.fillStyle = ink;
    names.forEach((name, column) => {
      if (this.wide < 9 && column % 2) return;
      context.save();
      context.translate(LEFT + (column + 0.5) * this.wide, bottom + 6);
      context.rotate(-Math.PI / 2);
      context.textAlign = "right";
      context.fillText(name.length > LETTERS ? `${name.slice(0, LETTERS - 1)}…` : name, 0, 0);
      context.restore();
    });
    context.strokeStyle = colour("--arc");
    context.lineWidth = 2;
    context.strokeRect(LEFT + this.at.column * this.wide + 1, this.at.row * this.high + 1, Math.max(3, this.wide - 2), this.high - 2);
    write(this.readOut, this.say(this.cell()));
  }
}
