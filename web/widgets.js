// @ts-check
// Which widgets of a node are in sight, and in which order: what people turn stands first, and what a choice makes meaningless is hidden.
// Values are saved in the order of the node's inputs, whatever the order on the page.
import { STRINGS } from "./strings.js";

/** @typedef {(name: string) => any} Values */
/** @typedef {{first?: string[], shown?: Record<string, (value: Values) => boolean>, raised?: Record<string, (value: Values) => boolean>}} Rule */

const CUSTOM = "custom";
const custom = (/** @type {Values} */ value) => value("preset") === CUSTOM;
const customThreshold = (/** @type {Values} */ value) => custom(value) && value("target") === "off";
/** A saved workflow may hold anything in place of a text. @param {unknown} value */
const text = (value) => (typeof value === "string" ? value : "");
const bidirectional = (/** @type {Values} */ value) => !text(value("attention")).startsWith("block-causal");

/** @param {string[]} names @param {(value: Values) => boolean} when */
const all = (names, when) => Object.fromEntries(names.map((name) => [name, when]));

/**
 * `first`: what stands before the rest. `shown`: when a widget means anything. `raised`: when one that is folded away stands in sight.
 * @type {Record<string, Rule>}
 */
export const RULES = {
  FlowCacheChunkwise: {
    first: ["preset", "target", "target_share", "target_speedup", "target_seconds"],
    shown: {
      target_share: (value) => value("target") === "computed share",
      target_speedup: (value) => value("target") === "speed-up",
      target_seconds: (value) => value("target") === "seconds",
      threshold: customThreshold,
      ...all(["warmup_steps", "max_reuse", "signature", "replay", "order", "start_percent", "end_percent", "rescale"], custom),
    },
    raised: { plan: (value) => text(value("plan")).trim() !== "" },
  },
  FlowCacheMotion: {
    first: ["preset"],
    shown: all(["threshold", "alpha", "coarse", "measure", "scale", "quantile", "vote", "min_refresh", "full_share", "max_age"], custom),
  },
  FlowCacheKVCompressor: {
    shown: { salience_head: (value) => value("policy") === "salience" },
    raised: { salience_head: (value) => value("policy") === "salience" },
  },
  FlowCacheSampler: { first: ["ar_step", "attention"], shown: all(["window_frames", "overlap_history"], bidirectional) },
};

/** @param {any} node @param {string} name */
const widgetOf = (node, name) => node.widgets?.find((/** @type {any} */ widget) => widget.name === name);

/** @param {any} node @param {string} name whether the widget's value comes from another node */
const linked = (node, name) => node.inputs?.some((/** @type {any} */ input) => input.widget?.name === name && input.link != null);

/**
 * Brings in sight what the node's present values give a meaning, and hides the rest. `options` is what Nodes 2.0 goes by, which folds away by
 * itself what is advanced; `hidden` of the widget is what the canvas goes by.
 * @param {any} node
 */
export function fold(node) {
  const { shown = {}, raised = {} } = RULES[node.comfyClass] ?? {};
  const value = (/** @type {string} */ name) => widgetOf(node, name)?.value;
  for (const widget of node.widgets ?? []) {
    const means = linked(node, widget.name) || (shown[widget.name]?.(value) ?? true);
    if (shown[widget.name]) widget.options.hidden = !means;
    if (widget.flowcacheFolded) widget.options.advanced = !raised[widget.name]?.(value);
    if (shown[widget.name] || widget.flowcacheFolded) widget.hidden = !means || (widget.options.advanced && !node.showAdvanced);
  }
  const [, height] = node.computeSize();
  if (node.size[1] < height) node.setSize([node.size[0], height]);
}

/**
 * Orders and folds the widgets of a new node, and keeps them so.
 * @param {any} node
 */
export function arrange(node) {
  const saved = (node.widgets ?? []).filter((/** @type {any} */ widget) => widget.serialize !== false);
  if (!saved.length) return;
  const inputs = saved.map((/** @type {any} */ widget) => ({ name: widget.name, value: widget.value }));
  const { first = [], shown = {} } = RULES[node.comfyClass] ?? {};
  const place = (/** @type {any} */ widget) => (first.includes(widget.name) ? first.indexOf(widget.name) : first.length);
  node.widgets = [...node.widgets].sort((one, other) => place(one) - place(other));
  for (const widget of saved) widget.flowcacheFolded = Boolean(widget.options?.advanced);
  if (Object.keys(shown).length) for (const widget of saved) after(widget, "callback", () => fold(node));
  if (first.length) saveInOrder(node, inputs);
  if (saved.some((/** @type {any} */ widget) => widget.flowcacheFolded)) addMore(node);
  after(node, "onConfigure", () => fold(node));
  fold(node);
}

/**
 * Values go into a file, and come from one, in the order of the inputs; what a file of before an input existed lacks has its default.
 * @param {any} node @param {{name: string, value: any}[]} inputs
 */
function saveInOrder(node, inputs) {
  after(node, "onSerialize", (/** @type {any} */ data) => {
    if (!Array.isArray(data.widgets_values)) return;
    const values = new Map(node.widgets.map((/** @type {any} */ widget, /** @type {number} */ n) => [widget.name, data.widgets_values[n]]));
    data.widgets_values = inputs.map(({ name }) => values.get(name) ?? null);
  });
  after(node, "onConfigure", (/** @type {any} */ data) => {
    if (!Array.isArray(data.widgets_values)) return;
    inputs.forEach(({ name, value }, n) => {
      const widget = widgetOf(node, name);
      if (widget) widget.value = n < data.widgets_values.length ? data.widgets_values[n] : value;
    });
  });
}

/**
 * In the canvas renderer, which has no such button of its own: brings in sight what is folded away.
 * @param {any} node
 */
function addMore(node) {
  const toggle = () => {
    node.showAdvanced = !node.showAdvanced;
    fold(node);
    name();
  };
  const more = node.addWidget("button", "more settings", null, toggle, { serialize: false, canvasOnly: true });
  const name = () => (more.label = node.showAdvanced ? STRINGS.fewer : STRINGS.more);
  more.serialize = false;
  name();
  after(node, "onConfigure", name);
}

/**
 * Calls `then` after a method that the host calls, with the same arguments.
 * @param {any} owner @param {string} name @param {(...given: any[]) => void} then
 */
export function after(owner, name, then) {
  const before = owner[name];
  owner[name] = function (/** @type {any[]} */ ...given) {
    const out = before?.apply(this, given);
    then(...given);
    return out;
  };
}
