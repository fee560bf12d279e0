// The edits on the shelf: what the reader has put together, and what it means in a request.
import { choice, keepChoice } from "../core/store.js";
import { state } from "../core/state.js";
import { change as words } from "../words/change.js";
import { editOf, KINDS } from "./edit_kinds.js";
import { editParts, writeEdits } from "./link.js";

export const MOST = 32; // edits of a request

const valid = (values) => values.map(editOf).filter(Boolean).slice(0, MOST);

/** An edit as a list for a link, and back: kind, 1 where it is on, its fields, its size. */
const packed = ({ kind, isOn, ...edit }) => [kind, isOn ? 1 : 0, ...KINDS[kind].fields.map((name) => edit[name]), ...(KINDS[kind].range ? [edit.size] : [])];

function unpacked(list) {
  if (!Array.isArray(list) || typeof list[0] !== "string" || !Object.hasOwn(KINDS, list[0])) return null;
  const [kind, isOn, ...values] = list;
  const { fields, range } = KINDS[kind];
  const names = [...fields, ...(range ? ["size"] : [])];
  return values.length === names.length ? editOf({ kind, isOn: isOn === 1, ...Object.fromEntries(names.map((name, at) => [name, values[at]])) }) : null;
}

const linked = valid(editParts().map(unpacked));
const edits = linked.length ? linked : valid(choice("edits", []));

/** How many edits came with the address. */
export const fromLink = linked.length;

/** What follows the view's name in an address that carries the shelf; "" where it is empty or too long. */
export const link = () => writeEdits(edits.map(packed));

/** Keep the shelf in the browser and, while Inside is open, in the address. */
export function keep() {
  keepChoice("edits", edits);
  if (state.view === "inside") history.replaceState(null, "", `#inside${link()}`);
}

/** Take the edits of the address in place of these; how many there are. */
export function adopt() {
  const others = valid(editParts().map(unpacked));
  if (!others.length || link() === writeEdits(others.map(packed))) return 0;
  edits.splice(0, edits.length, ...others);
  keep();
  return others.length;
}

/** [{kind, isOn, size?, …its fields}], in the order in which they hold. */
export const all = () => edits;

export const nameOf = (edit) => words.named[edit.kind](edit);

/** What is done with it: its name, and how much where that can be chosen. */
export const saying = (edit) => [nameOf(edit), words.amounts[edit.kind]?.(edit.size)].filter(Boolean).join(" ");

/** Put an edit on the shelf, switched on; one of the same place is switched on again. False where it is none, or
 *  there is no room. */
export function add(value) {
  const edit = editOf({ ...value, isOn: true });
  const same = edit && edits.find((other) => nameOf(other) === nameOf(edit) && other.kind === edit.kind);
  if (!edit || (!same && edits.length >= MOST)) return false;
  if (same) Object.assign(same, edit);
  else edits.push(edit);
  keep();
  return true;
}

export function remove(edit) {
  edits.splice(edits.indexOf(edit), 1);
  keep();
}

export function alter(edit, patch) {
  Object.assign(edit, patch);
  keep();
}

const inUse = () => edits.filter(({ isOn }) => isOn);

/** What is switched on, for who reads the answer later: {names, link}; undefined where nothing is. */
export const inWords = () => (inUse().length ? { names: inUse().map(saying), link: link() } : undefined);

/** The field `intervene` of a request; undefined where nothing is switched on. */
export function intervention() {
  const used = inUse().map((edit) => KINDS[edit.kind].json(edit));
  return used.length ? { edits: used } : undefined;
}

/** The edit that a refusal names by its place in the request or by its direction; null where it names none. */
export function refused({ param, message }) {
  const place = /^intervene\.edits\[(\d+)\]/.exec(param ?? message ?? "") ?? /\bintervene\.edits\[(\d+)\]/.exec(message ?? "");
  if (place) return inUse()[Number(place[1])] ?? null;
  const named = ({ vector, sae, run }) => [vector, sae, run].some((name) => name && message?.includes(`'${name}'`));
  return ["vector", "sae", "run"].includes(param) || /^No /.test(message ?? "") ? inUse().find(named) ?? null : null;
}
