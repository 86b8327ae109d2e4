// @ts-check
// Draws the chunks x steps of a run. Where cells are large enough, height tells what happened: full was computed, half computed in part, low
// reused or skipped, an empty frame will be computed. Where they are not, brightness does. Neither needs colour vision.

/** @typedef {import("./run_state.js").State} State */
/** @typedef {{none: string, planned: string, reused: string, part: string, computed: string}} Palette */

/** @type {Record<"dark" | "light", Palette>} brightness goes up, or down, from what has not run to what was computed */
export const PALETTES = {
  dark: { none: "#33373f", planned: "#4d5566", reused: "#a86f2b", part: "#55b98a", computed: "#a9d1ff" },
  light: { none: "#d5d8de", planned: "#b9c2d3", reused: "#dd9a3c", part: "#2b8457", computed: "#15407f" },
};
/** Pixels of a line, at most. */
export const LINE = 14;
const LEAST = 4; // pixels of a line from which its height is seen

/** @param {string} letter @param {boolean} planned */
function kind(letter, planned) {
  if (letter === "2") return "computed";
  if (letter === "1") return "reused";
  if (letter >= "a" && letter <= "j") return "part";
  return planned ? "planned" : "none";
}

/** @param {string} letter of a step in part: the share of its tokens that ran, 0..1 */
const shareOf = (letter) => (letter.charCodeAt(0) - 96) / 10;

/** As a pixel of a canvas, in the order of bytes of this machine. @param {string} hex */
function packed(hex) {
  const bytes = [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  return new Uint32Array(new Uint8Array([...bytes, 255]).buffer)[0];
}

/** One map on one canvas. What of it has not changed is not drawn again where there are many cells. */
export class LiveMap {
  /** @param {HTMLCanvasElement} canvas */
  constructor(canvas) {
    this.canvas = canvas;
    this.small = document.createElement("canvas"); // a pixel per cell
    /** @type {ImageData | null} */
    this.cells = null;
    this.palette = PALETTES.dark;
    /** @type {string[]} what each line was drawn from */
    this.lines = [];
  }

  /** @param {State} state @param {Palette} palette @param {number} width @param {number} height of the canvas in sight */
  draw(state, palette, width, height) {
    if (!width || !height) return;
    const scale = window.devicePixelRatio || 1;
    const pen = this.canvas.getContext("2d");
    if (!pen) return;
    const [wide, high] = [Math.round(width * scale), Math.round(height * scale)];
    if (this.canvas.width !== wide || this.canvas.height !== high) Object.assign(this.canvas, { width: wide, height: high });
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    pen.clearRect(0, 0, width, height);
    const line = Math.min(LINE, height / state.chunks);
    if (line >= LEAST && width / state.steps >= 2) this.shapes(pen, state, palette, width, line);
    else this.pixels(pen, state, palette, width, line * state.chunks);
    this.palette = palette;
  }

  /** @param {CanvasRenderingContext2D} pen @param {State} state @param {Palette} palette @param {number} width @param {number} line */
  shapes(pen, state, palette, width, line) {
    const cell = width / state.steps;
    const [wide, full] = [Math.max(cell - 0.8, 0.8), line - 1];
    state.map.forEach((steps, k) => {
      for (let j = 0; j < steps.length; j++) {
        const what = kind(steps[j], state.plan[k]?.[j] === "1");
        const tall = what === "reused" ? full * 0.25 : what === "part" ? full * (0.35 + 0.4 * shareOf(steps[j])) : what === "none" ? 1 : full;
        const [x, y] = [j * cell, k * line + full - tall];
        if (what === "planned" && wide >= 3 && full >= 5) {
          pen.strokeStyle = palette.planned;
          pen.strokeRect(x + 0.5, y + 0.5, wide - 1, tall - 1);
          continue;
        }
        pen.fillStyle = palette[what];
        pen.fillRect(x, y, wide, tall);
      }
    });
  }

  /** @param {CanvasRenderingContext2D} pen @param {State} state @param {Palette} palette @param {number} width @param {number} height */
  pixels(pen, state, palette, width, height) {
    const { small } = this;
    const anew = !this.cells || small.width !== state.steps || small.height !== state.chunks || this.palette !== palette;
    const dots = small.getContext("2d");
    if (!dots) return;
    if (anew) Object.assign(small, { width: state.steps, height: state.chunks });
    if (anew) Object.assign(this, { cells: dots.createImageData(state.steps, state.chunks), lines: [] });
    const cells = /** @type {ImageData} */ (this.cells);
    const colours = new Uint32Array(cells.data.buffer);
    const shades = Object.fromEntries(Object.entries(palette).map(([name, hex]) => [name, packed(hex)]));
    for (let k = 0; k < state.chunks; k++) {
      const [steps, plan] = [state.map[k], state.plan[k] ?? ""];
      if (this.lines[k] === steps + plan) continue;
      this.lines[k] = steps + plan;
      for (let j = 0; j < state.steps; j++) colours[k * state.steps + j] = shades[kind(steps[j] ?? "0", plan[j] === "1")];
    }
    dots.putImageData(cells, 0, 0);
    pen.imageSmoothingEnabled = height < state.chunks;
    pen.drawImage(small, 0, 0, width, height);
  }
}
