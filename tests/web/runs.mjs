// What the page knows of runs, in the code of the page without a browser: runs.mjs EXTENSION, where EXTENSION is a copy of web/ in a folder tree like
// that of the page. Prints what was found, by case, as one line of JSON.
import path from "node:path";
import { pathToFileURL } from "node:url";

const [folder] = process.argv.slice(2);
const load = (name) => import(pathToFileURL(path.join(folder, name)).href);
const found = {};

const { next } = await load("run_state.js");
const { app, extensions } = await load("../../scripts/app.js");
const { api } = await load("../../scripts/api.js");

/** The host's page as far as runs need it: events, what the server answers by route, and the workflow that is open. */
const events = new EventTarget();
const answers = new Map();
api.addEventListener = events.addEventListener.bind(events);
api.fetchApi = async (route) => ({ ok: answers.has(route.split("?")[0]), json: async () => answers.get(route.split("?")[0])(route) });
const tell = (name, detail) => events.dispatchEvent(Object.assign(new Event(name), { detail }));
const configured = () => Promise.all(extensions.map((one) => one.afterConfigureGraph?.())).then(settled);
const settled = () => new Promise((done) => setTimeout(done, 5));

const { runAt } = await load("runs.js");
const { onOutput } = await load("outputs.js");
for (const one of extensions) one.setup?.();

/** Opens a workflow with a sampler and a report, whose ids are those of any other. */
function openWorkflow(id) {
  const nodes = [["FlowCacheSampler", 9], ["FlowCacheReport", 14]].map(([comfyClass, id]) => ({ comfyClass, id, type: comfyClass }));
  app.rootGraph = { id, nodes, getNodeById: (id) => nodes.find((node) => node.id === id) };
}

/** A message of a run of two chunks of four steps. */
function message(number, map, more = {}) {
  const whole = Object.keys(map).length === 2;
  return { node: "9", workflow: "mine", run: "one", number, whole, chunks: 2, steps: 4, map, plan: null, kept: null, ended: false, ...more };
}

/** A page that was loaded in mid-run is told of a change, and then the server answers with what it knew by then. */
const loaded = next(null, message(7, { 1: "0210" }));
const answered = next(loaded, message(7, { 0: "2112", 1: "0210" }, { plan: ["1001", "0100"] }));
const later = next(next(loaded, message(8, { 1: "0211" })), message(7, { 0: "2112", 1: "0210" }));
const again = next(later, message(7, { 0: "0000", 1: "0000" }));
found.filled = { answered: [answered.map, answered.plan], later: [later.map, later.number], again: again === later };

/** A prompt of `workflow`, which is open at first; `then` is open when Cache Report has run. The host keeps the samplers' own results. */
async function queued(workflow, run, then, { kept = false } = {}) {
  openWorkflow(workflow);
  const last = message(2, { 0: "2112", 1: "2112" }, { workflow: kept ? "original" : workflow, run, ended: true });
  tell("execution_start", {});
  tell("execution_cached", { nodes: ["9"] });
  if (!kept) tell("flowcache.steps", last);
  openWorkflow(then);
  tell("executed", { node: "14", output: { flowcache: [JSON.stringify(last)] } });
  tell("execution_success", {});
  await settled();
}

/** What each of some workflows shows on its sampler. */
function shown(...workflows) {
  return workflows.map((id) => {
    openWorkflow(id);
    return [runAt("9")?.state?.run ?? null, runAt("9")?.note ?? null];
  });
}

await queued("first", "a", "second");
await queued("copy", "b", "copy", { kept: true });
found.tabs = shown("first", "second", "copy").map(([run, note]) => [run, Boolean(note?.startsWith("The host kept"))]);

// the server answers when another workflow has been opened
globalThis.Image = class {};
const strip = (run, first) => ({ node: "9", workflow: "slow", run, first, frames: 4, fps: 24, picture: "", note: "" });
const afterwards = (answer) => () => (openWorkflow("other"), answer);
const saw = [];
onOutput((_node, output) => output.text && saw.push(output.text[0]));
const asked = { 14: { class_type: "FlowCacheReport", inputs: {} } };
const prompt = [1, "p", asked, { extra_pnginfo: { workflow: { id: "slow" } } }];
answers.set("/history", afterwards({ p: { prompt, outputs: { 14: { text: ["report of slow"] } } } }));
openWorkflow("slow");
await configured();
answers.clear();
answers.set("/flowcache/runs", () => [message(2, { 0: "2112", 1: "2112" }, { workflow: "slow", run: "s", ended: true })]);
answers.set("/flowcache/film", afterwards([strip("s", 0), strip("s", 4)]));
openWorkflow("slow");
await configured();
found.late = { texts: saw, films: ["slow", "other"].map((id) => (openWorkflow(id), runAt("9")?.film?.end ?? null)) };

// a sampler that has not run, made before the page knew its language
const { Run } = await load("runs.js");
const { speak } = await load("strings.js");
const early = new Run();
speak(() => ({ waiting: "noch nichts" }));
found.language = early.note;

/** The connection is lost in mid-run, and comes again when the server knows `known` of it. */
async function reconnected(run, known, film = []) {
  openWorkflow("lost");
  tell("execution_start", {});
  tell("flowcache.steps", message(1, { 0: "2000", 1: "0000" }, { workflow: "lost", run }));
  tell("flowcache.film", { ...strip(run, 0), workflow: "lost" });
  if (known) answers.set("/flowcache/runs", () => known.map((one) => ({ ...one, workflow: "lost", run })));
  else answers.delete("/flowcache/runs");
  answers.set("/flowcache/film", () => film);
  tell("reconnected");
  await settled();
  const { status, state, film: shown } = runAt("9");
  return [status, state.map[1], shown?.end];
}

found.lost = {
  unanswered: await reconnected("l1", null),
  stopped: await reconnected("l2", [message(1, { 0: "2000", 1: "0000" }, { stopped: true })]),
  restarted: await reconnected("l3", []),
  ended: await reconnected("l4", [message(9, { 0: "2112", 1: "2112" }, { ended: true })], [strip("l4", 0), strip("l4", 4)]),
};

// an undo while a second run goes on: the page hands out again what the nodes sent in the first
await queued("undone", "1st", "undone");
const first = message(2, { 0: "2112", 1: "2112" }, { workflow: "undone", run: "1st", ended: true });
tell("execution_start", {});
tell("execution_cached", { nodes: ["9"] });
tell("flowcache.steps", message(1, { 0: "2000", 1: "0000" }, { workflow: "undone", run: "2nd" }));
tell("flowcache.film", { ...strip("2nd", 0), workflow: "undone" });
for (const one of extensions) one.onNodeOutputsUpdated?.({ 14: { flowcache: [JSON.stringify(first)] } });
found.undone = [runAt("9").state.run, runAt("9").status, runAt("9").film?.end ?? null];

// five workflows with films that the server gives back, one after the other, and the first again
answers.set("/flowcache/runs", (route) => [message(2, { 0: "2112", 1: "2112" }, { run: route.split("=")[1], ended: true })]);
answers.set("/flowcache/film", (route) => [strip(route.split("=")[1], 0)]);
for (const id of ["f1", "f2", "f3", "f4", "f5", "f1"]) {
  openWorkflow(id);
  await configured();
}
found.again = runAt("9")?.film?.end ?? null;

/** What is asked of a server that never answers when a graph is configured, and whether the page waits for it. */
async function waitsFor(graph) {
  const asked = [];
  api.fetchApi = (route) => (asked.push(route), new Promise(() => {}));
  app.rootGraph = graph;
  const end = await Promise.race([Promise.all(extensions.map((one) => one.afterConfigureGraph?.())).then(() => "configured"), settled()]);
  return [end ?? "waits", asked];
}

openWorkflow("undone");
found.waits = [await waitsFor(app.rootGraph), await waitsFor({ id: "of others", nodes: [{ comfyClass: "KSampler", id: 1 }], getNodeById() {} })];

// a screen for somebody who wants nothing to move
const { Film, Screen } = await load("film.js");
let drawn = 0;
const element = () => {
  const pen = { drawImage: () => (drawn += 1) };
  return Object.assign(new EventTarget(), { style: {}, clientWidth: 100, append() {}, setAttribute() {}, getContext: () => pen });
};
globalThis.document = { createElement: element };
globalThis.matchMedia = () => ({ matches: true });
globalThis.ResizeObserver = class { observe() {} };
globalThis.requestAnimationFrame = (then) => setTimeout(() => then(performance.now()));
globalThis.Image = class extends EventTarget {};
const film = new Film("held");
film.add([strip("held", 0)]);
const screen = new Screen();
screen.look(film);
await settled();
const before = drawn;
Object.assign(film.strips[0].picture, { complete: true, naturalWidth: 400, naturalHeight: 50 }).dispatchEvent(new Event("load"));
await settled();
found.held = [before, drawn];

found.keys = ["Enter", " ", "a"].map((key) => {
  const [playing, press] = [screen.playing, Object.assign(new Event("keydown", { cancelable: true }), { key })];
  screen.canvas.dispatchEvent(press);
  return [screen.playing !== playing, press.defaultPrevented];
});
screen.canvas.clientWidth = 0; // nobody sees it any more

// a node of the workflow that ran has the number of another kind of node in the one that is open
const told = [];
openWorkflow("mine");
onOutput((_node, output) => output.fps && told.push(output.fps[0]));
for (const [kind, fps] of [["FlowCacheReport", 24], ["FlowCacheLatent", 16]]) {
  tell("executed", { node: "14", output: { fps: [fps], flowcache_node: [kind] } });
}
found.kinds = told;

console.log(JSON.stringify(found));
