// The server, and its key, which is kept here and nowhere else.

import { $ } from "./words.js";

const TRIES = 5; // of one photo, while the server is busy
const LONGEST_WAIT = 10; // seconds before the next try, whatever Retry-After asks for

const MOST = Number(document.body.dataset.limit);

export const LIMIT = MOST * 2 ** 20; // bytes
export const TOO_LARGE = `The request is larger than the ${MOST} MiB that this server takes: send a smaller picture.`;
const { model } = document.body.dataset; // where the server has several
const folder = model === undefined ? "" : `models/${encodeURIComponent(model)}/`;
export const address = (path) => new URL(folder + path, location.href).href;

/** A sentence for the person; `again` where another try may help. */
export class Trouble extends Error {
  constructor(sentence, again = false) {
    super(sentence);
    this.again = again;
  }
}

export let key = "";
let asking = null; // the promise of a key, while the person is asked

/** Ask for the key; everything that waits for one shares the question. Resolves to whether there is a new one. */
function askKey(wrong) {
  asking ??= new Promise((resolve) => {
    const door = $("door");
    if (wrong) $("door-why").textContent = "The server did not take that key. Is it complete?";
    $("key").value = "";
    door.returnValue = "";
    door.showModal();
    door.addEventListener(
      "close",
      () => {
        const given = $("key").value.trim();
        $("key").value = "";
        asking = null;
        if (door.returnValue === "given" && given) key = given;
        resolve(door.returnValue === "given" && given !== "");
      },
      { once: true },
    );
  });
  return asking;
}

/** Post a form; fetch() does not tell how much is sent. Resolves to the finished request. Throws Trouble. */
function post(path, form, { signal, progress }) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("POST", address(path));
    request.setRequestHeader("Accept", "application/json");
    try {
      if (key) request.setRequestHeader("Authorization", `Bearer ${key}`);
    } catch {
      key = "";
      throw new Trouble("The API key holds characters that cannot be sent.", true);
    }
    if (progress) request.upload.addEventListener("progress", ({ loaded, total }) => progress(loaded / total));
    request.addEventListener("load", () => resolve(request));
    request.addEventListener("error", () => reject(new Trouble("The server cannot be reached: is it still running?", true)));
    request.addEventListener("abort", () => reject(new Trouble("Stopped.", true)));
    signal?.addEventListener("abort", () => request.abort());
    if (signal?.aborted) reject(new Trouble("Stopped.", true));
    else request.send(form);
  });
}

/** Return a sentence for an answer that the server itself does not give. */
function foreign(status) {
  const meanings = {
    413: "refused the size: send a smaller picture.",
    502: "got no answer from it.",
    503: "has none to ask just now: try again.",
    504: "did not wait for its answer: try again.",
  };
  if (status in meanings) return `A proxy before the server ${meanings[status]}`;
  return `The answer ${status} is no JSON: it is not this server's own.`;
}

/** Send a picture, again while the server is busy. Returns the answer and how long it took. Throws Trouble. */
export async function send(path, picture, name, { news = () => {}, signal, progress } = {}) {
  for (let attempt = 1; ; attempt++) {
    const form = new FormData();
    form.append("image", picture, name);
    const used = key;
    const started = performance.now();
    const request = await post(path, form, { signal, progress });
    const took = performance.now() - started;
    let answer = null;
    try {
      answer = JSON.parse(request.responseText);
    } catch {}
    const { status } = request;
    if (status === 200 && answer) {
      const inside = /\bdur=([\d.]+)/.exec(request.getResponseHeader("Server-Timing") ?? "");
      return { answer, took, inside: inside && Number(inside[1]) };
    }
    if ((status === 503 || (status >= 500 && !answer)) && attempt < TRIES) {
      news("The server is busy: asking again in a moment…");
      const seconds = Math.min(Number(request.getResponseHeader("Retry-After") ?? 1) || 0, LONGEST_WAIT);
      await new Promise((resolve) => {
        setTimeout(resolve, 1000 * seconds);
        signal?.addEventListener("abort", resolve);
      });
    } else if (!answer) throw new Trouble(foreign(status), status !== 413);
    else if (status !== 401 || (used === key && !(await askKey(used !== ""))))
      throw new Trouble(answer.error ?? `The server answered ${status}.`, [401, 503, 504].includes(status));
    else attempt = 0;
  }
}
