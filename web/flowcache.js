// @ts-check
// What the page adds to a node of this pack when it is made: order of its widgets, panel, text.
import { app } from "../../scripts/app.js";
import { convertLength } from "./length.js";
import { addPanel } from "./live_panel.js";
import { addText } from "./node_text.js";
import { arrange } from "./widgets.js";

app.registerExtension({
  name: "flowcache.nodes",
  nodeCreated(/** @type {any} */ node) {
    if (!node.comfyClass?.startsWith("FlowCache")) return;
    arrange(node);
    convertLength(node);
    addPanel(node);
    addText(node);
    node.setSize(node.computeSize());
  },
});
