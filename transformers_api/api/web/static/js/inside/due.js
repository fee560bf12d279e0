// What is drawn less often than every frame, and yet in the end shows the newest.

export class Due {
  constructor(restMs) {
    this.restMs = restMs;
    this.shown = { at: -Infinity };
  }

  /** True where something older is shown, since `restMs` at least. What is then drawn counts as shown. */
  comes({ node, position }, now) {
    const { shown } = this;
    const count = node.tokens.length;
    if (shown.node === node && shown.position === position && shown.count === count) return false;
    if (now - shown.at <= this.restMs) return false;
    this.shown = { node, position, count, at: now };
    return true;
  }
}
