// @ts-check
// Chunkwise Cache in a workflow that was saved before there were presets: it means the widgets, as it did then, not today's default preset.
import { app } from "../../scripts/app.js";
import { fold } from "./widgets.js";

const NODE = "FlowCacheChunkwise";
const PRESET = 9; // its place among the saved values

app.registerExtension({
  name: "flowcache.savedWorkflows",
  loadedGraphNode(/** @type {any} */ node) {
    if (node.comfyClass !== NODE || !Array.isArray(node.widgets_values) || node.widgets_values.length > PRESET) return;
    const preset = node.widgets?.find((/** @type {any} */ widget) => widget.name === "preset");
    if (preset) preset.value = "custom";
    fold(node);
  },
});
