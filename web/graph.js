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
