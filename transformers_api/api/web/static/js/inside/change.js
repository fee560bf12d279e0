// The pane Change: edits of the model, the answer written again with them, directions, grids, and which part said a
// token.
import { again } from "../chat/run.js";
import { button, h } from "../core/dom.js";
import { state } from "../core/state.js";
import { change as words } from "../words/change.js";
import { inWords, intervention } from "./edits.js";
import { grid } from "./grid.js";
import { write } from "./lists.js";
import { logitParts } from "./logit_parts.js";
import { isResident } from "./model.js";
import { pairs } from "./pairs.js";
import { shelf } from "./shelf.js";

/** The unedited model writes beside it. */
const withTwin = (edits) => edits && { ...edits, compare: "free" };

/** The pane "Change". `onWritten(answer, node)` when `node` was written again by the model as it is changed. */
export function change(onWritten) {
  const edits = shelf(draw);
  const add = (edit) => edits.add(edit);
  const [parts, directions, places] = [logitParts(add), pairs(add), grid(add)];
  const writer = button(words.write, writeAgain, { cls: "btn pri" });
  const hint = h("p", { class: "hint", dir: "auto" });
  edits.element.append(h("div", { class: "row" }, writer), hint);
  const element = h("div", { class: "pane-body" }, edits.element, parts.element, places.element, directions.element);
  let node = null;
  let problem = "";

  async function writeAgain() {
    const before = node;
    edits.refuse(null);
    problem = "";
    const answer = await again(before, { isCalm: true, intervene: withTwin(intervention()), edits: inWords() });
    if (answer?.error) problem = edits.refuse(answer.error) ? "" : answer.error.message;
    draw();
    if (answer?.tokens?.length && before.tokens?.length) onWritten(answer, before);
  }

  function draw() {
    const may = Boolean(node?.asked) && !node.live && !node.isSaved && !node.fork && isResident(node) && !state.writing;
    writer.disabled = !may;
    write(writer, intervention() ? words.write : words.writePlain);
    write(hint, problem || (may ? words.writeMore : words.cannot));
    hint.classList.toggle("problem", Boolean(problem));
  }

  function show(shown, position) {
    node = shown;
    edits.aim(shown, position);
    edits.draw();
    draw();
    parts.show(shown, position);
    places.show(shown, position);
    directions.show(shown);
  }
  return { element, show, add };
}
