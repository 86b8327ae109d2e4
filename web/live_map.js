// Draws, under AR Chunk Sampler, what the running sampler computed and reused. Shows what the server sends; computes nothing.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const EVENT = "flowcache.steps";
const NODE = "FlowCacheSampler";
const SHADES = { 0: "#3a3f4b", 1: "#f7b554", 2: "#4a8cf0", 3: "#4fb477" };
const HEIGHT = 74;

// "1:2:3" is node 3 in subgraph node 2 of node 1
function findNode(path) {
  let graph = app.graph;
  let node = null;
  for (const id of String(path).split(":")) {
    node = graph?.getNodeById?.(Number(id)) ?? null;
    graph = node?.subgraph;
  }
  return node;
}

function draw(canvas, state) {
  const width = canvas.clientWidth || 260;
  const scale = window.devicePixelRatio || 1;
  canvas.width = width * scale;
  canvas.height = HEIGHT * scale;
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  pen.font = "11px sans-serif";
  pen.fillStyle = "#9aa3b2";
  if (!state) {
    pen.fillText("computed and reused steps appear here", 4, 14);
    return;
  }
  if (!state.done && state.note) {
    pen.fillText(state.note, 4, 12, width - 8);
    return;
  }
  const computed = Math.round(state.share * 100);
  const left = state.done < state.total ? `, ${Math.ceil(state.eta_s)} s left` : "";
  pen.fillText(`step ${state.done} of ${state.total}: ${computed}% computed${left}`, 4, 12);
  if (state.history) pen.fillText(`history: ${state.history}`, 4, 26, width - 8);
  const top = state.history ? 32 : 18;
  const rows = state.map.length;
  const steps = state.map[0]?.length ?? 1;
  const cell = (width - 8) / steps;
  const line = Math.min(12, (HEIGHT - 2 - top) / rows);
  state.map.forEach((row, k) => {
    [...row].forEach((digit, j) => {
      pen.fillStyle = SHADES[digit];
      pen.fillRect(4 + j * cell, top + k * line, Math.max(cell - 0.6, 0.6), Math.max(line - 1.5, line * 0.7));
    });
  });
}

app.registerExtension({
  name: "flowcache.liveMap",
  setup() {
    api.addEventListener(EVENT, ({ detail }) => findNode(detail.node)?.flowcacheShow?.(detail));
  },
  nodeCreated(node) {
    if (node.comfyClass !== NODE) return;
    const canvas = document.createElement("canvas");
    canvas.style.cssText = `width:100%; min-height:${HEIGHT}px; display:block;`;
    let state = null;
    node.addDOMWidget("live_map", "flowcache_live_map", canvas, {
      serialize: false,
      hideOnZoom: false,
      getMinHeight: () => HEIGHT,
      getMaxHeight: () => HEIGHT,
    });
    node.flowcacheShow = (next) => {
      state = next;
      draw(canvas, state);
    };
    new ResizeObserver(() => draw(canvas, state)).observe(canvas);
  },
});
