// Files of Inside: traces that are saved and opened again, the page to share, numbers and pictures.
import { chooseFile } from "../core/dom.js";
import { notice } from "../core/notice.js";
import { inside } from "../words/inside.js";
import { saveAttention } from "./matrix.js";
import { hasAttention } from "./model.js";
import { savePicture } from "./picture.js";
import { isGivenUp } from "./queue.js";
import { parseTrace, saveTrace } from "./saved.js";
import { sharePage } from "./share.js";

/** Let the user choose a saved trace: an answer of no chat; null where none is chosen, or it is none. */
export async function openTrace() {
  const text = await chooseFile(".jsonl,application/jsonl,application/json");
  if (text === null) return null;
  try {
    return parseTrace(text);
  } catch {
    notice(inside.notATrace);
    return null;
  }
}

/** The entries of the menu. `say(text)` tells how far it is, `done()` follows, `open()` opens a trace. */
export function fileEntries(node, tape, { say, done, open }) {
  const gather = (count, all) => say(inside.gathering(count, all));
  const doing = (act) => async () => {
    try {
      await act(node, gather);
    } catch (failure) {
      if (!isGivenUp(failure)) notice(failure.message);
    }
    done();
  };
  const whole = node.live ? [] : [[inside.menu.page, doing(sharePage)], [inside.menu.trace, doing(saveTrace)]];
  const numbers = node.live || node.isSaved || !hasAttention() ? [] : [[inside.menu.npz, doing(saveAttention)]];
  return [...whole, ...numbers, [inside.menu.png, () => savePicture(tape, node.model ?? "trace")], null, [inside.menu.open, open]];
}
