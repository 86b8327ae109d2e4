// Prints what processor time a message takes while a run of 500 chunks x 64 steps is shown under its sampler and in the sidebar, in both renderers:
// frame_time.mjs URL RECORDED.json, with the URL of backend.py or of a host.
import fs from "node:fs";
import { CHUNKS, STEPS, milliseconds } from "./large.mjs";
import { launch, load, open } from "./page.mjs";

const [url, file] = process.argv.slice(2);
const { workflow } = JSON.parse(fs.readFileSync(file, "utf8"));
const node = String(workflow.nodes.find(({ type }) => type === "FlowCacheSampler").id);
const texts = { headline: "", pace: "", left: "", note: "", memory: "", kept: null };

const browser = await launch();
try {
  for (const renderer of ["canvas", "vue"]) {
    const page = await open(browser, url, { vue: renderer === "vue" });
    await load(page, workflow);
    await page.evaluate(() => window.app.extensionManager.sidebarTab.toggleSidebarTab("flowcache"));
    const message = { node, run: "large", number: 0, whole: false, chunks: CHUNKS, steps: STEPS, plan: null, done: 1, total: CHUNKS * STEPS, ...texts, ended: false };
    for (const [what, spent] of Object.entries(await milliseconds(page, message))) console.log(`${renderer}: ${what} changes: ${spent.toFixed(1)} ms`);
    await page.close();
  }
} finally {
  await browser.close();
}
