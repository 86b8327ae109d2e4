// What tests/test_page.py asserts about, as one line of JSON: replay.mjs URL RECORDED.json canvas|vue
// URL is that of backend.py: the page is the real one, the runs are recorded or made up here.
import fs from "node:fs";
import { CHUNKS, STEPS, measure } from "./large.mjs";
import { fit, inSight, launch, load, open, queue, ready } from "./page.mjs";

const [url, file, renderer] = process.argv.slice(2);
const { workflow: shipped, events: happened } = JSON.parse(fs.readFileSync(file, "utf8"));
const workflow = { ...shipped, id: crypto.randomUUID() }; // of which the backend knows no run
const vue = renderer === "vue";
const SAMPLER = "FlowCacheSampler";
const id = String(workflow.nodes.find((node) => node.type === SAMPLER).id);
const found = {};

const browser = await launch();
try {
  const page = await open(browser, url, { vue, light: vue });
  for (const step of [recorded, intoView, kept, events, ends, zoom, large, two, inside, removed, every]) await step(page);
  found.faults = page.faults;
} finally {
  await browser.close();
}
console.log(JSON.stringify(found));

function post(path, body) {
  return fetch(url + path, { method: "POST", body: JSON.stringify(body) });
}

/** From the server; the page has drawn it when this returns. */
async function send(page, ...messages) {
  await post("/test/send", messages);
  await page.waitForTimeout(150);
  await drawn(page);
}

function drawn(page) {
  return page.evaluate(() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done))));
}

function steps(node, run, number, more = {}) {
  const map = { 0: "2100", 1: "0000" };
  const texts = { headline: `message ${number} of ${run}`, pace: "", left: "5 s left", note: "", memory: "", kept: null };
  const message = { node, run, number, whole: true, chunks: 2, steps: 4, map, plan: null, done: number, total: 8, ...texts, ended: false, ...more };
  return ["flowcache.steps", message];
}

/** What stands on the samplers, in the order of the graph, and in the sidebar. */
function shown(page) {
  return page.evaluate((type) => {
    const of = (graph) => graph.nodes.flatMap((node) => (node.subgraph ? of(node.subgraph) : node.type === type ? [node] : []));
    const element = (node) => node.widgets.find(({ name }) => name === "live_panel").element;
    const sections = [...document.querySelectorAll(".flowcache-sidebar section")];
    return {
      nodes: of(window.app.rootGraph ?? window.app.graph).map((node) => element(node).innerText),
      list: sections.map((one) => one.innerText),
      sidebar: document.querySelector(".flowcache-sidebar")?.innerText,
    };
  }, SAMPLER);
}

/** By canvas of the page's panels: how many colours are on it, and its size in sight. */
function painted(page) {
  return page.evaluate(() =>
    [...document.querySelectorAll(".flowcache-panel canvas")].map((canvas) => {
      const { width, height, clientWidth } = canvas;
      const pixels = clientWidth ? new Uint32Array(canvas.getContext("2d").getImageData(0, 0, width, height).data.buffer) : [];
      return { film: Boolean(canvas.closest(".flowcache-film")), colours: new Set(pixels).size };
    }),
  );
}

function toggle(page) {
  return page.evaluate(() => window.app.extensionManager.sidebarTab.toggleSidebarTab("flowcache"));
}

/** The graph as it is saved, but for which part of it is seen and for the sizes of the host's own nodes, which grow with what they show. */
function saved(page) {
  return page.evaluate(() => {
    const graph = window.app.graph.serialize();
    const nodes = graph.nodes.map((node) => (node.type.startsWith("FlowCache") ? node : { ...node, size: null }));
    return { ...graph, nodes, extra: { ...graph.extra, ds: null } };
  });
}

/** Where two values differ, and how. */
function changes(before, after, where = "") {
  if (before === after) return [];
  const both = [before, after];
  if (both.some((one) => one === null || typeof one !== "object")) return [`${where}: ${both.map((one) => JSON.stringify(one)).join(" -> ")}`];
  return [...new Set(both.flatMap(Object.keys))].flatMap((key) => changes(before[key], after[key], `${where}/${key}`));
}

async function recorded(page) {
  await load(page, workflow);
  const before = await saved(page);
  await toggle(page);
  await drawn(page);
  found.before = await shown(page);
  found.end = await queue(page);
  await page.waitForTimeout(300);
  found.after = await shown(page);
  found.painted = await painted(page);
  found.colours = await page.evaluate(() => {
    const { color, backgroundColor } = getComputedStyle(document.querySelector(".flowcache-panel"));
    return [color, backgroundColor].map((one) => one.match(/[\d.]+/g).slice(0, 3).map(Number));
  });
  found.changes = changes(before, await saved(page));
  await page.waitForTimeout(2500); // until the page has stored what is on it
  await page.reload({ waitUntil: "domcontentloaded" });
  await ready(page);
  await page.waitForTimeout(1000);
  if (!(await page.$(".flowcache-sidebar"))) await toggle(page);
  await fit(page);
  found.reloaded = await shown(page);
}

/** A click in the list, while something else is in view. */
async function intoView(page) {
  const before = await saved(page);
  await page.evaluate(() => (window.app.canvas.ds.offset = [-9000, -9000]));
  await page.click(".flowcache-sidebar button");
  found.inView = await comesIntoView(page, id);
  found.changesInView = changes(before, await saved(page));
}

/** Whether the middle of a node comes into view, and stays there: the canvas moves for some time. */
async function comesIntoView(page, path) {
  const seen = (path) => {
    const { canvas } = window.app;
    const node = canvas.graph.getNodeById(Number(path.split(":").at(-1)));
    const [left, top, width, height] = canvas.visible_area;
    const [x, y] = [node.pos[0] + node.size[0] / 2, node.pos[1] + node.size[1] / 2];
    const [within, before] = [x > left && x < left + width && y > top && y < top + height, window.flowcacheView];
    window.flowcacheView = canvas.ds.offset.join();
    return within && window.flowcacheView === before;
  };
  return page.waitForFunction(seen, path, { timeout: 60_000, polling: 500 }).then(() => true, () => false);
}

/** A copy of the workflow, of which the host has kept every result: it samples nothing. */
async function kept(page) {
  await load(page, { ...workflow, id: crypto.randomUUID() });
  await post("/test/next", { kept: true });
  const end = await queue(page);
  await page.waitForTimeout(300);
  found.kept = { end, ...(await shown(page)) };
}

/** Messages in no order, of no node, of another workflow, or none. */
async function events(page) {
  const wrong = [null, {}, 7, { node: id }, { node: "99:1", chunks: 1, steps: 1, map: {} }, steps(id, "one", 9, { map: null })[1]];
  await send(page, ...wrong.map((data) => ["flowcache.steps", data]), ...wrong.map((data) => ["flowcache.film", data]));
  await send(page, steps(id, "one", 5), steps(id, "one", 3), steps(id, "elsewhere", 9, { workflow: "another" }));
  const strips = happened.filter(([kind]) => kind === "flowcache.film").map(([kind, data]) => [kind, { ...data, workflow: null, run: "one" }]);
  await send(page, strips[0], strips[2], strips[0]);
  found.order = await shown(page);
  await send(page, strips[1], strips[0]);
  found.healed = await shown(page);
}

/** A run that is interrupted, and one that fails: by the server's own events, in the middle of the recorded run. */
async function ends(page) {
  for (const end of ["interrupted", "error"]) {
    const more = { node_id: id, node_type: SAMPLER, executed: [], exception_message: "it broke", exception_type: "ValueError", traceback: [] };
    await post("/test/next", { events: 20, end: [`execution_${end}`, { prompt_id: "", ...more, current_inputs: {}, current_outputs: {} }] });
    found[end] = { end: await queue(page), ...(await shown(page)) };
    await page.keyboard.press("Escape");
  }
}

async function zoom(page) {
  await send(page, steps(id, "zoomed", 1));
  found.zoom = {};
  for (const scale of [0.15, 1, 3]) {
    await page.evaluate((scale) => window.app.canvas.ds.changeScale(scale), scale);
    await page.evaluate((id) => window.app.canvas.centerOnNode(window.app.graph.getNodeById(Number(id))), id);
    await page.waitForTimeout(400);
    found.zoom[scale] = (await painted(page)).filter(({ film }) => !film).map(({ colours }) => colours);
  }
  await fit(page);
}

async function large(page) {
  const size = { chunks: CHUNKS, steps: STEPS };
  const map = Object.fromEntries(Array.from({ length: CHUNKS }, (_, k) => [k, "0".repeat(STEPS)]));
  await send(page, steps(id, "large", 1, { ...size, map }));
  found.large = await measure(page, steps(id, "large", 1, { ...size, whole: false })[1]);
  await drawn(page);
  found.largeText = await shown(page);
}

async function two(page) {
  const other = await page.evaluate((type) => {
    const node = window.LiteGraph.createNode(type);
    node.title = "Another sampler";
    window.app.graph.add(node);
    return String(node.id);
  }, SAMPLER);
  await send(page, steps(id, "first", 1), steps(other, "second", 2));
  await page.waitForTimeout(1200); // the list looks again every second
  found.two = await shown(page);
  await page.evaluate((other) => window.app.graph.remove(window.app.graph.getNodeById(Number(other))), other);
}

/** In a subgraph that is used twice: two samplers, of which the page has one node. */
async function inside(page) {
  const paths = await page.evaluate((id) => {
    const { graph } = window.app;
    const { subgraph, node } = graph.convertToSubgraph(new Set([graph.getNodeById(Number(id))]));
    const again = window.LiteGraph.createNode(subgraph.id);
    graph.add(again);
    return [node, again].map((one) => `${one.id}:${subgraph.nodes[0].id}`);
  }, id);
  await page.waitForTimeout(1200);
  await send(page, steps(paths[0], "first use", 1), steps(paths[1], "second use", 2));
  found.paths = paths;
  found.inside = await shown(page);
  await page.click(".flowcache-sidebar button");
  found.insideView = await comesIntoView(page, paths[0]);
}

/** A workflow without the sampler that messages still come of. */
async function removed(page) {
  await load(page, { ...workflow, id: crypto.randomUUID(), nodes: workflow.nodes.filter((node) => node.type !== SAMPLER), links: [] });
  await send(page, steps(id, "late", 1), ["flowcache.film", { node: id, run: "late", first: 0, frames: 1, fps: 24, picture: "", note: "" }]);
  await page.waitForTimeout(1200);
  found.removed = await shown(page);
}

/** Every node of the pack, as it is when it is put into a graph. */
async function every(page) {
  await load(page, { ...workflow, id: crypto.randomUUID(), nodes: [], links: [] });
  await page.evaluate(() => {
    const types = Object.keys(window.LiteGraph.registered_node_types).filter((type) => type.startsWith("FlowCache"));
    for (const type of types) window.app.graph.add(window.LiteGraph.createNode(type));
  });
  await page.waitForTimeout(500);
  found.rows = await inSight(page, vue);
}
