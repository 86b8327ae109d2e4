// @ts-check
// What the page says itself, in one place. Sentences about a run come from the server, ready to be shown, and are English.

const ENGLISH = {
  waiting: "While it runs, the steps that are computed and those that are skipped appear here.",
  kept: "The host kept the result of an earlier run, so nothing was sampled. Cache Report, where it is connected, shows that run.",
  stopped: "stopped",
  computed: "computed",
  inPart: "in part",
  skipped: "skipped",
  reused: "reused",
  tab: "FlowCache",
  tabHelp: "The running and the last run of every AR Chunk Sampler",
  noSamplers: "There is no AR Chunk Sampler in this workflow.",
  show: "Show this node in the graph",
  notRun: "has not run",
  running: "running",
  finished: "finished",
  filmWaiting: "The film appears here while it is made, chunk by chunk.",
  filmHelp: "The film so far: click to hold it or to let it play",
  filmSoFar: "film so far",
  textWaiting: "What this comes to appears here when it has run.",
  more: "more settings",
  fewer: "fewer settings",
};

/** @typedef {Partial<Record<string, string>> | undefined} Translation by the names of the English texts */

/** @type {() => Translation} */
let translation = () => undefined;

/** @param {() => Translation} now asked whenever a text is taken, so that it follows the page's language */
export function speak(now) {
  translation = now;
}

/** In the page's language; what is not translated is English. */
export const STRINGS = new Proxy(ENGLISH, {
  get: (english, name) => translation()?.[String(name)] ?? Reflect.get(english, name),
});
