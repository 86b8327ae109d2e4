// @ts-check
// Hands what a node of ours has sent to the page to whoever shows it: when it has run, when the host kept its result, when its workflow comes
// back to the front, and when the page is loaded again.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { nodeAt, nodeNamed, rootGraph, walk } from "./graph.js";

const LOOKED_THROUGH = 20; // of the host's latest runs

/** @typedef {{text?: string[], flowcache?: string[], fps?: number[], flowcache_node?: string[]}} Output `flowcache_node`: the kind of node it is of */
/** @typedef {(node: any, output: Output, workflow?: string) => void} Listener `workflow`: of the prompt, where it is known */

/** @type {Listener[]} */
const listeners = [];
/** @type {(() => void)[]} */
const afterwards = [];
/** Nodes that something was shown on since they were made. */
const shown = new WeakSet();

/** @param {Listener} listener called with every output of a node of this pack */
export function onOutput(listener) {
  listeners.push(listener);
}

/** @param {() => void} listener called when a workflow was opened and what is in the history has been shown */
export function onRestored(listener) {
  afterwards.push(listener);
}

/** Whether a node is one of this pack. @param {any} node */
const isOurs = (node) => Boolean(node?.comfyClass?.startsWith("FlowCache"));

/** @param {any} node @param {Output | null | undefined} output @param {string} [workflow] */
function handOn(node, output, workflow) {
  if (!isOurs(node) || !output) return;
  if (output.flowcache_node && output.flowcache_node[0] !== node.comfyClass) return; // of a node of another workflow that has the same number
  shown.add(node);
  for (const listener of listeners) listener(node, output, workflow);
}

/**
 * Whether a node's widgets still have the values that it ran with.
 * @param {any} node @param {Record<string, unknown>} inputs
 */
function unchanged(node, inputs) {
  return (node.widgets ?? []).every((/** @type {any} */ widget) => {
    const then = inputs[widget.name];
    return then === undefined || Array.isArray(then) || String(then) === String(widget.value);
  });
}

/** Shows again what the host still knows of this workflow's runs, the latest first, on nodes that nothing was shown on yet. */
async function restore() {
  if (!walk().some(({ node }) => isOurs(node))) return;
  const workflow = rootGraph()?.id;
  const answer = await api.fetchApi(`/history?max_items=${LOOKED_THROUGH}`);
  const history = answer.ok ? await answer.json() : {};
  if (rootGraph()?.id !== workflow) return;
  const runs = Object.values(history).filter((run) => run?.prompt?.[3]?.extra_pnginfo?.workflow?.id === workflow);
  runs.sort((one, other) => other.prompt[0] - one.prompt[0]);
  for (const { prompt, outputs } of runs) {
    for (const [id, output] of Object.entries(outputs ?? {})) {
      const node = nodeAt(id);
      const ran = prompt[2][id];
      if (node && ran?.class_type === node.comfyClass && !shown.has(node) && unchanged(node, ran.inputs)) handOn(node, output, workflow);
    }
  }
}

app.registerExtension({
  name: "flowcache.outputs",
  setup() {
    api.addEventListener("executed", (/** @type {any} */ { detail }) => handOn(nodeAt(detail?.display_node ?? detail?.node), detail?.output));
  },
  onNodeOutputsUpdated(/** @type {Record<string, Output>} */ outputs) {
    for (const [name, output] of Object.entries(outputs ?? {})) handOn(nodeNamed(name), output);
  },
  /** The page waits for what is returned here, with every undo: not for the server. */
  afterConfigureGraph() {
    const unread = (/** @type {unknown} */ error) => {
      console.debug("FlowCache: the host's history cannot be read, so earlier texts are not shown again", error);
    };
    restore().catch(unread).then(() => afterwards.forEach((listener) => listener()));
  },
});
