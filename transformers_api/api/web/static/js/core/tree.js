// A chat is a tree of messages: editing and asking again make versions, and nothing is overwritten.
export const VERSION = 1;
const TITLE_LETTERS = 60;

export const newId = () => crypto.randomUUID?.() ?? Array.from(crypto.getRandomValues(new Uint32Array(4)), (n) => n.toString(36)).join("");

export const newChat = () => ({ id: newId(), title: "", made: Date.now(), changed: Date.now(), leaf: null, nodes: {}, v: VERSION });

/** Add a message below `parent`, and make it the end of the chat. */
export function addNode(chat, parent, content) {
  const node = { id: newId(), parent, at: Date.now(), ...content };
  chat.nodes[node.id] = node;
  chat.leaf = node.id;
  chat.changed = Date.now();
  return node;
}

/** The messages from the first to `leaf`. */
export function path(chat, leaf = chat.leaf) {
  const nodes = [];
  const met = new Set(); // an imported file may go in circles
  for (let id = leaf; id && chat.nodes[id] && !met.has(id); id = chat.nodes[id].parent) {
    met.add(id);
    nodes.unshift(chat.nodes[id]);
  }
  return nodes;
}

const byTime = (a, b) => a.at - b.at;

/** The versions of a message, oldest first, itself included. */
export function versions(chat, node) {
  return Object.values(chat.nodes).filter((other) => other.parent === node.parent && other.role === node.role).sort(byTime);
}

/** The newest end below a message. */
export function leafBelow(chat, id) {
  const met = new Set(); // an imported file may go in circles
  for (;;) {
    met.add(id);
    const children = Object.values(chat.nodes).filter((node) => node.parent === id && !met.has(node.id)).sort(byTime);
    if (!children.length) return id;
    id = children.at(-1).id;
  }
}

/** A title of a chat: the first line of its first message. */
export function titleOf(text) {
  const line = text.trim().split("\n")[0].trim();
  return [...line].slice(0, TITLE_LETTERS).join("");
}

/** True where the title or any message has `words`. */
export function hasWords(chat, words) {
  const sought = words.toLowerCase();
  return chat.title.toLowerCase().includes(sought)
    || Object.values(chat.nodes).some((node) => node.text?.toLowerCase().includes(sought));
}
