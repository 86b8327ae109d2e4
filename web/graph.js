// @ts-check
// Nodes of the page's graph, found by what the server and the front end call them.
import { app } from "../../scripts/app.js";

/** The graph that all subgraphs are in. */
export function rootGraph() {
  return app.rootGraph ?? app.graph;
}

/**
 * By the id of an execution: "1:2:3" is node 3 in subgraph node 2 of node 1.
 * @param {unknown} path
 * @returns {any} null where there is no such node
 */
export function nodeAt(path) {
  let graph = rootGraph();
  let node = null;
  for (const id of String(path ?? "").split(":")) {
    node = graph?.getNodeById?.(Number(id)) ?? null;
    graph = node?.subgraph;
  }
  return node;
}

/**
 * By the front end's own name: the id of a subgraph, a colon, and the node's id in it. Where it is none, by the id of an execution.
 * @param {string} name
 * @returns {any}
 */
export function nodeNamed(name) {
  const [subgraph, id] = name.split(":");
  return rootGraph()?.subgraphs?.get?.(subgraph)?.getNodeById?.(Number(id)) ?? nodeAt(name);
}

/**
 * Every node of the graph and of its subgraphs, with the id of its execution and the titles on the way to it. A node of a subgraph that is used
 * twice comes twice.
 * @typedef {{path: string, node: any, titles: string[]}} Place
 * @param {any} graph
 * @param {Place | null} within
 * @returns {Place[]}
 */
export function walk(graph = rootGraph(), within = null) {
  return (graph?.nodes ?? []).flatMap((/** @type {any} */ node) => {
    const title = String(node.title ?? node.type);
    const place = { path: within ? `${within.path}:${node.id}` : String(node.id), node, titles: [...(within?.titles ?? []), title] };
    return node.subgraph ? [place, ...walk(node.subgraph, place)] : [place];
  });
}

const frame = () => new Promise((done) => requestAnimationFrame(done));

/**
 * Opens the subgraph that a node is in, and brings the node into view. Changes nothing of the graph.
 * @param {any} node
 */
export async function bringIntoView(node) {
  const { canvas } = app;
  if (canvas.graph !== node.graph) {
    canvas.subgraph = node.graph.isRootGraph ? undefined : node.graph;
    canvas.setGraph(node.graph);
    await frame(); // until the canvas has laid it out
    await frame();
  }
  canvas.animateToBounds(node.boundingRect);
}
