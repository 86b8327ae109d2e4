// Saved workflows with wrong values, through what the page does with a node that it loads: hostile_workflows.mjs EXTENSION COUNT, where EXTENSION is
// a copy of web/ in a folder tree like that of the page. Prints what went wrong, as one line of JSON.
import path from "node:path";
import { pathToFileURL } from "node:url";

const [folder, count] = process.argv.slice(2);
const load = (name) => import(pathToFileURL(path.join(folder, name)).href);
const { extensions } = await import(pathToFileURL(path.join(folder, "../../scripts/app.js")).href);
const { RULES, arrange } = await load("widgets.js");
const { convertLength } = await load("length.js");
await load("saved_workflows.js");

const NAMES = {
  FlowCacheChunkwise: ["threshold", "warmup_steps", "max_reuse", "signature", "replay", "order", "start_percent", "end_percent", "rescale", "preset",
                       "target", "target_share", "target_speedup", "target_seconds", "plan"],
  FlowCacheMotion: ["threshold", "alpha", "coarse", "measure", "preset"],
  FlowCacheKVCompressor: ["policy", "budget", "salience_head"],
  FlowCacheSampler: ["solver", "ar_step", "attention", "window_frames", "overlap_history"],
  FlowCacheLatent: ["width", "height", "length", "unit"],
  FlowCacheRemoved: ["a", "b"],
};
const ODD = [undefined, null, NaN, Infinity, -1, 0, 1e308, "", "custom", "balanced", "\u0000", "\u202e", "__proto__", "x".repeat(1000), true, [], [["node", 0]],
             {}, { preset: "fast" }, { length: 3 }, { toString: null }, Symbol.iterator.toString()];

/** Random numbers 0..1 of a seed: the same in every run. */
function random(seed) {
  return () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}

/** As the page makes it, with the parts that are used here. */
function made(comfyClass) {
  const node = { comfyClass, inputs: [], size: [100, 10], computeSize: () => [100, 20], setSize(size) { this.size = size; } };
  node.widgets = NAMES[comfyClass].map((name, n) => ({ name, value: n, options: { advanced: n % 3 === 0 } }));
  node.addWidget = (type, name, value, callback, options) => {
    const widget = { type, name, value, callback, options };
    node.widgets.push(widget);
    return widget;
  };
  arrange(node);
  convertLength(node);
  return node;
}

/** As the page puts saved values into a node: by their places, then the node's own way, then the extensions. */
function configured(node, data) {
  node.widgets_values = data.widgets_values;
  if (Array.isArray(data.widgets_values)) {
    node.widgets.filter((one) => one.serialize !== false).forEach((one, n) => n < data.widgets_values.length && (one.value = data.widgets_values[n]));
  }
  node.onConfigure?.(data);
  for (const one of extensions) one.loadedGraphNode?.(node);
}

const faults = [];
for (let number = 0; number < Number(count); number++) {
  const next = random(number), choose = (all) => all[Math.floor(next() * all.length)];
  const comfyClass = choose(Object.keys(NAMES)), names = NAMES[comfyClass];
  const values = Array.from({ length: Math.floor(next() * (names.length + 4)) }, () => choose(ODD));
  const data = { widgets_values: next() < 0.7 ? values : choose(ODD) };
  try {
    const node = made(comfyClass);
    if (next() < 0.1) node.inputs = choose([undefined, [{ widget: { name: "preset" }, link: 3 }], [{ widget: null, link: null }]]);
    if (next() < 0.1) node.widgets_values = choose(ODD);
    configured(node, data);
    for (const widget of node.widgets) widget.callback?.(widget.value);
    const saved = { widgets_values: node.widgets.filter((one) => one.serialize !== false).map((one) => one.value) };
    node.onSerialize?.(saved);
    const kept = node.widgets.filter((one) => one.serialize !== false).map((one) => one.name);
    if ([...kept].sort().join() !== [...names].sort().join()) throw new Error(`widgets are now ${kept}`);
    if (saved.widgets_values.length !== names.length) throw new Error(`${saved.widgets_values.length} values are saved`);
    if (Object.keys(Object.prototype).length) throw new Error("the prototype of all objects has changed");
  } catch (error) {
    faults.push(`${number} ${comfyClass}: ${error.stack}`);
  }
}
for (const missing of [{}, { widgets: undefined, widgets_values: [1] }, { comfyClass: "FlowCacheChunkwise", widgets_values: [1], computeSize: () => [0, 0], size: [0, 0] }]) {
  try {
    for (const one of extensions) one.loadedGraphNode?.(missing);
  } catch (error) {
    faults.push(`a node that is missing: ${error.stack}`);
  }
}
console.log(JSON.stringify({ faults, classes: Object.keys(RULES).filter((name) => !NAMES[name]) }));
