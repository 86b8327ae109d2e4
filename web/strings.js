// @ts-check
// The texts of the page itself, in one place. Sentences about a run come from the server, ready to be shown.

export const STRINGS = {
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
  filmSoFar: (/** @type {number} */ from, /** @type {number} */ to) => `film so far: ${from ? `${from.toFixed(1)} to ` : ""}${to.toFixed(1)} s`,
};
