// @ts-check
// Shows on a node the text that it sent when it ran: what its settings come to, what was snapped or found, the report.
import { FIELD } from "./field.js";
import { onOutput } from "./outputs.js";
import { STRINGS } from "./strings.js";

/** Nodes that show a text, and its least height in pixels. */
const TEXT_HEIGHT = /** @type {Record<string, number>} */ ({
  FlowCacheChunkwise: 56,
  FlowCacheMotion: 56,
  FlowCachePolicy: 56,
  FlowCacheKVCompressor: 84,
  FlowCacheDevices: 84,
  FlowCacheLatent: 40,
  FlowCacheConditionFrames: 40,
  FlowCacheMagiTokens: 40,
  FlowCachePromptSchedule: 40,
  FlowCacheReport: 150,
  FlowCacheCompare: 110,
  FlowCacheSaveVideo: 40,
});
const STYLE = `${FIELD} overflow:auto; white-space:pre-wrap; overflow-wrap:anywhere; user-select:text;`;

/** @type {WeakMap<object, HTMLElement>} */
const texts = new WeakMap();

/**
 * Below the widgets; not saved with the workflow.
 * @param {any} node
 */
export function addText(node) {
  const height = TEXT_HEIGHT[node.comfyClass];
  if (!height) return;
  const text = document.createElement("div");
  text.className = "flowcache-node-text";
  text.setAttribute("role", "status");
  text.style.cssText = `min-height:${height}px; ${STYLE} opacity:0.6;`;
  text.textContent = STRINGS.textWaiting;
  text.addEventListener("wheel", (event) => text.scrollHeight > text.clientHeight && event.stopPropagation(), { passive: true });
  const widget = node.addDOMWidget("node_text", "flowcache_node_text", text, { serialize: false, hideOnZoom: false, getMinHeight: () => height });
  widget.serialize = false;
  texts.set(node, text);
}

onOutput((node, output) => {
  const text = texts.get(node);
  if (!text || !Array.isArray(output.text)) return;
  text.style.opacity = "1";
  text.textContent = output.text.join("\n");
});
