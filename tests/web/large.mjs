// A run of 500 chunks x 64 steps on the page: what is drawn for it, and how long that takes.
export const CHUNKS = 500;
export const STEPS = 64;
const CHANGES = 40;

/**
 * On a page that shows such a run under `message`'s names. `once`: by method of a canvas, the calls that a hundred messages in one frame bring about;
 * `number`: of the last of these messages.
 */
export function measure(page, message) {
  return page.evaluate(
    async ({ message, STEPS }) => {
      const frame = () => new Promise((done) => requestAnimationFrame(done));
      let { number } = message;
      const send = (map) => {
        number += 1;
        const detail = { ...message, number, map, headline: `message ${number}` };
        window.app.api.dispatchEvent(new CustomEvent("flowcache.steps", { detail }));
      };

      const counts = {};
      const pen = CanvasRenderingContext2D.prototype;
      const methods = Object.fromEntries(["fillRect", "strokeRect", "putImageData", "drawImage"].map((name) => [name, pen[name]]));
      for (const [name, method] of Object.entries(methods)) {
        pen[name] = function (...given) {
          if (this.canvas.closest(".flowcache-panel") || !this.canvas.isConnected) counts[name] = (counts[name] ?? 0) + 1;
          return method.apply(this, given);
        };
      }
      await frame();
      for (const name of Object.keys(counts)) delete counts[name];
      for (let n = 0; n < 100; n++) send({ [n]: "2".repeat(STEPS) });
      await frame();
      await frame();
      Object.assign(pen, methods);
      return { once: counts, number, panels: document.querySelectorAll(".flowcache-panel").length };
    },
    { message, STEPS },
  );
}

/**
 * Milliseconds of processor time of the page's main thread in two frames, the first of which begins with a message: median of many. By what it
 * changes: nothing (no message), one chunk, or all. Time in which other programs run is not in it.
 */
export async function milliseconds(page, message) {
  const session = await page.context().newCDPSession(page);
  await session.send("Performance.enable", { timeDomain: "threadTicks" });
  const spent = async () => (await session.send("Performance.getMetrics")).metrics.find(({ name }) => name === "TaskDuration").value * 1000;
  const letters = ["12ad", "2a1d"].map((four) => four.repeat(STEPS / 4));
  const all = letters.map((steps) => Object.fromEntries(Array.from({ length: CHUNKS }, (_, k) => [k, steps])));
  const maps = { nothing: () => null, one: (n) => ({ [n]: letters[0] }), all: (n) => all[n % 2] };
  const found = {};
  let { number } = message;
  for (const [what, map] of Object.entries(maps)) {
    const took = [];
    for (let n = 0; n < CHANGES; n++) {
      number += 1;
      const detail = map(n) && { ...message, number, map: map(n), headline: `message ${number}` };
      await page.evaluate((detail) => (window.flowcacheNext = detail), detail);
      const before = await spent();
      await page.evaluate(async () => {
        if (window.flowcacheNext) window.app.api.dispatchEvent(new CustomEvent("flowcache.steps", { detail: window.flowcacheNext }));
        for (let frames = 0; frames < 2; frames++) await new Promise((done) => requestAnimationFrame(done));
      });
      took.push((await spent()) - before);
    }
    found[what] = took.sort((one, other) => one - other)[CHANGES >> 1];
  }
  return found;
}
