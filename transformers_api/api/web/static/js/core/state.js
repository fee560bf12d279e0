/* The state of the page, and the contract of its parts.

One object. Read it by `state.key` (or `get()`); change it by `set({key: value})`, which calls the
listeners of each key whose value is another one; after changing something inside of a value, call
`touch("key")`. `on("key", listener)` calls `listener(value)` and returns a function that ends it.

  view       "chat" | "inside" | "models": the tab that is open
  chats      [chat], newest first; without tokens (`isLight`) until they are opened
  chat       the open chat (below); never null. `touch("chat")` after its nodes or leaf changed
  path       [node], from the first message to `chat.leaf`: derived from `chat`, never set
  selection  null | {node, position}: the token that is asked about; `position` counts all tokens that
             the model saw, from 0, as in the trace. node.tokens[position - node.tokens[0].position]
  isPinned   true where the reader chose the selection, so that it does not follow what is written
  layer      null | number: the layer that is looked through; null is the model's own suggestion
  head       "mean" | "max" | number
  hideFirst  true where the first token's weight is left out
  model      null | the chosen model's id
  models     [{id, loaded, owned_by, max_model_len, description?, parameters?, …}] as the API has them
  anatomy    the answer of GET /inspect/model about the resident model | null: it has none | undefined: not yet here
  status     null | the answer of GET /status (or what /health tells, where the key may not ask)
  reach      "wait" | "yes" | "no": if the server answers
  needsKey   true after a 401, until a key is entered
  writing    null | {node, chat, stop(), clock}: the answer that is being written
  compared   null | id of the parent whose versions stand side by side
  draft      null | a text that is to be put into the message box
  settings   {system, temperature, top_p, max_tokens, seed, form, tools, …}: texts as typed, "" is unset

chat  {id, title, made, changed, leaf, nodes: {id: node}, v: 1}
node  {id, parent, at, role: "user"|"assistant"|"tool", text, model?, prompt?: {token_ids, tokens, spans},
       tokens?: [token], usage?, finish?, took?, wait?, verified?, branched?, error?, reasoning?, thought?,
       twin?: node (what the unedited model wrote beside it),
       edits?: {names, link}, intervene?: {edits} (of a branch and of an import: what changed the model that wrote it),
       asked?: {system, …the request's fields}, calls?: [{id, name, arguments}], call?: {id, name} (of a tool's answer), blind?}
       While it is written also `live`: "wait" | "write" (not stored).
token {id, text, position, surprisal, entropy, rank, prob, topk: [{id, text, p}], forced?}
       surprisal, entropy, rank and prob are null, and topk is [], of a token that was written without a
       trace (node.blind has the API's reason): POST /inspect/tokens fills them in, then touch("chat").
       and, in the tab's memory only, `attn`: the trace's own row [{layer, key_start, …}].
A path from `leaf` to the root is what is sent and shown; versions are nodes with one parent and one role.

Who may do what: `chat/run.js` alone starts and ends answers; `onFrame(callback)` of it is called at most
once a frame with the node that grew. A fork that is kept becomes a node by `keepVersion` there.
A view is a module with `mount(root, context)`; it listens to `view` and works only while it is open.
Requests go through core/api.js with `panel: "name"`, and a button opens `showRequest("name")`
(shell/request_dialog.js). Words stand in words/*.js. */
import { path as pathOf } from "./tree.js";

export const state = {
  view: "chat", chats: [], chat: null, path: [], selection: null, isPinned: false, layer: null, head: "mean",
  hideFirst: true, model: null, models: [], anatomy: undefined, status: null, reach: "wait", needsKey: false,
  writing: null, compared: null, draft: null, settings: {},
};

const listeners = new Map();

export const get = () => state;

/** Call `listener` with the value of `key` whenever it changes; returns a function that stops it. */
export function on(key, listener) {
  if (!listeners.has(key)) listeners.set(key, new Set());
  listeners.get(key).add(listener);
  return () => listeners.get(key).delete(listener);
}

function tell(keys) {
  if (keys.includes("chat")) {
    state.path = state.chat ? pathOf(state.chat) : [];
    keys = [...keys, "path"];
  }
  for (const key of keys) for (const listener of [...(listeners.get(key) ?? [])]) listener(state[key]);
}

/** Change the state; the listeners are called when all of it has changed. */
export function set(patch) {
  const keys = Object.keys(patch).filter((key) => state[key] !== patch[key]);
  Object.assign(state, patch);
  tell(keys);
}

/** Call the listeners of keys whose values have changed inside. */
export const touch = (...keys) => tell(keys);
