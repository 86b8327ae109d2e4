// @ts-check
// The latest run of every AR Chunk Sampler, as the server tells of it, and who looks at it. Draws nothing.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { Film } from "./film.js";
import { nodeAt, rootGraph, walk } from "./graph.js";
import { onOutput, onRestored } from "./outputs.js";
import { next } from "./run_state.js";
import { STRINGS } from "./strings.js";

/** @typedef {import("./run_state.js").Message} Message */
/** @typedef {"notRun" | "running" | "stopped" | "finished"} Status */

const EVENT = "flowcache.steps";
const FILM = "flowcache.film";
const NODE = "FlowCacheSampler";
const REMEMBERED = { runs: 24, films: 4 }; // of all workflows that were open

/** One sampler's. */
export class Run {
  constructor() {
    /** @type {import("./run_state.js").State | null} */
    this.state = null;
    /** @type {Film | null} */
    this.film = null;
    this.note = STRINGS.waiting; // where no run is shown
  }

  /** @returns {Status} */
  get status() {
    if (!this.state) return "notRun";
    return this.state.stopped ? "stopped" : this.state.ended ? "finished" : "running";
  }
}

/** @type {Map<string, Run>} by workflow and id of the execution, those that were last told of at the end */
const runs = new Map();
/** @type {Set<(path: string, run: Run) => void>} */
const watchers = new Set();

/** @param {string} path @param {string | null | undefined} workflow of the open one where it is not given */
const key = (path, workflow) => `${workflow ?? rootGraph()?.id} ${path}`;

/**
 * Of a sampler of the open workflow.
 * @param {string} path the id of its execution
 */
export const runAt = (path) => runs.get(key(path, null));

/** Every sampler of the open workflow, in subgraphs too, in the order of the graph. */
export const samplers = () => walk().filter(({ node }) => node.comfyClass === NODE);

/** @param {(path: string, run: Run) => void} watcher called when something is told of a sampler of the open workflow */
export function watch(watcher) {
  watchers.add(watcher);
  return () => watchers.delete(watcher);
}

/** @param {string} path @param {string | null | undefined} workflow @param {(run: Run) => boolean} change whether it changed anything */
function tell(path, workflow, change) {
  const at = key(path, workflow);
  const run = runs.get(at) ?? new Run();
  if (!change(run)) return;
  runs.delete(at);
  runs.set(at, run);
  for (const old of [...runs.keys()].slice(0, -REMEMBERED.runs)) runs.delete(old);
  for (const old of [...runs.values()].filter(({ film }) => film).slice(0, -REMEMBERED.films)) old.film = null;
  if (at === key(path, null)) notify(path, run);
}

/** @param {string} path @param {Run} run */
function notify(path, run) {
  for (const watcher of watchers) watcher(path, run);
}

/** @param {Message} message @param {string | null | undefined} workflow */
function show(message, workflow) {
  if (nodeAt(message?.node)?.comfyClass !== NODE && workflow == null) return;
  tell(String(message?.node), workflow, (run) => {
    const state = next(run.state, message);
    if (state === run.state) return false;
    run.state = state;
    if (run.film?.run !== state?.run) run.film = null;
    return true;
  });
}

/** @param {import("./film.js").FilmMessage} message */
function showFilm(message) {
  if (!message?.run || (nodeAt(message.node)?.comfyClass !== NODE && message.workflow == null)) return;
  tell(String(message.node), message.workflow, (run) => {
    if (run.state && run.state.run !== message.run) return false;
    if (run.film?.run !== message.run) run.film = new Film(message.run);
    return run.film.add(message);
  });
}

/** The host has ended what was running. */
function stop() {
  for (const [at, run] of runs) {
    if (run.status !== "running" || !run.state) continue;
    run.state.stopped = true;
    const path = at.slice(at.indexOf(" ") + 1);
    if (at === key(path, null)) notify(path, run);
  }
}

/** What the server still knows of this workflow's runs: for a page that was loaded during one, or after it. */
async function restore() {
  const workflow = rootGraph()?.id;
  if (!workflow) return;
  try {
    const answer = await api.fetchApi(`/flowcache/runs?workflow=${encodeURIComponent(workflow)}`);
    if (answer.ok) for (const message of await answer.json()) show(message, workflow);
  } catch (error) {
    console.debug("FlowCache: the server does not say what ran before", error);
  }
}

/** @param {string[]} ids whose results the host kept: it sampled nothing */
async function nothingSampled(ids) {
  const mine = ids.filter((id) => nodeAt(id)?.comfyClass === NODE && !runAt(id)?.state);
  if (!mine.length) return;
  await restore();
  for (const id of mine) {
    tell(id, null, (run) => {
      run.note = STRINGS.kept;
      return !run.state;
    });
  }
}

// Cache Report brings the end of the run that it tells of
onOutput((_node, output) => {
  for (const written of output.flowcache ?? []) show(JSON.parse(written), null);
});
onRestored(restore); // the server knows of later runs than the history, which has only those that ended well

app.registerExtension({
  name: "flowcache.runs",
  setup() {
    api.addEventListener(EVENT, (/** @type {any} */ { detail }) => show(detail, detail?.workflow));
    api.addEventListener(FILM, (/** @type {any} */ { detail }) => showFilm(detail));
    for (const end of ["execution_start", "execution_interrupted", "execution_error"]) api.addEventListener(end, stop);
    /** @type {string[]} */
    let kept = [];
    api.addEventListener("execution_cached", (/** @type {any} */ { detail }) => (kept = detail?.nodes ?? []));
    api.addEventListener("execution_success", () => nothingSampled(kept));
  },
  afterConfigureGraph() {
    for (const { path } of samplers()) {
      const run = runAt(path);
      if (run) notify(path, run); // the nodes are new ones after an undo, or when a workflow comes back to the front
    }
  },
});
