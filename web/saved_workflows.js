// Chunkwise Cache in a workflow that was saved before there were presets: it means the widgets, as it did then, not today's default preset.
import { app } from "../../scripts/app.js";

const NODE = "FlowCacheChunkwise";
const PRESET = 9; // its place among the saved values

app.registerExtension({
  name: "flowcache.savedWorkflows",
  loadedGraphNode(node) {
    if (node.comfyClass !== NODE || !Array.isArray(node.widgets_values) || node.widgets_values.length > PRESET) return;
    const preset = node.widgets?.find((widget) => widget.name === "preset");
    if (preset) preset.value = "custom";
  },
});
