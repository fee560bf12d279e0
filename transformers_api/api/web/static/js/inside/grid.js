// Where does it lie? The answer's text with another word in it, and its numbers put back one place at a time: a
// picture of layers and places that fills as it is computed. A click patches there.
import { askedOf, editsOf } from "../chat/changed.js";
import { json } from "../core/api.js";
import { button, h } from "../core/dom.js";
import { visible } from "../core/format.js";
import { state } from "../core/state.js";
import { requestButton } from "../shell/request_dialog.js";
import { change as words } from "../words/change.js";
import { GridPicture } from "./grid_picture.js";
import { section, write } from "./lists.js";
import { isResident, mayAsk } from "./model.js";
import { idsUpTo, tokenAt } from "./tokens.js";

const EVERY_MS = 600; // that a job is asked how far it is
const ROWS = 12; // layers at first

const kept = new WeakMap(); // node → Map of position → {id, clean, job}
const later = (ms) => new Promise((resolve) => { setTimeout(resolve, ms); });
const textUpTo = (node, position) => Array.from({ length: position }, (_, at) => tokenAt(node, at).text).join("");

const short = (value) => value.toFixed(2).replace(/^-(?=0\.00$)/, "").replace("-", "−");

async function idsOf(model, prompt) {
  const { tokens } = await json("/tokenize", { body: { model, prompt } });
  return tokens;
}

/** Every `step`th layer, and the last. */
export function layersOf(count, step) {
  const layers = Array.from({ length: count }, (_, layer) => layer).filter((layer) => layer % step === 0);
  return layers.at(-1) === count - 1 ? layers : [...layers, count - 1];
}

/** {element, show(node, position)}; `onPatch(edit)` where a cell was chosen. */
export function grid(onPatch) {
  const { element, heading } = section(words.grid);
  const field = (label) => h("input", { class: "in", "aria-label": label, maxlength: "200", dir: "auto", autocomplete: "off" });
  const [from, to] = [field(words.gridFrom), field(words.gridTo)];
  const every = h("select", { class: "sel", "aria-label": words.gridLayers }, ...Object.entries(words.gridSteps).map(([value, text]) => h("option", { value, text })));
  const starter = button(words.gridStart, start, { cls: "btn" });
  const ender = button(words.gridCancel, cancel, { cls: "btn", hidden: true });
  const progress = h("progress", { "aria-label": words.gridProgress, hidden: true });
  const message = h("p", { class: "hint", role: "status", dir: "auto" });
  const picture = new GridPicture({ label: words.gridPicture, onChoose: choose, say: sentence });
  heading.after(requestButton("grid"));
  const help = h("p", { class: "hint" });
  element.append(help, h("div", { class: "edit-form" },
    ...[[words.gridFrom, from], [words.gridTo, to], [words.gridLayers, every]].map(([text, control]) => h("label", { class: "field" }, h("span", { text }), control)),
    h("div", { class: "row" }, starter, ender)), progress, message, picture.element);
  let current = null; // {node, position}
  let running = null; // {node, position, id}

  const entry = () => (current ? kept.get(current.node)?.get(current.position) : null);

  function sentence({ layer, place, value }) {
    return words.gridCell(layer, visible(tokenAt(current.node, place)?.text ?? ""), place, value === null ? "–" : short(value));
  }

  function choose({ layer, place }) {
    onPatch({ kind: "patch", layer, place, prompt: entry().clean, run: "", there: place });
  }

  /** What is to be asked; throws Error in words where it cannot be. */
  async function question({ node, position }) {
    const corrupt = textUpTo(node, position);
    const clean = corrupt.replaceAll(from.value, to.value);
    if (!from.value || clean === corrupt) throw new Error(words.gridNoWord);
    const [ids, others] = [await idsOf(node.model, corrupt), await idsOf(node.model, clean)];
    if (String(ids) !== String(idsUpTo(node, position))) throw new Error(words.gridText);
    if (ids.length !== others.length) throw new Error(words.gridLengths(others.length, ids.length));
    const first = ids.findIndex((id, at) => id !== others[at]); // before it nothing differs
    const step = Number(every.value) || Math.max(1, Math.ceil(state.anatomy.layers / ROWS));
    const positions = Array.from({ length: position - first }, (_, at) => first + at);
    return { model: node.model, ...editsOf(node, position), clean, corrupt, layers: layersOf(state.anatomy.layers, step), positions, job: true };
  }

  async function start() {
    const asked = current;
    await cancel();
    starter.disabled = true;
    write(message, words.asking);
    try {
      const body = await question(asked);
      const { id } = await json("/inspect/patch", { body, panel: "grid" });
      running = { ...asked, id };
      if (!kept.has(asked.node)) kept.set(asked.node, new Map());
      kept.get(asked.node).set(asked.position, { id, clean: body.clean, job: null });
      await follow(running);
    } catch (failure) {
      if (current === asked) write(message, failure.message);
    }
    if (running?.node === asked.node && running.position === asked.position) running = null;
    draw();
  }

  /** Show the job as it goes on, until it ends. */
  async function follow(mine) {
    const target = kept.get(mine.node).get(mine.position);
    for (;;) {
      target.job = await json(`/inspect/jobs/${mine.id}`);
      if (current?.node === mine.node && current.position === mine.position) fill();
      if (target.job.state !== "running") return;
      await later(EVERY_MS);
    }
  }

  async function cancel() {
    if (!running) return;
    const { id } = running;
    running = null;
    await json(`/inspect/jobs/${id}`, { method: "DELETE" }).catch(() => null); // it has ended meanwhile
  }

  function fill() {
    const job = entry()?.job;
    picture.element.hidden = !job?.result?.grid;
    if (!job) return;
    const isRunning = job.state === "running";
    Object.assign(progress, { max: job.total, value: job.done, hidden: !isRunning });
    ender.hidden = !isRunning;
    if (job.error) write(message, job.error.message ?? String(job.error));
    if (picture.element.hidden) return;
    const { layers, positions, grid: cells, answer, against } = job.result;
    picture.show({ layers, places: positions, cells, names: positions.map((place) => visible(tokenAt(current.node, place)?.text ?? "")) });
    const ends = answer && against ? words.gridEnds(visible(answer.token), visible(against.token)) : "";
    write(message, isRunning ? words.gridDone(job.done, job.total, Math.ceil(job.left_s ?? 0)) : ends);
  }

  function draw() {
    const may = current && mayAsk(current.node) && isResident(current.node) && !state.writing && current.position > 1 && state.anatomy?.layers;
    starter.disabled = !may || Boolean(running);
    ender.hidden = !running;
    progress.hidden = !running;
  }

  function show(node, position) {
    if (current?.node !== node || current.position !== position) {
      current = { node, position };
      write(message, "");
    }
    write(help, [words.gridHelp, askedOf(node, position)].filter(Boolean).join(" "));
    draw();
    fill();
  }
  return { element, show };
}
