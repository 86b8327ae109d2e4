// @ts-check
// One run to look at, under AR Chunk Sampler and in the sidebar: what is computed and reused, what that saves, and what a budget keeps. Shows
// what the server sends; computes nothing.
import { FIELD } from "./field.js";
import { Screen } from "./film.js";
import { nodeAt } from "./graph.js";
import { LINE, LiveMap, PALETTES } from "./live_map.js";
import { Run, watch } from "./runs.js";
import { STRINGS } from "./strings.js";
import { after } from "./widgets.js";

const NODE = "FlowCacheSampler";
const HEIGHT = 150;
const FILM_HEIGHT = 150;
const STYLE = `${FIELD} display:flex; flex-direction:column; gap:3px; overflow:hidden;`;

/** @type {WeakMap<object, Panel>} */
const panels = new WeakMap();

/** @param {HTMLElement} parent @param {string} name @param {string} style */
function add(parent, name, style = "") {
  const one = document.createElement("div");
  one.className = `flowcache-${name}`;
  one.style.cssText = `flex:none; ${style}`;
  parent.append(one);
  return one;
}

/** Whether text on this element is dark, which makes the theme a light one. @param {Element} element */
function isLight(element) {
  const [red = 255, green = 255, blue = 255] = (getComputedStyle(element).color.match(/[\d.]+/g) ?? []).map(Number);
  return 0.299 * red + 0.587 * green + 0.114 * blue < 128;
}

/** A place where a run is looked at. */
export class Panel {
  /** @param {number} height in pixels, at least */
  constructor(height = HEIGHT) {
    this.root = document.createElement("div");
    this.root.className = "flowcache-panel";
    this.root.setAttribute("role", "status");
    this.root.style.cssText = `min-height:${height}px; ${STYLE}`;
    this.headline = add(this.root, "headline");
    this.pace = add(this.root, "pace");
    this.drift = add(this.root, "drift", "white-space:nowrap; overflow:hidden; text-overflow:ellipsis;");
    this.memory = add(this.root, "memory", "position:relative; padding:0 3px;");
    this.explained = "";
    this.legend = add(this.root, "legend", "display:flex; gap:10px; align-items:flex-end;");
    this.field = add(this.root, "map", "flex:1 1 0; min-height:40px; position:relative;");
    this.canvas = document.createElement("canvas");
    this.canvas.style.cssText = "position:absolute; inset:0; width:100%; height:100%;";
    this.field.append(this.canvas);
    this.map = new LiveMap(this.canvas);
    this.screen = new Screen();
    this.root.append(this.screen.root);
    this.height = height;
    this.run = new Run();
    this.drawing = 0;
    this.size = { width: 0, height: 0 }; // of the map; asked for while texts change it would have the page laid out once more
    new ResizeObserver(([{ contentRect }]) => {
      this.size = contentRect;
      this.draw();
    }).observe(this.field);
    this.draw();
  }

  /** @param {Run} run */
  look(run) {
    this.run = run;
    this.screen.look(run.film);
    this.draw();
  }

  /** Whether there is to be room for a film. @param {boolean} whether */
  expectFilm(whether) {
    this.screen.expected = whether;
    this.screen.look(this.run.film);
    this.root.style.minHeight = `${this.least}px`;
  }

  /** Pixels of height. */
  get least() {
    return this.height + (this.screen.expected ? FILM_HEIGHT : 0);
  }

  /** At most once a frame. */
  draw() {
    this.drawing ||= requestAnimationFrame(() => {
      this.drawing = 0;
      this.paint();
    });
  }

  paint() {
    const { state, note } = this.run;
    const palette = PALETTES[isLight(this.root) ? "light" : "dark"];
    write(this.headline, state ? [state.headline, state.stopped ? STRINGS.stopped : state.left].filter(Boolean).join(", ") : note);
    write(this.pace, state ? state.pace || (state.done ? "" : state.note) : "");
    write(this.drift, (!state?.stopped && state?.drift) || "");
    write(this.memory, state?.memory ?? "");
    this.memory.style.background = bar(state?.kept ?? null, palette);
    this.explain(state ? entries(state, palette) : []);
    this.field.style.maxHeight = state ? `${state.chunks * LINE}px` : "none"; // the rest is for the film
    this.canvas.hidden = !state;
    if (state) this.map.draw(state, palette, this.size.width, this.size.height);
  }

  /** @param {LegendEntry[]} entries of the legend */
  explain(entries) {
    const now = JSON.stringify(entries);
    if (now === this.explained) return;
    this.explained = now;
    this.legend.replaceChildren(...entries.map(drawn));
  }
}

/** What has not changed is not written again: that would have the page laid out. @param {HTMLElement} element @param {string} text */
function write(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** A bar behind a text, filled as far as a budget is. @param {number | null} share @param {import("./live_map.js").Palette} palette */
function bar(share, palette) {
  if (share === null) return "none";
  const end = `${Math.min(100, Math.max(0, share * 100))}%`;
  return `linear-gradient(90deg, ${palette.planned} ${end}, ${palette.none} ${end})`;
}

/** @typedef {[word: string, colour: string, tall: number]} LegendEntry */

/** @param {import("./run_state.js").State} state @param {import("./live_map.js").Palette} palette @returns {LegendEntry[]} */
function entries(state, palette) {
  const planned = state.plan.length > 0;
  const part = state.map.some((steps) => /[a-j]/.test(steps));
  /** @type {LegendEntry[]} */
  const inPart = part ? [[STRINGS.inPart, palette.part, 6]] : [];
  return [[STRINGS.computed, palette.computed, 9], ...inPart, [planned ? STRINGS.skipped : STRINGS.reused, palette.reused, 3]];
}

/** @param {LegendEntry} entry */
function drawn([word, colour, tall]) {
  const one = document.createElement("span");
  one.style.cssText = "display:flex; gap:4px; align-items:baseline;";
  const mark = document.createElement("span");
  mark.style.cssText = `width:7px; height:${tall}px; background:${colour}; display:inline-block;`;
  one.append(mark, word);
  return one;
}

/** @param {any} node */
export function addPanel(node) {
  if (node.comfyClass !== NODE) return;
  const panel = new Panel();
  const widget = node.addDOMWidget("live_panel", "flowcache_live_panel", panel.root, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => panel.least,
  });
  widget.serialize = false;
  const expect = () => {
    panel.expectFilm(node.inputs?.some((/** @type {any} */ input) => input.name === "vae" && input.link != null) ?? false);
    const [, height] = node.computeSize();
    if (node.size[1] < height) node.setSize([node.size[0], height]);
  };
  after(node, "onConnectionsChange", expect);
  after(node, "onConfigure", expect);
  panels.set(node, panel);
}

watch((path, run) => panels.get(nodeAt(path))?.look(run));
