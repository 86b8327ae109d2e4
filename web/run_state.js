// @ts-check
// What is known in the page of one run of AR Chunk Sampler, message by message. Draws nothing.

/**
 * A message of the server. `map` has for every chunk, by its number, a letter per step: 0 has not run, 1 reused or skipped, 2 computed, a to j
 * computed in part, the more of its tokens the later the letter. A `whole` message has all chunks, others those that have changed.
 * `node` is the sampler's id in the execution, `workflow` the id of the workflow that it is in, where the server knows it.
 * @typedef {{node: string, workflow?: string | null, run: string, number: number, whole: boolean, chunks: number, steps: number,
 *   map: Record<string, string>, plan: string[] | null, done: number, total: number, headline: string, pace: string, left: string, drift?: string,
 *   note: string, memory: string, kept: number | null, ended: boolean, stopped?: boolean}} Message
 * @typedef {Omit<Message, "map" | "plan" | "stopped"> & {map: string[], plan: string[], stopped: boolean}} State `whole`: all chunks were told of
 */

/**
 * The state after a message. One that is older than the state changes nothing, but where the state began in mid-run it has what came before; one
 * that is none changes nothing.
 * @param {State | null} state
 * @param {Message} message
 * @returns {State | null}
 */
export function next(state, message) {
  if (!(message?.chunks > 0 && message.steps > 0 && message.map)) return state;
  const same = state?.run === message.run && state.chunks === message.chunks && state.steps === message.steps;
  const stopped = same && message.number === state.number && message.stopped && !state.stopped;
  if (same && !stopped && (state.ended || message.number <= state.number)) return message.whole && !state.whole ? filled(state, message) : state;
  const map = same ? state.map : Array(message.chunks).fill("0".repeat(message.steps));
  for (const [chunk, steps] of Object.entries(message.map)) if (Number(chunk) < message.chunks) map[Number(chunk)] = String(steps);
  const whole = message.whole || (same && state.whole);
  return { ...message, whole, map, plan: message.plan ?? (same ? state.plan : []), stopped: message.stopped ?? false };
}

/** With the steps that an older message has, and the state has not. @param {State} state @param {Message} older @returns {State} */
function filled(state, older) {
  const map = state.map.map((steps, k) => [...steps].map((step, j) => (step === "0" ? (older.map[k]?.[j] ?? "0") : step)).join(""));
  return { ...state, whole: true, map, plan: state.plan.length ? state.plan : (older.plan ?? []) };
}
