// What tests/test_page_host.py asserts about, as one line of JSON: check.mjs URL WORKFLOW.json canvas|vue
import fs from "node:fs";
import { connectVae, drawn, fit, inSight, launch, load, open, queue, ready, settledTexts, turn } from "./page.mjs";

const [url, file, renderer] = process.argv.slice(2);
const vue = renderer === "vue";
const workflow = JSON.parse(fs.readFileSync(file, "utf8"));
const CHUNKWISE = "FlowCacheChunkwise";
const found = {};

const browser = await launch();
try {
  let page = await open(browser, url, { vue });
  await load(page, workflow);
  await rows(page);
  await saved(page);
  await length(page);
  await load(page, workflow);
  found.before = await settledTexts(page);
  found.end = await queue(page);
  found.after = await settledTexts(page);
  await page.waitForTimeout(2500); // until the page has stored what is on it
  await page.reload({ waitUntil: "domcontentloaded" });
  await ready(page);
  await page.waitForTimeout(1000);
  await fit(page);
  found.reloaded = await settledTexts(page);
  found.faults = page.faults;
  await page.close();

  page = await open(browser, url, { vue, light: true });
  await load(page, workflow);
  found.endAgain = await queue(page);
  found.kept = await settledTexts(page);
  await film(page);
  await events(page);
  found.faults.push(...page.faults);
} finally {
  await browser.close();
}
console.log(JSON.stringify(found));

async function rows(page) {
  const all = { plan: await inSight(page, vue) };
  if (vue) found.drawn = await drawn(page);
  await turn(page, CHUNKWISE, "target", "computed share");
  all.share = await inSight(page, vue);
  if (vue) found.drawnShare = await drawn(page);
  await turn(page, CHUNKWISE, "target", "off");
  await turn(page, CHUNKWISE, "preset", "custom");
  all.custom = await inSight(page, vue);
  if (vue) found.drawnCustom = await drawn(page);
  await turn(page, CHUNKWISE, "preset", "balanced");
  found.rows = all;
}

/** How a workflow is saved and sent, and what one of before there were presets becomes. */
async function saved(page) {
  const values = (graph) => Object.fromEntries(graph.nodes.map((one) => [one.id, one.widgets_values ?? []]));
  found.saved = values(await page.evaluate(() => window.app.graph.serialize()));
  found.sent = await page.evaluate(async () => (await window.app.graphToPrompt()).output);
  const old = structuredClone(workflow);
  const node = old.nodes.find((one) => one.type === CHUNKWISE);
  node.widgets_values = [0.25, 3, 8, "latent", "velocity", 1, 0, 1, "none"];
  await load(page, old);
  found.old = (await page.evaluate(async () => (await window.app.graphToPrompt()).output))[node.id].inputs;
}

async function length(page) {
  const value = () => page.evaluate(() => window.app.graph.nodes.find((one) => one.type === "FlowCacheLatent").widgets[2].value);
  await turn(page, "FlowCacheLatent", "length", 57);
  await turn(page, "FlowCacheLatent", "unit", "seconds");
  found.seconds = await value();
  await turn(page, "FlowCacheLatent", "unit", "frames");
  found.frames = await value();
}

/** The same film, saved, without the VAE at the sampler and with it: then it is shown while it grows. */
async function film(page) {
  await page.evaluate(() => {
    const { graph, api } = window.app;
    const save = window.LiteGraph.createNode("SaveLatent");
    graph.add(save);
    graph.nodes.find((one) => one.type === "SamplerCustomAdvanced").connect(0, save, 0);
    graph.nodes.find((one) => one.type === "FlowCacheSampler").disconnectInput("vae");
    window.flowcacheFilm = [];
    api.addEventListener("flowcache.film", ({ detail }) => window.flowcacheFilm.push(detail));
  });
  await queue(page);
  found.unseen = await page.evaluate(() => window.flowcacheFilm.length);
  await connectVae(page);
  found.endFilm = await queue(page);
  found.film = await page.evaluate(() => window.flowcacheFilm.map(({ picture, ...rest }) => ({ ...rest, size: picture.length })));
  found.filmTexts = await settledTexts(page);
}

/** Messages that come in no order, name no node, or are none; then a large run, in a subgraph. */
async function events(page) {
  const send = (detail) =>
    page.evaluate((detail) => {
      window.app.api.dispatchEvent(new CustomEvent("flowcache.steps", { detail }));
      return new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
    }, detail);
  const sampler = await page.evaluate(() => String(window.app.graph.nodes.find((one) => one.type === "FlowCacheSampler").id));
  const message = (number, more = {}) => ({
    node: sampler, run: "one", number, whole: true, chunks: 2, steps: 4, map: { 0: "2100", 1: "0000" }, plan: null, done: number, total: 8,
    headline: `message ${number}`, pace: "", left: "5 s left", note: "", memory: "", kept: null, ended: false, ...more,
  });
  const text = () => page.evaluate(() => window.app.graph.nodes.find((one) => one.type === "FlowCacheSampler").widgets.at(-1).element.innerText);
  for (const wrong of [null, undefined, {}, 7, { node: sampler }, { node: "99:1", chunks: 1, steps: 1, map: {} }, message(9, { map: null })]) await send(wrong);
  await send(message(5));
  await send(message(3));
  found.order = await text();
  await page.evaluate(() => window.app.api.dispatchEvent(new CustomEvent("execution_interrupted", { detail: {} })));
  await page.waitForTimeout(100);
  found.stopped = await text();
  const inner = await page.evaluate(() => {
    const { subgraph, node } = window.app.graph.convertToSubgraph(new Set([window.app.graph.nodes.find((one) => one.type === "FlowCacheSampler")]));
    return `${node.id}:${subgraph.nodes[0].id}`;
  });
  const map = Object.fromEntries(Array.from({ length: 500 }, (_, k) => [k, "12ad".repeat(16)]));
  await send(message(1, { node: inner, run: "two", chunks: 500, steps: 64, map, headline: "a large run" }));
  found.inside = await page.evaluate(() => {
    const [subgraph] = [...window.app.graph.subgraphs.values()];
    return subgraph.nodes[0].widgets.at(-1).element.innerText;
  });
}
