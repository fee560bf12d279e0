// Numbers as the API packs them: u8 (byte / 255 * scale[row]) and little-endian f16, in base64.
let halves = null;

/** All 65,536 values of half precision. */
function table() {
  if (halves) return halves;
  halves = new Float32Array(65_536);
  for (let bits = 0; bits < 65_536; bits += 1) {
    const sign = bits & 0x8000 ? -1 : 1;
    const exponent = (bits >> 10) & 31;
    const fraction = bits & 1023;
    if (exponent === 31) halves[bits] = fraction ? NaN : sign * Infinity;
    else halves[bits] = sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024));
  }
  return halves;
}

export const bytesOf = (base64) => Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));

/** {shape, values}: the numbers of an envelope, the last axis fastest. */
export function unpack(envelope) {
  const data = bytesOf(envelope.data);
  const size = envelope.shape.reduce((product, length) => product * length, 1);
  const values = new Float32Array(size);
  if (envelope.dtype === "uint8") {
    const scale = [envelope.scale ?? 1].flat(Infinity);
    const width = envelope.shape.at(-1);
    for (let at = 0; at < size; at += 1) values[at] = (data[at] / 255) * (scale.length > 1 ? scale[Math.floor(at / width)] : scale[0]);
  } else {
    const known = table();
    for (let at = 0; at < size; at += 1) values[at] = known[data[2 * at] | (data[2 * at + 1] << 8)];
  }
  return { shape: envelope.shape, values };
}

/** Weights (heads × keys) as u8, a scale for each head, in base64. */
export function pack(weights, heads, keys) {
  const bytes = new Uint8Array(heads * keys);
  const scale = [];
  for (let head = 0; head < heads; head += 1) {
    const row = weights.subarray(head * keys, (head + 1) * keys);
    const most = row.reduce((max, value) => Math.max(max, value), 0) || 1;
    scale.push(most);
    row.forEach((value, key) => { bytes[head * keys + key] = Math.round((255 * value) / most); });
  }
  let text = "";
  for (const byte of bytes) text += String.fromCharCode(byte);
  return { dtype: "uint8", shape: [heads, keys], order: "C", encoding: "base64", data: btoa(text), scale };
}
