// What the page knows of runs, in the code of the page without a browser: runs.mjs EXTENSION, where EXTENSION is a copy of web/ in a folder tree like
// that of the page. Prints what was found, by case, as one line of JSON.
import path from "node:path";
import { pathToFileURL } from "node:url";

const [folder] = process.argv.slice(2);
const load = (name) => import(pathToFileURL(path.join(folder, name)).href);
const found = {};

const { next } = await load("run_state.js");

/** A message of a run of two chunks of four steps. */
function message(number, map, more = {}) {
  const whole = Object.keys(map).length === 2;
  return { node: "9", workflow: "mine", run: "one", number, whole, chunks: 2, steps: 4, map, plan: null, kept: null, ended: false, ...more };
}

/** A page that was loaded in mid-run is told of a change, and then the server answers with what it knew by then. */
const loaded = next(null, message(7, { 1: "0210" }));
const answered = next(loaded, message(7, { 0: "2112", 1: "0210" }, { plan: ["1001", "0100"] }));
const later = next(next(loaded, message(8, { 1: "0211" })), message(7, { 0: "2112", 1: "0210" }));
found.filled = { answered: [answered.map, answered.plan], later: [later.map, later.number], again: next(later, message(7, { 0: "0000", 1: "0000" })) === later };

console.log(JSON.stringify(found));
