// The kinds of edits that the shelf knows: their fields, what is a value of each, and what they are in a request.
const MOST = 9999; // of layers, heads and so on: what is too much for the model the server tells
const FAR = 1_000_000; // places and neurons
const NAME = /^[a-z0-9._-]{1,64}$/;
const RUN = /^[\w.-]{1,64}$/;
const TEXT = 4000; // letters of a prompt

const whole = (low, high) => (value) => Number.isInteger(value) && value >= low && value <= high;
const isText = (value) => typeof value === "string" && value.length <= TEXT;

/** What is a value of a field; `head` null: all of them. */
const VALUES = {
  layer: whole(0, MOST), head: (value) => value === null || whole(0, MOST)(value), neuron: whole(0, FAR), feature: whole(0, FAR),
  query: whole(0, FAR), key: whole(0, FAR), place: whole(0, FAR), there: whole(-FAR, FAR),
  vector: (value) => NAME.test(value), sae: (value) => NAME.test(value), prompt: isText, run: (value) => value === "" || RUN.test(value),
};

const heads = (head) => (head === null ? {} : { heads: [head] });
const allHeads = (head) => ({ heads: head === null ? "all" : [head] });
const scaled = (part) => ({ fields: ["layer", "head"], range: { min: 0, max: 2, step: 0.1, start: 0 }, json: ({ layer, head, size }) => ({ do: "scale", part, layer, ...allHeads(head), by: size }) });

/** kind → {fields, range of its slider, json(edit)}; a kind without a range has no size. */
export const KINDS = {
  head: { fields: ["layer", "head"], json: ({ layer, head }) => ({ do: "ablate", part: "head", layer, ...allHeads(head) }) },
  attn: { fields: ["layer"], range: { min: 0, max: 2, step: 0.1, start: 0 }, json: ({ layer, size }) => ({ do: "scale", part: "attn", layer, by: size }) },
  mlp: { fields: ["layer"], range: { min: 0, max: 2, step: 0.1, start: 0 }, json: ({ layer, size }) => ({ do: "scale", part: "mlp", layer, by: size }) },
  neuron: { fields: ["layer", "neuron"], range: { min: -20, max: 20, step: 0.5, start: 0 }, json: ({ layer, neuron, size }) => ({ do: "set", part: "neuron", layer, neurons: [neuron], value: size }) },
  vector: { fields: ["layer", "vector"], range: { min: -1, max: 1, step: 0.05, start: 0.2 }, json: ({ layer, vector, size }) => ({ do: "add", layer, vector, units: "norm", scale: size }) },
  erase: { fields: ["vector"], json: ({ vector }) => ({ do: "erase", layers: "all", vector }) },
  edge: { fields: ["layer", "head", "query", "key"], json: ({ layer, head, query, key }) => ({ do: "block", layer, ...heads(head), queries: [query], keys: [key] }) },
  temper: { fields: ["layer", "head"], range: { min: 0.25, max: 4, step: 0.25, start: 2 }, json: ({ layer, head, size }) => ({ do: "temper", layer, ...heads(head), temperature: size }) },
  q: scaled("q"),
  k: scaled("k"),
  v: scaled("v"),
  feature: { fields: ["sae", "feature"], range: { min: 0, max: 40, step: 0.5, start: 10 }, json: ({ sae, feature, size }) => ({ do: "feature", sae, feature, value: size }) },
  patch: {
    fields: ["layer", "place", "prompt", "run", "there"],
    json: ({ layer, place, prompt, run, there }) => ({ do: "patch", layer, at: [place], from: { ...(run ? { run } : { prompt }), at: [there] } }),
  },
};

const isSize = (value, { min, max }) => typeof value === "number" && value >= min && value <= max;

/** The edit with its own fields alone; null where something is no value of it. */
export function editOf(value) {
  const kind = typeof value?.kind === "string" && Object.hasOwn(KINDS, value.kind) ? KINDS[value.kind] : null;
  if (!kind || kind.fields.some((name) => !VALUES[name](value[name]))) return null;
  if (value.kind === "patch" && !value.run && !value.prompt) return null;
  const size = kind.range ? value.size ?? kind.range.start : undefined;
  if (kind.range && !isSize(size, kind.range)) return null;
  const edit = { kind: value.kind, ...Object.fromEntries(kind.fields.map((name) => [name, value[name]])), isOn: value.isOn !== false };
  return kind.range ? { ...edit, size } : edit;
}
