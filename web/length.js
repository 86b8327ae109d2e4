// @ts-check
// Empty AR Video Latent: a length keeps its meaning when its unit is changed; 57 frames become 2.38 seconds, not 57.
import { onOutput } from "./outputs.js";

const NODE = "FlowCacheLatent";
const FPS = 24; // until the node has run and sent the model's
const FRAMES = "frames";

/** @type {WeakMap<object, number>} */
const rates = new WeakMap();

onOutput((node, output) => {
  if (node.comfyClass === NODE && output.fps?.[0]) rates.set(node, output.fps[0]);
});

/**
 * The same length in the other unit.
 * @param {number} length @param {string} unit the new one, frames or seconds @param {number} fps
 */
export function converted(length, unit, fps) {
  return unit === FRAMES ? Math.max(1, Math.round(length * fps)) : Math.max(0.1, Math.round((length / fps) * 100) / 100);
}

/** @param {any} node */
export function convertLength(node) {
  if (node.comfyClass !== NODE) return;
  const find = (/** @type {string} */ name) => node.widgets?.find((/** @type {any} */ widget) => widget.name === name);
  const [length, unit] = [find("length"), find("unit")];
  if (!length || !unit) return;
  let known = unit.value;
  const configured = node.onConfigure;
  node.onConfigure = function (/** @type {any[]} */ ...given) {
    configured?.apply(this, given);
    known = unit.value;
  };
  const chosen = unit.callback;
  unit.callback = function (/** @type {any[]} */ ...given) {
    chosen?.apply(this, given);
    if (unit.value === known) return;
    known = unit.value;
    length.value = converted(Number(length.value), known, rates.get(node) ?? FPS);
  };
}
