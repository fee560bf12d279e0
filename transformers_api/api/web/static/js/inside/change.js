// The pane Change: edits of the model, the answer written again with them, and which part said a token.
import { again } from "../chat/run.js";
import { button, h } from "../core/dom.js";
import { state } from "../core/state.js";
import { change as words } from "../words/change.js";
import { intervention } from "./edits.js";
import { write } from "./lists.js";
import { logitParts } from "./logit_parts.js";
import { isResident } from "./model.js";
import { shelf } from "./shelf.js";

/** The pane "Change". `onWritten(answer, node)` when `node` was written again by the model as it is changed. */
export function change(onWritten) {
  const edits = shelf(draw);
  const parts = logitParts((edit) => edits.add(edit));
  const writer = button(words.write, writeAgain, { cls: "btn pri" });
  const hint = h("p", { class: "hint" });
  edits.element.append(h("div", { class: "row" }, writer), hint);
  const element = h("div", { class: "pane-body" }, edits.element, parts.element);
  let node = null;

  async function writeAgain() {
    const before = node;
    const answer = await again(before, { isCalm: true, intervene: intervention() });
    if (answer?.tokens?.length && before.tokens?.length) onWritten(answer, before);
  }

  function draw() {
    const may = Boolean(node?.asked) && !node.live && !node.isSaved && !node.fork && isResident(node) && !state.writing;
    writer.disabled = !may;
    write(writer, intervention() ? words.write : words.writePlain);
    write(hint, may ? words.writeMore : words.cannot);
  }

  function show(shown, position) {
    node = shown;
    edits.draw();
    draw();
    parts.show(shown, position);
  }
  return { element, show };
}
