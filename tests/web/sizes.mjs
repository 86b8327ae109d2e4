// How much room a node takes up after a run, in both renderers, from the page of a running host: sizes.mjs URL FILM.mp4 OUT.json
// Every shipped workflow is loaded, its nodes are sent what a run would send, with FILM as every film, and are made as low as they go.
// Written by type, of samplers with a partial film and of notes apart: `least` height below the title, and what a renderer adds `below` the height that a node is given.
import fs from "node:fs";
import path from "node:path";
import { fileURLToPath } from "node:url";
import { launch, load, open } from "./page.mjs";

const [url, film, out] = process.argv.slice(2);
const FOLDER = path.join(path.dirname(fileURLToPath(import.meta.url)), "..", "..", "workflows");
const GIVEN = 2000; // pixels of height, more than any node needs

/** @type {Record<string, Record<string, {least: number, below: number}>>} */
const sizes = {};

const browser = await launch();
try {
  for (const renderer of ["canvas", "vue"]) {
    const page = await open(browser, url, { vue: renderer === "vue" });
    await page.route(/\/view\?.*mp4/, (route) => route.fulfill({ path: film, contentType: "video/mp4" }));
    await page.route(/\/view\?.*png/, async (route) => route.fulfill({ body: await picture(page), contentType: "image/png" }));
    for (const name of fs.readdirSync(FOLDER).filter((one) => one.endsWith(".json"))) {
      await load(page, JSON.parse(fs.readFileSync(path.join(FOLDER, name), "utf8")));
      await send(page);
      const [low, high] = [await bottoms(page, renderer, name, 1), await bottoms(page, renderer, name, GIVEN)];
      for (const [kind, least] of Object.entries(low)) {
        const known = ((sizes[renderer] ??= {})[kind] ??= { least: 0, below: 0 });
        Object.assign(known, { least: Math.max(known.least, least), below: Math.max(known.below, high[kind] - GIVEN) });
      }
    }
    await page.close();
  }
} finally {
  await browser.close();
}
const sorted = (some) => Object.fromEntries(Object.entries(some).sort(([one], [other]) => (one < other ? -1 : 1)));
const lines = (some) => Object.entries(sorted(some)).map(([kind, size]) => `  ${JSON.stringify(kind)}: ${JSON.stringify(size)}`).join(",\n");
fs.writeFileSync(out, `{${Object.entries(sizes).map(([renderer, some]) => `"${renderer}": {\n${lines(some)}\n}`).join(",\n")}}\n`);

/** As wide as a map of a run. */
async function picture(page) {
  const text = await page.evaluate(() => Object.assign(document.createElement("canvas"), { width: 790, height: 320 }).toDataURL().split(",")[1]);
  return Buffer.from(text, "base64");
}

/** What a run would send to every node that shows something. */
async function send(page) {
  await page.evaluate(() => {
    const sentence = "computed 97 of 250 chunk-steps, 40% of all tokens with the clean passes of finished chunks";
    const LINES = { FlowCacheReport: 6, FlowCacheCompare: 5, FlowCacheKVCompressor: 3 };
    const file = (/** @type {string} */ filename) => ({ images: [{ filename, subfolder: "", type: "temp" }], animated: [filename.endsWith("mp4")] });
    for (const { id, type } of window.app.graph.nodes) {
      const shown = /SaveVideo/.test(type) ? file("film.mp4") : /Preview|Report|Compare/.test(type) ? file("map.png") : {};
      const detail = { node: String(id), display_node: String(id), prompt_id: "sizes", output: { ...shown, text: Array(LINES[type] ?? 2).fill(sentence) } };
      window.app.api.dispatchEvent(new CustomEvent("executed", { detail }));
    }
  });
  await page.waitForTimeout(3000);
}

/** By kind: the largest distance from a node's place to its lower end where it is given this height, in pixels of the graph. */
async function bottoms(page, renderer, file, height) {
  await page.evaluate((height) => window.app.graph.nodes.forEach((node) => node.setSize([node.size[0], height])), height);
  await page.waitForTimeout(1500);
  return page.evaluate(({ vue, workflow }) => {
    const out = {};
    const { nodes } = window.app.graph;
    const { scale } = window.app.canvas.ds;
    const lower = (element) => Math.max(...[element, ...element.children].map((one) => one.getBoundingClientRect().bottom));
    const drawn = (node) => {
      const element = document.querySelector(`[data-node-id="${node.id}"]`);
      return element ? (lower(element) - element.getBoundingClientRect().top) / scale - window.LiteGraph.NODE_TITLE_HEIGHT : 0;
    };
    for (const node of nodes) {
      const linked = node.type === "FlowCacheSampler" && node.inputs.some((one) => one.name === "vae" && one.link != null);
      const kind = node.type + (linked ? " with a partial film" : node.type === "MarkdownNote" ? ` of ${workflow}` : "");
      const bottom = vue ? drawn(node) : Math.max(node.size[1], node.computeSize()[1]);
      out[kind] = Math.max(out[kind] ?? 0, Math.ceil(bottom));
    }
    return out;
  }, { vue: renderer === "vue", workflow: path.parse(file).name });
}
