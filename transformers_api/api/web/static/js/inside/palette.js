// Colours of pictures: cividis for how much, for all common kinds of colour vision; and canvases.
const STOPS = [
  [0, 32, 76], [0, 51, 111], [57, 72, 107], [87, 93, 109], [112, 113, 115],
  [138, 134, 120], [166, 157, 117], [195, 180, 105], [225, 204, 85], [255, 233, 69],
];

/** The colour of a share from 0 to 1: [red, green, blue]. */
export function cividis(share) {
  const place = Math.max(0, Math.min(1, share)) * (STOPS.length - 1);
  const stop = Math.min(STOPS.length - 2, Math.floor(place));
  return STOPS[stop].map((value, channel) => Math.round(value + (STOPS[stop + 1][channel] - value) * (place - stop)));
}

const TABLE = Uint8Array.from({ length: 256 * 3 }, (_, at) => cividis(Math.floor(at / 3) / 255)[at % 3]);

/** Paint the square roots of weights from 0 to 1, row by row, as pixels of an ImageData. */
export function pixels(values, width, height) {
  const image = new ImageData(width, height);
  for (let at = 0; at < width * height; at += 1) {
    const step = 3 * Math.round(255 * Math.sqrt(Math.max(0, Math.min(1, values[at]))));
    image.data[4 * at] = TABLE[step];
    image.data[4 * at + 1] = TABLE[step + 1];
    image.data[4 * at + 2] = TABLE[step + 2];
    image.data[4 * at + 3] = 255;
  }
  return image;
}

/** A small canvas that holds an image, to be drawn larger. */
export function picture(image) {
  const canvas = document.createElement("canvas");
  canvas.width = image.width;
  canvas.height = image.height;
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

/** Size a canvas for this screen; returns its context in CSS pixels. */
export function pen(canvas, width, height) {
  const ratio = globalThis.devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  return context;
}
