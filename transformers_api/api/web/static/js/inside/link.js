// The edits of the shelf behind the view's name in the address, so that a link carries them. What comes with a link is
// as untrusted as any text: a short list of plain values, or nothing.
const LONGEST = 8000; // characters

const bytesOf = (text) => Uint8Array.from(atob(text.replaceAll("-", "+").replaceAll("_", "/")), (letter) => letter.charCodeAt(0));

/** The values of the edits in the address: a list, empty where there is none that can be read. */
export function editParts() {
  const packed = location.hash.length <= LONGEST ? /[?&]edits=([\w-]+)/.exec(location.hash)?.[1] : null;
  try {
    const values = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytesOf(packed)));
    return Array.isArray(values) ? values : [];
  } catch {
    return [];
  }
}

/** What carries `values` behind the view's name: "" for none, and where they are too long for a link. */
export function writeEdits(values) {
  if (!values.length) return "";
  const letters = Array.from(new TextEncoder().encode(JSON.stringify(values)), (byte) => String.fromCharCode(byte)).join("");
  const text = `?edits=${btoa(letters).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "")}`;
  return text.length < LONGEST ? text : "";
}
