// Draws, under AR Chunk Sampler, what the running sampler computed and reused, and before that what a plan will compute.
// Shows what the server sends; computes nothing.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const EVENT = "flowcache.steps";
const NODE = "FlowCacheSampler";
const SHADES = { 0: "#3a3f4b", 1: "#f7b554", 2: "#4a8cf0", 3: "#4fb477" };
const PLANNED = "rgba(120, 160, 230, 0.75)";
const OMITTED = "rgba(160, 168, 182, 0.45)";
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
    pen.fillText("computed and skipped steps appear here", 4, 14);
    return;
  }
  const plan = state.plan ?? [];
  const waiting = !state.done && state.note;
  if (waiting && !plan.length) {
    pen.fillText(state.note, 4, 12, width - 8);
    return;
  }
  const left = state.done < state.total ? `, ${Math.ceil(state.eta_s)} s left` : "";
  const soFar = state.done ? `: ${Math.round(state.share * 100)}% of tokens computed${left}` : "";
  pen.fillText(waiting ? state.note : `step ${state.done} of ${state.total}${soFar}`, 4, 12, width - 8);
  if (state.history) pen.fillText(`history: ${state.history}`, 4, 26, width - 8);
  const top = state.history ? 32 : 18;
  const rows = state.map.length;
  const steps = state.map[0]?.length ?? 1;
  const cell = (width - 8) / steps;
  const line = Math.min(12, (HEIGHT - 2 - top) / rows);
  const high = Math.max(line - 1.5, line * 0.7);
  const wide = Math.max(cell - 0.6, 0.6);
  state.map.forEach((row, k) => {
    [...row].forEach((digit, j) => {
      const x = 4 + j * cell;
      const y = top + k * line;
      if (digit === "0" && plan[k]?.[j] === "1") return frame(pen, x, y, wide, high);
      const low = plan.length > 0 && digit < 2; // skipped, or to be skipped: a low bar, told from a computed step without its colour
      pen.fillStyle = low && digit === "0" ? OMITTED : SHADES[digit];
      pen.fillRect(x, low ? y + high * 0.65 : y, wide, low ? high * 0.35 : high);
    });
  });
}

// a step that the plan will compute: empty until it has run; where cells are too narrow for an outline, faint
function frame(pen, x, y, wide, high) {
  if (wide < 3) {
    pen.fillStyle = PLANNED.replace("0.75", "0.4");
    pen.fillRect(x, y, wide, high);
    return;
  }
  pen.strokeStyle = PLANNED;
  pen.lineWidth = 0.8;
  pen.strokeRect(x + 0.4, y + 0.4, wide - 0.8, high - 0.8);
}

app.registerExtension({
  name: "flowcache.liveMap",
  setup() {
    api.addEventListener(EVENT, ({ detail }) => findNode(detail.node)?.flowcacheShow?.(detail));
  },
  nodeCreated(node) {
    if (node.comfyClass !== NODE) return;
    const canvas = document.createElement("canvas");
    canvas.style.cssText = `width:100%; min-height:${HEIGHT}px; max-height:${HEIGHT}px; display:block;`;
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
