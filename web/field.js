// @ts-check
// What a text or a panel on a node looks like: a field of the theme, in Nodes 2.0 with the background of its own fields.

export const FIELD =
  "box-sizing:border-box; padding:4px 6px; border-radius:4px; font:11px/1.35 sans-serif; color:var(--input-text, #ddd); " +
  "background:var(--flowcache-field, var(--comfy-input-bg, #222));";

const sheet = document.createElement("style");
sheet.append("[data-node-id] { --flowcache-field: var(--component-node-widget-background, var(--comfy-input-bg, #222)); }");
document.head.append(sheet);
