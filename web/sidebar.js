// @ts-check
// A tab in the sidebar: the running and the last run of every AR Chunk Sampler of the open workflow, and the way to its node. Reads the graph,
// changes nothing of it.
import { app } from "../../scripts/app.js";
import { bringIntoView } from "./graph.js";
import { LINE } from "./live_map.js";
import { Panel } from "./live_panel.js";
import { Run, runAt, samplers, watch } from "./runs.js";
import { STRINGS } from "./strings.js";

/** @typedef {import("./graph.js").Place} Place */

const LOOKS_AGAIN_MS = 1000; // at which samplers there are: no event announces nodes that come, go or are renamed
const HEIGHT = { least: 150, most: 420, beside: 96, film: 220 }; // of a panel, of what it has beside the map, and of a film
const LIST = "display:flex; flex-direction:column; gap:10px; padding:10px; height:100%; overflow-y:auto; box-sizing:border-box;";
const TITLE =
  "display:flex; width:100%; gap:8px; align-items:baseline; padding:4px 2px; border:0; background:none; cursor:pointer; text-align:start; " +
  "font:13px/1.35 sans-serif; color:var(--input-text, #ddd);";
/** Told apart by their shapes. */
const MARKS = { running: "▶", finished: "✓", stopped: "■", notRun: "○" };

const NONE = new Run();

/** A sampler in the list. */
class Entry {
  /** @param {Place} place */
  constructor(place) {
    this.place = place;
    this.root = document.createElement("section");
    this.button = document.createElement("button");
    this.button.type = "button";
    this.button.style.cssText = TITLE;
    this.button.title = STRINGS.show;
    this.button.addEventListener("click", () => bringIntoView(this.place.node));
    this.panel = new Panel(HEIGHT.least);
    /** @type {unknown[]} */
    this.shown = [];
    this.root.append(this.button, this.panel.root);
  }

  /** @param {Place} place @param {Run} run */
  show(place, run) {
    this.place = place;
    const name = `${place.titles.join(" › ")} #${place.path}`;
    const now = [name, run, run.state, run.status, run.note, run.film, run.film?.begin, run.film?.end, run.film?.note];
    if (now.every((one, n) => one === this.shown[n])) return;
    this.shown = now;
    const [mark, title, status] = ["span", "strong", "span"].map((kind) => document.createElement(kind));
    mark.textContent = MARKS[run.status];
    mark.setAttribute("aria-hidden", "true");
    title.textContent = name;
    title.style.cssText = "flex:1; min-width:0; overflow-wrap:anywhere;";
    status.textContent = STRINGS[run.status];
    this.button.replaceChildren(mark, title, status);
    const high = run.state ? HEIGHT.beside + run.state.chunks * LINE : HEIGHT.least;
    const film = run.film ? HEIGHT.film : 0;
    this.panel.root.style.height = `${Math.min(HEIGHT.most, Math.max(HEIGHT.least, high)) + film}px`;
    this.panel.look(run);
  }
}

/** The tab's inside, while it is open. */
class List {
  /** @param {HTMLElement} into */
  constructor(into) {
    /** @type {Map<string, Entry>} */
    this.entries = new Map();
    this.root = document.createElement("div");
    this.root.className = "flowcache-sidebar";
    this.root.style.cssText = LIST;
    into.replaceChildren(this.root);
    this.unwatch = watch(() => this.show());
    this.timer = setInterval(() => this.show(), LOOKS_AGAIN_MS);
    this.show();
  }

  close() {
    this.unwatch();
    clearInterval(this.timer);
  }

  show() {
    const places = samplers();
    const entries = places.map((place) => [place.path, this.entries.get(place.path) ?? new Entry(place)]);
    this.entries = new Map(/** @type {[string, Entry][]} */ (entries));
    for (const place of places) this.entries.get(place.path)?.show(place, runAt(place.path) ?? NONE);
    const wanted = places.length ? [...this.entries.values()].map(({ root }) => root) : [nothing()];
    if (wanted.length !== this.root.children.length || !places.length || wanted.some((one, n) => one !== this.root.children[n])) {
      this.root.replaceChildren(...wanted);
    }
  }
}

function nothing() {
  const text = document.createElement("p");
  text.textContent = STRINGS.noSamplers;
  return text;
}

/** @type {List | null} */
let open = null;

app.registerExtension({
  name: "flowcache.sidebar",
  setup() {
    app.extensionManager.registerSidebarTab({
      id: "flowcache",
      icon: "pi pi-bolt",
      title: STRINGS.tab,
      tooltip: STRINGS.tabHelp,
      type: "custom",
      render(/** @type {HTMLElement} */ into) {
        if (open && into.contains(open.root)) return; // the page renders again what is there
        open?.close();
        open = new List(into);
      },
      destroy() {
        open?.close();
        open = null;
      },
    });
  },
});
