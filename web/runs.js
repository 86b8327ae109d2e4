// @ts-check
// The latest run of every AR Chunk Sampler, as the server announces it, and who looks at it. Draws nothing.
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
    this.kept = false; // where no run is shown: whether that is since the host kept a result
    this.asked = ""; // the run whose film the server was asked for
    this.missed = false; // whether the connection was lost while it ran
  }

  /** Where no run is shown; in the language that the page has by now. */
  get note() {
    return this.kept ? STRINGS.kept : STRINGS.waiting;
  }

  /** @returns {Status} */
  get status() {
    if (!this.state) return "notRun";
    return this.state.stopped ? "stopped" : this.state.ended ? "finished" : "running";
  }
}

/** @type {Map<string, Run>} by workflow and id of the execution, the latest at the end */
const runs = new Map();
/** @type {Set<(path: string, run: Run) => void>} */
const watchers = new Set();

/**
 * What the host runs. `kept`: the ids of the nodes whose results it kept; `workflow`: the one that was open when it said so; `sampled`: the run that
 * it announced, by sampler.
 * @typedef {{kept: string[], workflow?: string, sampled: Map<string, string>}} Prompt
 * @type {Prompt}
 */
let prompt = { kept: [], sampled: new Map() };

/** @param {string} path @param {string | null | undefined} workflow of the open one where it is not given */
const key = (path, workflow) => `${workflow ?? rootGraph()?.id} ${path}`;

/**
 * Of a sampler of the open workflow.
 * @param {string} path the id of its execution
 */
export const runAt = (path) => runs.get(key(path, null));

/** Every sampler of the open workflow, in subgraphs too, in the order of the graph. */
export const samplers = () => walk().filter(({ node }) => node.comfyClass === NODE);

/** @param {(path: string, run: Run) => void} watcher called when the run of a sampler of the open workflow has changed */
export function watch(watcher) {
  watchers.add(watcher);
  return () => watchers.delete(watcher);
}

/** @param {string} path @param {string | null | undefined} workflow @param {(run: Run) => boolean} change whether it changed anything */
function update(path, workflow, change) {
  const at = key(path, workflow);
  const run = runs.get(at) ?? new Run();
  if (!change(run)) return;
  runs.delete(at);
  runs.set(at, run);
  for (const old of [...runs.keys()].slice(0, -REMEMBERED.runs)) runs.delete(old);
  for (const old of [...runs.values()].filter(({ film }) => film).slice(0, -REMEMBERED.films)) Object.assign(old, { film: null, asked: "" });
  if (at === key(path, null)) notify(path, run);
}

/** @param {string} path @param {Run} run */
function notify(path, run) {
  for (const watcher of watchers) watcher(path, run);
}

/** @param {Message} message @param {string | null | undefined} workflow */
function show(message, workflow) {
  if (nodeAt(message?.node)?.comfyClass !== NODE && workflow == null) return;
  update(String(message?.node), workflow, (run) => {
    const state = next(run.state, message);
    if (state === run.state) return false;
    run.state = state;
    if (run.film?.run !== state?.run) run.film = null;
    return true;
  });
}

/** @param {import("./film.js").FilmMessage[]} messages of one run */
function showFilm(messages) {
  const [message] = messages;
  if (!message?.run || (nodeAt(message.node)?.comfyClass !== NODE && message.workflow == null)) return;
  update(String(message.node), message.workflow, (run) => addFilm(run, messages));
}

/** @param {Run} run @param {import("./film.js").FilmMessage[]} messages @returns {boolean} whether they brought anything */
function addFilm(run, messages) {
  const { run: name } = messages[0];
  if (run.state && run.state.run !== name) return false;
  if (run.film?.run !== name) run.film = new Film(name);
  return run.film.add(messages);
}

/** The host has ended what was running. @param {(run: Run) => boolean} which */
function stop(which = () => true) {
  for (const [at, run] of runs) {
    if (run.status !== "running" || !run.state || !which(run)) continue;
    run.state.stopped = true;
    const path = at.slice(at.indexOf(" ") + 1);
    if (at === key(path, null)) notify(path, run);
  }
}

/**
 * What the server still knows of this workflow's runs: for a page that was loaded during one, or after it. One that the page was told of, and the
 * server does not know, has ended with an earlier server.
 */
async function restore() {
  const workflow = rootGraph()?.id;
  const paths = samplers().map(({ path }) => path);
  if (!workflow || !paths.length) return;
  const told = [...runs.values()].filter((run) => run.status === "running" && run.state?.workflow === workflow).map(({ state }) => state?.run);
  const known = await ask(`/flowcache/runs?workflow=${encodeURIComponent(workflow)}`);
  for (const message of known ?? []) show(message, workflow);
  const names = known?.map(({ run }) => run);
  if (names) stop(({ state }) => told.includes(state?.run) && !names.includes(state?.run));
  await Promise.all(paths.map((path) => restoreFilm(path, workflow)));
}

/** The connection is there again: what was told meanwhile is asked for. */
function catchUp() {
  for (const run of runs.values()) if (run.status === "running") Object.assign(run, { missed: true, asked: "" });
  restore();
}

/**
 * Of the run that a sampler shows: the film as far as the server still has it, unless the page has it from its first frame on.
 * @param {string} path @param {string} workflow which need not be open any more when the server answers
 */
async function restoreFilm(path, workflow) {
  const run = runs.get(key(path, workflow));
  const name = run?.state?.run ?? "";
  if (!run || run.asked === name || (run.film?.begin === 0 && !run.missed)) return;
  Object.assign(run, { asked: name, missed: false });
  const messages = await ask(`/flowcache/film?run=${encodeURIComponent(name)}`);
  if (messages?.length) update(path, workflow, (now) => addFilm(now, messages));
}

/** @param {string} route @returns {Promise<any[] | null>} null where the server does not answer */
async function ask(route) {
  try {
    const answer = await api.fetchApi(route);
    return answer.ok ? await answer.json() : null;
  } catch (error) {
    console.debug("FlowCache: the server does not say what ran before", error);
    return null;
  }
}

/** Says so on samplers that sampled nothing, since the host kept their results. @param {Prompt} ended */
async function nothingSampled({ kept, workflow, sampled }) {
  if (rootGraph()?.id !== workflow) return;
  const mine = kept.filter((id) => !sampled.has(id) && nodeAt(id)?.comfyClass === NODE && !runAt(id)?.state);
  if (!mine.length) return;
  await restore();
  for (const id of mine) {
    update(id, workflow, (run) => {
      run.kept = true;
      return !run.state;
    });
  }
}

/** Of a message that Cache Report sent: that of its run, or, where the host kept the run, the one that is queued. @param {Message} message */
function workflowOf({ node, run, workflow }) {
  return prompt.kept.includes(node) && prompt.sampled.get(node) !== run ? prompt.workflow : workflow;
}

/** Whether a later run than that of a message is shown: the page has reports of earlier prompts too. @param {Message} message */
function isPast({ node, run }) {
  const shown = runAt(node)?.state?.run ?? run;
  return shown !== run && (prompt.sampled.has(node) || !prompt.kept.includes(node));
}

// Cache Report brings the last message of its run; by then another workflow may be open, with a node of the same id
onOutput((_node, output, workflow) => {
  for (const written of output.flowcache ?? []) {
    const message = JSON.parse(written);
    if (!message || (workflow ?? workflowOf(message) ?? rootGraph()?.id) !== rootGraph()?.id || isPast(message)) continue;
    show(message, null);
    restoreFilm(String(message.node), rootGraph()?.id);
  }
});
onRestored(restore); // the server knows of later runs than the history, which has only those that ended well

app.registerExtension({
  name: "flowcache.runs",
  setup() {
    api.addEventListener("execution_start", () => (prompt = { kept: [], sampled: new Map() }));
    api.addEventListener(EVENT, (/** @type {any} */ { detail }) => {
      prompt.sampled.set(String(detail?.node), detail?.run);
      show(detail, detail?.workflow);
    });
    api.addEventListener(FILM, (/** @type {any} */ { detail }) => showFilm([detail]));
    for (const end of ["execution_start", "execution_interrupted", "execution_error"]) api.addEventListener(end, () => stop());
    api.addEventListener("reconnected", catchUp);
    api.addEventListener("execution_cached", (/** @type {any} */ { detail }) => {
      Object.assign(prompt, { kept: detail?.nodes ?? [], workflow: rootGraph()?.id });
    });
    api.addEventListener("execution_success", () => {
      nothingSampled(prompt);
      prompt = { kept: [], sampled: new Map() };
    });
  },
  afterConfigureGraph() {
    for (const { path } of samplers()) {
      const run = runAt(path);
      if (run) notify(path, run); // the nodes are new ones after an undo, or when a workflow comes back to the front
    }
  },
});
