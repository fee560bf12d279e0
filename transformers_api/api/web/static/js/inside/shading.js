// What the tape is shaded by: what the selected token read, what a question about it gave, or the layer
// at which each token was decided.
import { decidedAt, readingsAt } from "./lens.js";
import { lastPosition, promptLength, tokenAt } from "./tokens.js";

export class Shading {
  /** `stage`; `schedule()` asks for a frame, in which arcs are drawn. */
  constructor(stage, schedule) {
    this.stage = stage;
    this.schedule = schedule;
    this.weights = null;
    this.target = null; // {node, position}: where arcs end
    this.isDue = false;
  }

  /** Shade by weights {values, start}, with arcs to the token that read them; null is nothing. */
  show(weights, target) {
    this.weights = weights;
    this.target = target;
    const { stage } = this;
    const { shade } = stage.of(target.node);
    shade.show(weights, (place) => stage.chipAt(target.node, place));
    for (const other of stage.shades) {
      if (other === shade) continue;
      other.show(null, () => null);
      other.draw([]);
    }
    this.isDue = true;
    this.schedule();
  }

  /** Shade by numbers of each position, without arcs. */
  showScores(scores, target) {
    this.show({ values: Float32Array.from(scores, (score) => Math.max(0, score)), start: 0 }, target);
    this.isDue = false;
    this.stage.of(target.node).shade.draw([]);
  }

  /** Shade each written token by how late it was decided, among those of this answer. */
  showDecided(node) {
    const start = promptLength(node);
    const layers = node.tokens.map((token, at) => decidedAt(readingsAt(node, start + at, token) ?? [], token.id));
    const known = layers.filter((layer) => layer !== null);
    const low = Math.min(...known);
    const range = Math.max(1, Math.max(...known) - low);
    const scores = new Float32Array(lastPosition(node) + 1);
    layers.forEach((layer, at) => { scores[start + at] = layer === null ? 0 : 0.005 + (((layer - low) / range) ** 2); }); // roots are shown
    this.showScores(scores, { node, position: start });
  }

  /** Shade each written token by how far the edits pushed it. */
  showPushed(node) {
    const start = promptLength(node);
    const scores = new Float32Array(lastPosition(node) + 1);
    node.tokens.forEach(({ kl }, at) => { scores[start + at] = kl ?? 0; });
    this.showScores(scores, { node, position: start });
  }

  /** Boxes are read: call it at the start of a frame, and the function that it returns once all is read. */
  measure() {
    if (!this.isDue || !this.target) return null;
    this.isDue = false;
    const { stage, target, weights } = this;
    const { shade } = stage.of(target.node);
    const arcs = shade.measure(weights, stage.chipAt(target.node, target.position), (place) => stage.chipAt(target.node, place));
    return () => shade.draw(arcs);
  }

  /** The window has another size, or something was folded: arcs go elsewhere. */
  again() {
    this.isDue = Boolean(this.target);
    this.schedule();
  }
}

export const isKnown = (node, position) => Boolean(tokenAt(node, position));
