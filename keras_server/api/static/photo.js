// A photo on its way to the server and back; what shows it is told of each change.

import { LIMIT, TOO_LARGE, Trouble, send } from "./server.js";
import { figure, percent, say, size, spoken } from "./words.js";

const AT_ONCE = 4; // photos on their way at the same time

const input = Math.max(document.body.dataset.width, document.body.dataset.height); // pixels that the model takes

/** Return what has a worker make a picture smaller. It resolves to the picture and its size, or to null. */
function helper(forTile) {
  const worker = new Worker(new URL("shrink.js", import.meta.url));
  const waiting = [];
  let broken = false; // where a browser refuses the worker
  worker.addEventListener("message", ({ data }) => waiting.shift()(data));
  worker.addEventListener("error", () => {
    broken = true;
    for (const resolve of waiting.splice(0)) resolve(null);
  });
  return (file) =>
    new Promise((resolve) => {
      if (broken) return resolve(null);
      waiting.push(resolve);
      worker.postMessage({ file, forTile, input, limit: LIMIT });
    });
}
const shrink = helper(false); // for the server
export const thumbnail = helper(true);

export class Photo {
  /** `path` is the name below the folder that was dropped; `changed` is called with each change. */
  constructor(file, path, changed) {
    Object.assign(this, { file, path, changed, kind: "waiting", text: "Waiting…", again: false, resized: "" });
    this.answer = null; // the server's
    this.maps = new Map(); // label to the server's heat map
  }

  /** The most probable label. */
  get best() {
    return this.answer?.predictions?.[0];
  }

  /** The numbers of a regression. */
  get values() {
    return this.answer?.values ?? [];
  }

  /** The answer in few words. */
  get words() {
    return this.best ? `${spoken(this.best.label)}, ${percent(this.best.probability)}` : this.values.map(figure).join("  ");
  }

  /** What is shown of it, and sent. */
  get picture() {
    return this.sent ?? this.file;
  }

  state(text, kind, again = false) {
    if (this.text === text && this.kind === kind) return;
    Object.assign(this, { text, kind, again });
    this.changed(this);
  }

  /** Classify the photo. */
  async run() {
    this.control = new AbortController();
    this.state("Looking…", "busy");
    try {
      await this.file.slice(0, 1).arrayBuffer().catch(() => {
        throw new Trouble("This cannot be read: it is a folder, or a file that is gone.");
      });
      if (!this.sent) await this.prepare();
      if (this.sent.size > LIMIT) throw new Trouble(TOO_LARGE);
      const { answer, took, inside } = await send("predict", this.sent, this.name, {
        signal: this.control.signal,
        news: (text) => this.state(text, "busy"),
        progress: (part) => this.state(part < 1 ? `Sending… ${Math.floor(100 * part)}%` : "Looking…", "busy"),
      });
      Object.assign(this, { answer, took, inside });
      this.state("", "done");
    } catch (error) {
      if (!(error instanceof Trouble)) throw error;
      const stopped = this.control.signal.aborted;
      this.state(error.message, stopped ? "stopped" : "failed", error.again);
      if (!stopped) say(`${this.path}: ${error.message}`);
    }
  }

  async prepare() {
    const small = await shrink(this.file);
    this.name = this.file.name;
    this.sent = small?.blob ?? this.file;
    if (!small) return;
    this.name = `${this.name.replace(/\.\w+$/, "")}-${small.width}x${small.height}.jpg`;
    this.resized = `Sent at ${small.width} × ${small.height} pixels, ${size(small.blob.size)} instead of ${size(this.file.size)}.`;
  }

  /** Return the heat map of a label. */
  async explain(label) {
    if (!this.maps.has(label)) {
      const { answer } = await send(`explain?label=${encodeURIComponent(label)}`, this.sent, this.name);
      this.maps.set(label, answer);
    }
    return this.maps.get(label);
  }
}

const queue = [];
const running = new Set();

/** Classify photos, few at a time. */
export function enqueue(photos) {
  for (const photo of photos) photo.state("Waiting…", "waiting");
  queue.push(...photos);
  while (running.size < AT_ONCE && queue.length) {
    const photo = queue.shift();
    running.add(photo);
    photo.run().finally(() => {
      running.delete(photo);
      enqueue([]);
    });
  }
}

/** Send nothing more, and end what is on its way. */
export function stop() {
  for (const photo of queue.splice(0)) photo.state("Stopped.", "stopped", true);
  for (const photo of running) photo.control.abort();
}
