// The real page of a running host in headless Chromium: opens it, loads a workflow, queues it.
// Needs PLAYWRIGHT_CORE, the folder that holds the playwright-core package or its node_modules; CHROMIUM names the browser.
import fs from "node:fs";
import path from "node:path";
import { pathToFileURL } from "node:url";

const folder = process.env.PLAYWRIGHT_CORE;
const entry = ["", "playwright-core", "node_modules/playwright-core"].map((part) => path.join(folder, part, "index.mjs")).find(fs.existsSync);
const { chromium } = await import(pathToFileURL(entry).href);

/** @param {{vue?: boolean, light?: boolean}} how */
const settings = ({ vue = false, light = false }) => ({
  "Comfy.VueNodes.Enabled": vue,
  "Comfy.TutorialCompleted": true,
  "Comfy.Workflow.ShowMissingModelsWarning": false,
  "Comfy.Workflow.Persist": true,
  "Comfy.ColorPalette": light ? "light" : "dark",
});

export async function launch() {
  return chromium.launch({
    executablePath: process.env.CHROMIUM || "/usr/bin/chromium",
    args: ["--no-sandbox", "--disable-gpu", "--no-proxy-server"],
  });
}

/** A page at `url` that is ready; settings are shown to the page only, nothing is stored on the host. */
export async function open(browser, url, how = {}) {
  const page = await browser.newPage({ viewport: { width: 1800, height: 1200 } });
  page.setDefaultTimeout(120_000); // a machine may be busy
  page.faults = [];
  page.on("pageerror", (error) => /extensions\/flowcache\//.test(error.stack ?? "") && page.faults.push(String(error.stack)));
  page.on("console", (message) => message.type() === "error" && /extensions\/flowcache\//.test(message.location()?.url ?? "") && page.faults.push(message.text()));
  await page.route(/\/settings(\/|$)/, async (route) => {
    if (route.request().method() !== "GET") return route.fulfill({ status: 200, body: "" });
    const answer = await route.fetch();
    const stored = await answer.json().catch(() => ({}));
    return route.fulfill({ status: 200, json: { ...stored, ...settings(how) } });
  });
  await page.goto(url, { waitUntil: "domcontentloaded" });
  await ready(page);
  return page;
}

export async function ready(page) {
  const there = () => window.app?.graph && window.app.extensionManager && window.LiteGraph?.registered_node_types?.FlowCacheSampler;
  await page.waitForFunction(there, null, { timeout: 120_000 });
  await page.waitForTimeout(1000);
  await page.keyboard.press("Escape");
}

export async function load(page, workflow) {
  await page.evaluate((graph) => window.app.loadGraphData(graph), workflow);
  await page.waitForTimeout(500);
  await fit(page);
}

/** Everything in view. */
export async function fit(page) {
  await page.evaluate(() => window.app.extensionManager.command.execute("Comfy.Canvas.FitView"));
  await page.waitForTimeout(700);
}

/** Queues what is on the page -> how it ended. */
export async function queue(page, seconds = 240) {
  await page.evaluate(() => {
    window.flowcacheEnd = null;
    for (const end of ["success", "error", "interrupted"]) {
      window.app.api.addEventListener(`execution_${end}`, (event) => (window.flowcacheEnd = { end, why: event.detail?.exception_message }), { once: true });
    }
    return window.app.queuePrompt(0, 1);
  });
  await page.waitForFunction(() => window.flowcacheEnd, null, { timeout: seconds * 1000, polling: 100 });
  await page.waitForTimeout(700);
  return page.evaluate(() => window.flowcacheEnd);
}

/** As a user does who drags a link from the loader to the sampler. */
export async function connectVae(page) {
  await page.evaluate(() => {
    const find = (type) => window.app.graph.nodes.find((one) => one.type === type);
    const [loader, sampler] = [find("FlowCacheLoadModel"), find("FlowCacheSampler")];
    const input = sampler.inputs.findIndex((one) => one.name === "vae");
    loader.connect(loader.outputs.findIndex((one) => one.type === "VAE"), sampler, input);
  });
}

/** By node type: the text that stands on the node, how many pixels high it is, and whether nothing lies over it. */
export function texts(page) {
  return page.evaluate(() => {
    const out = {};
    for (const node of window.app.graph.nodes) {
      for (const { name, element } of node.widgets ?? []) {
        if (!["node_text", "live_panel"].includes(name)) continue;
        const box = element.getBoundingClientRect();
        const at = document.elementFromPoint(box.x + box.width / 2, box.y + Math.min(box.height / 2, 8));
        out[node.type] = { text: element.innerText, height: box.height, seen: element.contains(at) };
      }
    }
    return out;
  });
}

/** The same, once nothing lies over it any more, or after some seconds. */
export async function settledTexts(page) {
  for (let tries = 0; tries < 15; tries++) {
    const all = await texts(page);
    if (Object.values(all).every((one) => one.seen)) return all;
    await page.waitForTimeout(700);
  }
  return texts(page);
}

/** By node type: names of the widgets that are in sight, as the renderer decides it. */
export function inSight(page, vue) {
  return page.evaluate((vue) => {
    const options = (one) => !one.options?.canvasOnly && !one.options?.hidden && !one.options?.advanced;
    const out = {};
    for (const node of window.app.graph.nodes) {
      const seen = vue ? options : (one) => node.isWidgetVisible(one);
      if (node.type.startsWith("FlowCache")) out[node.type] = node.widgets?.filter(seen).map((one) => one.name) ?? [];
    }
    return out;
  }, vue);
}

/** By node type: names of the widgets that Nodes 2.0 draws. */
export function drawn(page) {
  return page.evaluate(() => {
    const out = {};
    for (const node of window.app.graph.nodes) {
      const element = document.querySelector(`[data-node-id="${node.id}"]`);
      const labels = new Set(element?.innerText.split("\n").map((line) => line.trim()));
      if (node.type.startsWith("FlowCache")) out[node.type] = node.widgets?.map((one) => one.name).filter((name) => labels.has(name)) ?? [];
    }
    return out;
  });
}

/** Turns a widget as a user does. */
export async function turn(page, type, name, value) {
  await page.evaluate(
    ({ type, name, value }) => {
      const node = window.app.graph.nodes.find((one) => one.type === type);
      const widget = node.widgets.find((one) => one.name === name);
      widget.value = value;
      widget.callback?.(value, window.app.canvas, node);
    },
    { type, name, value },
  );
  await page.waitForTimeout(150);
}
