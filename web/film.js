// @ts-check
// The film of a run as far as its chunks are finished: the frames as the server sends them, and a screen on which they play.
import { STRINGS } from "./strings.js";

/**
 * A message of the server: `frames` frames, the first of which is number `first` of the film, beside one another in the JPEG `picture`; or a `note`
 * in their place.
 * @typedef {{node: string, workflow?: string | null, run: string, first: number, frames: number, fps: number, picture: string, note: string}} FilmMessage
 * @typedef {{first: number, frames: number, picture: HTMLImageElement, size: number}} Strip
 */

const MOST = 24 * 2 ** 20; // characters of pictures that are kept of a film, the latest: some three minutes

/** What has come of one film. */
export class Film {
  /** @param {string} run */
  constructor(run) {
    this.run = run;
    /** @type {Strip[]} one after the other; the first may be missing where the page was loaded during the run */
    this.strips = [];
    this.fps = 24;
    this.note = "";
    this.size = 0;
  }

  /** The number of its first frame that is there. */
  get begin() {
    return this.strips[0]?.first ?? 0;
  }

  /** The number after its last frame. */
  get end() {
    const last = this.strips.at(-1);
    return last ? last.first + last.frames : 0;
  }

  /**
   * In any order: those that are there already change nothing, and what comes before a gap is left out.
   * @param {FilmMessage[]} messages @returns {boolean} whether they brought anything
   */
  add(messages) {
    const [notes, fresh] = [messages.filter(({ note }) => note), messages.filter((one) => this.isNew(one))];
    if (fresh.length) this.put(fresh);
    if (notes.length || fresh.length) this.note = messages.at(-1)?.note ?? "";
    return notes.length + fresh.length > 0;
  }

  /** @param {FilmMessage} message */
  isNew({ first, frames, fps, picture }) {
    const there = (/** @type {Strip} */ one) => one.first < first + frames && first < one.first + one.frames;
    return frames > 0 && fps > 0 && typeof picture === "string" && !this.strips.some(there);
  }

  /** @param {FilmMessage[]} fresh */
  put(fresh) {
    this.strips = sinceGap(inOrder([...this.strips, ...fresh.map(stripOf)]));
    this.fps = fresh[0].fps;
    this.size = this.strips.reduce((sum, { size }) => sum + size, 0);
    while (this.size > MOST && this.strips.length > 1) this.size -= this.strips.shift()?.size ?? 0;
  }

  /** @param {number} frame its number @returns {Strip | undefined} the one that it is in */
  at(frame) {
    let [low, high] = [0, this.strips.length - 1];
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (this.strips[middle].first <= frame) low = middle;
      else high = middle - 1;
    }
    return this.strips[low];
  }
}

/** @param {FilmMessage} message @returns {Strip} */
function stripOf({ first, frames, picture: encoded }) {
  const picture = new Image();
  picture.src = `data:image/jpeg;base64,${encoded}`;
  return { first, frames, picture, size: encoded.length };
}

/** By their first frame; of those that overlap one stays. @param {Strip[]} strips */
function inOrder(strips) {
  const sorted = [...strips].sort((one, other) => one.first - other.first);
  return sorted.filter(({ first }, n) => n === 0 || first >= sorted[n - 1].first + sorted[n - 1].frames);
}

/** Those that follow the last gap. @param {Strip[]} strips in order */
function sinceGap(strips) {
  const begin = strips.findLastIndex(({ first }, n) => n > 0 && first !== strips[n - 1].first + strips[n - 1].frames);
  return strips.slice(Math.max(begin, 0));
}

/** Plays a film over and over, as far as it has come; a click holds it. */
export class Screen {
  constructor() {
    this.root = document.createElement("div");
    this.root.className = "flowcache-film";
    this.root.style.cssText = "display:none; flex:2 1 0; min-height:130px; flex-direction:column; gap:2px;";
    this.caption = document.createElement("div");
    this.canvas = document.createElement("canvas");
    this.canvas.style.cssText = "flex:1 1 0; min-height:0; width:100%; object-fit:contain; cursor:pointer;";
    this.canvas.tabIndex = 0;
    this.canvas.setAttribute("role", "button");
    this.canvas.setAttribute("aria-label", STRINGS.filmHelp);
    this.canvas.title = STRINGS.filmHelp;
    this.canvas.addEventListener("click", () => this.toggle());
    this.canvas.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault(); // or the list scrolls
      this.toggle();
    });
    this.root.append(this.caption, this.canvas);
    /** @type {Film | null} */
    this.film = null;
    this.expected = false;
    this.playing = !matchMedia("(prefers-reduced-motion: reduce)").matches;
    this.position = 0; // in frames, from the first that is there
    this.drawn = -1; // the number of the frame that is seen
    this.then = 0;
    this.waiting = 0;
    new ResizeObserver(() => this.go()).observe(this.root);
  }

  /** @param {Film | null} film */
  look(film) {
    if (film !== this.film) Object.assign(this, { film, position: 0, drawn: -1 });
    const there = Boolean(film?.strips.length);
    this.root.style.display = there || film?.note || this.expected ? "flex" : "none";
    this.canvas.style.display = there ? "block" : "none";
    this.caption.textContent = film && there ? soFar(film.begin / film.fps, film.end / film.fps) : film?.note || STRINGS.filmWaiting;
    if (film && !this.playing) this.position = film.end - film.begin - 1;
    this.go();
  }

  toggle() {
    this.playing = !this.playing;
    this.go();
  }

  /** Until nobody sees it. */
  go() {
    this.waiting ||= requestAnimationFrame((now) => {
      this.waiting = 0;
      if (!this.film?.strips.length || !this.canvas.clientWidth) return;
      this.step(this.film, now);
      if (this.playing) this.go();
    });
  }

  /** @param {Film} film @param {number} now in milliseconds */
  step(film, now) {
    const passed = Math.min(now - this.then, 100);
    this.then = now;
    const count = film.end - film.begin;
    if (this.playing) this.position = (this.position + (passed / 1000) * film.fps) % count;
    const frame = film.begin + Math.min(Math.floor(this.position), count - 1);
    const strip = film.at(frame);
    if (strip && !strip.picture.complete && !this.playing) strip.picture.addEventListener("load", () => this.go(), { once: true });
    if (frame === this.drawn || !strip?.picture.complete || !strip.picture.naturalWidth) return;
    this.drawn = frame;
    this.draw(strip, frame - strip.first);
  }

  /** @param {Strip} strip @param {number} index */
  draw({ picture, frames }, index) {
    const [width, height] = [picture.naturalWidth / frames, picture.naturalHeight];
    const { canvas } = this;
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    canvas.getContext("2d")?.drawImage(picture, index * width, 0, width, height, 0, 0, width, height);
  }
}

/** @param {number} from @param {number} to seconds */
function soFar(from, to) {
  return `${STRINGS.filmSoFar}: ${from ? `${from.toFixed(1)}-` : ""}${to.toFixed(1)} s`;
}
