// A run of 500 chunks x 64 steps on the page: what is drawn for it, and how long that takes.
export const CHUNKS = 500;
export const STEPS = 64;

/**
 * On a page that shows such a run under `message`'s names. `once`: by method of a canvas, the calls that a hundred messages in one frame bring about.
 * `milliseconds`: medians per frame, of the page's own work and from one frame to the next; while nothing comes, while one chunk changes in every
 * frame, and while all do.
 */
export function measure(page, message) {
  return page.evaluate(
    async ({ message, CHUNKS, STEPS }) => {
      const frame = () => new Promise((done) => requestAnimationFrame(done));
      let number = message.number;
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
      const once = { ...counts };
      Object.assign(pen, methods);

      const median = (some) => some.sort((one, other) => one - other)[some.length >> 1];
      const pace = async (begin) => {
        const [works, frames] = [[], []];
        const ask = window.requestAnimationFrame;
        for (let n = 0; n < 40; n++) {
          let work = 0;
          const timed = (call) => (now) => {
            const began = performance.now();
            call(now);
            work += performance.now() - began;
          };
          window.requestAnimationFrame = (call) => ask.call(window, timed(call));
          const began = performance.now();
          timed(() => begin(n))();
          await frame();
          await frame();
          works.push(work);
          frames.push((performance.now() - began) / 2);
        }
        window.requestAnimationFrame = ask;
        return { work: median(works), frame: median(frames) };
      };
      const letters = ["12ad", "2a1d"].map((four) => four.repeat(STEPS / 4));
      const all = letters.map((steps) => Object.fromEntries(Array.from({ length: CHUNKS }, (_, k) => [k, steps])));
      const milliseconds = {
        nothing: await pace(() => undefined),
        one: await pace((n) => send({ [100 + n]: letters[0] })),
        all: await pace((n) => send(all[n % 2])),
      };
      return { once, number, milliseconds, panels: document.querySelectorAll(".flowcache-panel").length };
    },
    { message, CHUNKS, STEPS },
  );
}
