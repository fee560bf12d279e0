// One HTML file of an answer and what was read: opens anywhere, asks nobody.
import { raw } from "../core/api.js";
import { save } from "../core/dom.js";
import { change } from "../words/change.js";
import { inside } from "../words/inside.js";
import { collect } from "./saved.js";
import { rowsOf } from "./tokens.js";

// A `<` could end the script that holds the data.
const safe = (data) => JSON.stringify(data).replaceAll("<", "\\u003c").replaceAll("\u2028", "\\u2028").replaceAll("\u2029", "\\u2029");

/** Offer the answer as a page. */
export async function sharePage(node, onProgress) {
  const template = await raw(new URL("../../share.html", import.meta.url).pathname, "text");
  const { header, tokens } = await collect(node, onProgress);
  const { rows, introduction } = rowsOf(node);
  const date = new Intl.DateTimeFormat(undefined, { dateStyle: "long" }).format(new Date());
  const words = {
    readFrom: inside.colours.read, surprising: inside.surprising, candidates: inside.nearly, read: inside.read, layer: inside.layer, head: inside.head,
    mean: inside.headNames.mean, max: inside.headNames.max, hideFirst: inside.hideFirst, honest: inside.notAReason, proof: header.verified ? inside.proof : "",
    model: inside.roles.assistant, probability: inside.probability, surprisal: `${inside.surprisal} (${inside.nats})`, choosing: `${inside.choosing} (${inside.words})`,
    pushed: change.sharedPush, unedited: change.sharedWithout,
  };
  const { edits } = node;
  const changed = edits && {
    title: change.sharedTitle, names: edits.names, twinTitle: change.sharedTwin, twin: node.twin?.text ?? "",
    link: edits.link ? `${location.origin}${location.pathname}#inside${edits.link}` : "", open: change.sharedLink, honest: change.honest,
  };
  const data = { ...header, changed, tokens, rows: rows.map(({ role, runs }) => ({ role: inside.role(role), runs })), introduction, note: inside.sharedBy(node.model ?? "", date), words };
  save(`${inside.fileName(node.model ?? "page")}.html`, template.replace("%DATA%", () => safe(data)), "text/html");
}
