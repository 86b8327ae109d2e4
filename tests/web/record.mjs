// Records what tests/test_page.py replays, from the page of a running host: record.mjs URL WORKFLOW.json OUT.json
// The workflow is queued once. Of the host's own nodes only names and types are kept.
import fs from "node:fs";
import { launch, load, open, queue } from "./page.mjs";

const [url, file, out] = process.argv.slice(2);
const KEPT = /^(flowcache\.|execut|progress$)/;

/** Of a schema, without texts and without the files that a machine has. */
function bare(node) {
  const inputs = (some) => Object.fromEntries(Object.entries(some ?? {}).map(([name, [kind, more]]) => [name, [kind, plain(more)]]));
  const plain = (more) => Object.fromEntries(Object.entries(more ?? {}).filter(([name]) => name !== "tooltip"));
  const input = Object.fromEntries(Object.entries(node.input).map(([kind, some]) => [kind, kind === "hidden" ? some : inputs(some)]));
  const { input_order, output, output_is_list, output_name, name, display_name, category, output_node } = node;
  return { input, input_order, output, output_is_list, output_name, name, display_name, category, output_node, description: "", python_module: "nodes" };
}

const browser = await launch();
try {
  const page = await open(browser, url);
  const events = [];
  await load(page, JSON.parse(fs.readFileSync(file, "utf8")));
  await page.exposeFunction("flowcacheRecord", (kind, data) => events.push([kind, data]));
  await page.evaluate(() => {
    const { api } = window.app;
    api.socket.addEventListener("message", ({ data }) => {
      if (typeof data === "string") window.flowcacheRecord(JSON.parse(data).type, JSON.parse(data).data);
    });
  });
  await queue(page);
  await page.waitForTimeout(1000);
  const workflow = await page.evaluate(() => window.app.graph.serialize());
  const types = new Set(workflow.nodes.map((node) => node.type));
  const all = await (await fetch(`${url}/object_info`)).json();
  const schemas = Object.entries(all).filter(([name]) => types.has(name) || name.startsWith("FlowCache"));
  const object_info = Object.fromEntries(schemas.map(([name, node]) => [name, name.startsWith("FlowCache") ? { ...node, python_module: "custom_nodes.flowcache" } : bare(node)]));
  const [{ outputs }] = Object.values(await (await fetch(`${url}/history?max_items=1`)).json());
  const kept = events.filter(([kind]) => KEPT.test(kind));
  const line = ([kind, data]) => "\n  " + JSON.stringify([kind, data]);
  const nodes = Object.entries(object_info).map(([name, node]) => `\n  ${JSON.stringify(name)}: ${JSON.stringify(node)}`);
  fs.writeFileSync(out, `{"object_info": {${nodes}},\n"workflow": ${JSON.stringify(workflow)},\n"outputs": ${JSON.stringify(outputs)},\n"events": [${kept.map(line)}]}\n`);
} finally {
  await browser.close();
}
