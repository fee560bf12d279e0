// The edits on the shelf: what the reader has put together, and what it means in a request.
import { choice, keepChoice } from "../core/store.js";
import { change as words } from "../words/change.js";

/** How far the slider of a kind goes; a kind without one has no size. */
export const SIZES = {
  attn: { min: 0, max: 2, step: 0.1, start: 0 },
  mlp: { min: 0, max: 2, step: 0.1, start: 0 },
  neuron: { min: -20, max: 20, step: 0.5, start: 0 },
  vector: { min: -1, max: 1, step: 0.05, start: 0.2 },
};
const FIELDS = {
  head: ({ layer, head }) => ({ do: "ablate", part: "head", layer, heads: [head] }),
  attn: ({ layer, size }) => ({ do: "scale", part: "attn", layer, by: size }),
  mlp: ({ layer, size }) => ({ do: "scale", part: "mlp", layer, by: size }),
  neuron: ({ layer, neuron, size }) => ({ do: "set", part: "neuron", layer, neurons: [neuron], value: size }),
  vector: ({ layer, vector, size }) => ({ do: "add", layer, vector, units: "norm", scale: size }),
};

const edits = choice("edits", []).filter((edit) => Object.hasOwn(FIELDS, edit?.kind));

const keep = () => keepChoice("edits", edits);

/** [{kind, layer, head?, neuron?, vector?, size?, isOn}], in the order in which they hold. */
export const all = () => edits;

export const nameOf = (edit) => words.named[edit.kind](edit);

/** What is done with it: its name, and how much where that can be chosen. */
export const saying = (edit) => [nameOf(edit), words.amounts[edit.kind]?.(edit.size)].filter(Boolean).join(" ");

/** Put an edit on the shelf, switched on; one of the same place is switched on again. */
export function add(edit) {
  const same = edits.find((other) => nameOf(other) === nameOf(edit) && other.kind === edit.kind);
  if (same) Object.assign(same, { ...edit, isOn: true });
  else edits.push({ size: SIZES[edit.kind]?.start, ...edit, isOn: true });
  keep();
}

export function remove(edit) {
  edits.splice(edits.indexOf(edit), 1);
  keep();
}

export function alter(edit, patch) {
  Object.assign(edit, patch);
  keep();
}

/** The field `intervene` of a request; undefined where nothing is switched on. */
export function intervention() {
  const used = edits.filter(({ isOn }) => isOn).map((edit) => FIELDS[edit.kind](edit));
  return used.length ? { edits: used } : undefined;
}
