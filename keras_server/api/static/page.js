// The page: photos in, labels and heat maps out. Plain JavaScript, as the browser reads it.

const AT_ONCE = 4; // photos on their way to the server at the same time
const TRIES = 5; // of one photo, while the server is busy
const LONGEST_WAIT = 10; // seconds before the next try, whatever Retry-After asks for
const WORTH = 2 ** 20; // bytes from which a photo is shrunk

const $ = (id) => document.getElementById(id);
const { limit, width, height, ramp } = document.body.dataset;
const LIMIT = Number(limit) * 2 ** 20; // bytes
const RAMP = ramp.split(" "); // the server's colours of heat, from nothing to most
const INPUT = Math.max(width, height); // pixels that the model takes
const TOO_LARGE = `The request is larger than the ${Number(limit)} MiB that this server takes: send a smaller picture.`;
const address = (path) => new URL(path, location.href).href;

/** A sentence for the person; `again` where another try may help. */
class Trouble extends Error {
  constructor(sentence, again = false) {
    super(sentence);
    this.again = again;
  }
}

// ---------------------------------------------------------------------------------------------------------
// Words
// ---------------------------------------------------------------------------------------------------------

const spoken = (label) => label.replaceAll("_", " ");
const percent = (p) => (p > 0 && p < 0.001 ? "< 0.1%" : `${(100 * p).toFixed(1)}%`);
const size = (bytes) => (bytes < 1e6 ? `${Math.max(1, Math.round(bytes / 1e3))} kB` : `${(bytes / 1e6).toFixed(1)} MB`);
const milliseconds = (ms) => (ms < 9.95 ? `${ms.toFixed(1)} ms` : `${Math.round(ms)} ms`);

/** Tell a screen reader. */
function say(text) {
  const line = document.createElement("p");
  line.textContent = text;
  $("log").append(line);
  while ($("log").children.length > 8) $("log").firstChild.remove();
}

/** Quote for a POSIX shell. */
const quoted = (text) => (/^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);

/** Return the form field as curl takes it, which splits a name at ; and , unless it is quoted. */
function field(name) {
  const plain = /^[^";,\\]+$/.test(name) ? name : `"${name.replace(/["\\]/g, "\\$&")}"`;
  return quoted(`image=@${plain}`);
}

const asCurl = (url, name, out) =>
  `curl -X POST -F ${field(name)}${key && ' -H "Authorization: Bearer $KERAS_SERVER_API_KEY"'} ${quoted(url)}${out ? ` -o ${quoted(out)}` : ""}`;

function asPython(url, name) {
  const headers = key && '        headers={"Authorization": "Bearer " + os.environ["KERAS_SERVER_API_KEY"]},\n';
  return `${key && "import os\n\n"}import requests

with open(${JSON.stringify(name)}, "rb") as image:
    answer = requests.post(
        ${JSON.stringify(url)},
        files={"image": image},
${headers}        timeout=60,
    )
print(answer.json())`;
}

// ---------------------------------------------------------------------------------------------------------
// The server, and its key, which is kept here and nowhere else
// ---------------------------------------------------------------------------------------------------------

let key = "";
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

const sleep = (seconds) => new Promise((resolve) => setTimeout(resolve, 1000 * seconds));

/** Say what an answer means that is not this server's own, but a proxy's. */
function foreign(status) {
  const meanings = {
    413: "refused the size: send a smaller picture, or have the proxy's limit raised.",
    502: "got no answer from it: is the server still running?",
    503: "has none to ask just now: try again in a moment.",
    504: "did not wait for its answer: try again, or have the proxy wait longer.",
  };
  if (status in meanings) return `A proxy before the server ${meanings[status]}`;
  return `The answer ${status} is no JSON: it does not come from this server itself.`;
}

/** Send a picture, again while the server is busy. Returns the answer and how long it took. Throws Trouble. */
async function send(path, picture, name, news = () => {}) {
  for (let attempt = 1; ; attempt++) {
    const form = new FormData();
    form.append("image", picture, name);
    const used = key;
    const headers = new Headers({ Accept: "application/json" });
    const started = performance.now();
    let response, answer;
    try {
      if (used) headers.set("Authorization", `Bearer ${used}`);
    } catch {
      key = "";
      throw new Trouble("The API key holds characters that cannot be sent.", true);
    }
    try {
      response = await fetch(address(path), { method: "POST", body: form, headers });
      answer = await response.json();
    } catch (error) {
      if (response && error instanceof SyntaxError)
        throw new Trouble(foreign(response.status), response.status !== 413);
      throw new Trouble("The server cannot be reached: is it still running?", true);
    }
    const took = performance.now() - started;
    if (response.ok) {
      const inside = /\bdur=([\d.]+)/.exec(response.headers.get("Server-Timing") ?? "");
      return { answer, took, inside: inside && Number(inside[1]) };
    }
    const busy = response.status === 503 && attempt < TRIES;
    if (busy) {
      news("The server is busy: asking again in a moment…");
      await sleep(Math.min(Number(response.headers.get("Retry-After")) || 1, LONGEST_WAIT));
    } else if (response.status !== 401 || (used === key && !(await askKey(used !== ""))))
      throw new Trouble(answer.error ?? `The server answered ${response.status}.`, [401, 503, 504].includes(response.status));
    else attempt = 0;
  }
}

// ---------------------------------------------------------------------------------------------------------
// Photos too large to be worth their way
// ---------------------------------------------------------------------------------------------------------

/** Return the number of colour channels that a JPEG's frame header names, or 3. */
async function channels(file) {
  const bytes = new Uint8Array(await file.slice(0, 2 ** 18).arrayBuffer());
  for (let i = 2; bytes[i] === 0xff && i + 9 < bytes.length; i += 2 + 256 * bytes[i + 2] + bytes[i + 3])
    if ((bytes[i + 1] & 0xf0) === 0xc0 && ![0xc4, 0xc8, 0xcc].includes(bytes[i + 1])) return bytes[i + 9];
  return 3;
}

/**
 * Return a smaller copy of a large photo, upright, or null where it is better sent as it is.
 *
 * Eight times the model's input on the longer side and four on the shorter leave the server as much as it decodes of
 * a large JPEG itself. Colours stay as they are in the file, for the server does not convert profiles either. Other
 * formats are shrunk only where the server would refuse them: a drawing's even areas do not bear JPEG's rounding.
 * Pictures with transparency or printers' colours are never shrunk.
 */
async function shrink(file) {
  const isJpeg = file.type === "image/jpeg";
  if (file.size <= (isJpeg ? Math.min(WORTH, LIMIT) : LIMIT)) return null;
  if (isJpeg ? (await channels(file)) > 3 : !["image/png", "image/webp"].includes(file.type)) return null;
  const bitmap = await createImageBitmap(file, { imageOrientation: "from-image", colorSpaceConversion: "none" }).catch(() => null);
  if (!bitmap) return null;
  const [long, short] = [Math.max(bitmap.width, bitmap.height), Math.min(bitmap.width, bitmap.height)];
  const scale = Math.min(1, Math.max((8 * INPUT) / long, (4 * INPUT) / short));
  if (scale === 1 && file.size <= LIMIT) return null;
  const canvas = document.createElement("canvas");
  canvas.width = Math.round(scale * bitmap.width);
  canvas.height = Math.round(scale * bitmap.height);
  const brush = canvas.getContext("2d", { willReadFrequently: !isJpeg });
  brush.imageSmoothingQuality = "high";
  brush.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  if (!isJpeg && brush.getImageData(0, 0, canvas.width, canvas.height).data.some((value, i) => i % 4 === 3 && value < 255))
    return null;
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.92));
  if (!blob || blob.size >= file.size) return null;
  return { blob, name: `${file.name.replace(/\.\w+$/, "")}-${canvas.width}x${canvas.height}.jpg`, canvas };
}

// ---------------------------------------------------------------------------------------------------------
// Heat maps
// ---------------------------------------------------------------------------------------------------------

/** Return colour `t`, 0 to 1, of the ramp as three numbers. */
function colour(t) {
  const at = Math.min(t * (RAMP.length - 1), RAMP.length - 1.001);
  const mix = (i) => {
    const [a, b] = [RAMP[Math.floor(at)], RAMP[Math.floor(at) + 1]].map((hex) => parseInt(hex.slice(i, i + 2), 16));
    return a + (b - a) * (at % 1);
  };
  return [mix(1), mix(3), mix(5)];
}
const COLOURS = Array.from({ length: 256 }, (_, i) => colour(i / 255));

/** Stretch a line of numbers as Pillow's bicubic filter does, which draws the server's overlays. */
function stretch(line, length) {
  const cubic = (t) => (t < 1 ? (1.5 * t - 2.5) * t * t + 1 : t < 2 ? ((2.5 - 0.5 * t) * t - 4) * t + 2 : 0);
  return Array.from({ length }, (_, i) => {
    const x = ((i + 0.5) * line.length) / length - 0.5;
    let sum = 0;
    let weights = 0;
    for (let k = Math.max(0, Math.floor(x) - 1); k <= Math.min(line.length - 1, Math.floor(x) + 2); k++) {
      sum += cubic(Math.abs(x - k)) * line[k];
      weights += cubic(Math.abs(x - k));
    }
    return sum / weights;
  });
}

const transposed = (map) => map[0].map((_, i) => map.map((row) => row[i]));

/** Draw a map where the model saw the picture: the more a spot speaks for the label, the less transparent. */
function paint(canvas, { map, width, height, seen }) {
  const scale = 384 / Math.max(width, height);
  canvas.width = Math.max(1, Math.round(scale * width));
  canvas.height = Math.max(1, Math.round(scale * height));
  const [left, top, right, bottom] = seen.map((edge) => Math.round(scale * edge));
  const [wide, high] = [Math.max(1, right - left), Math.max(1, bottom - top)];
  const rows = map.map((row) => stretch(row, wide));
  const columns = transposed(rows).map((column) => stretch(column, high));
  const image = new ImageData(wide, high);
  for (let y = 0, i = 0; y < high; y++)
    for (let x = 0; x < wide; x++, i += 4) {
      const value = Math.round(255 * Math.min(1, Math.max(0, columns[x][y])));
      image.data.set([...COLOURS[value], value], i);
    }
  canvas.getContext("2d").putImageData(image, left, top);
}

/** Say where a map is strongest, for those who cannot see it. */
function place(map) {
  const most = Math.max(...map.flat());
  if (most === 0) return "";
  const y = map.findIndex((row) => row.includes(most));
  const third = (i, n) => Math.min(2, Math.floor((3 * (i + 0.5)) / n));
  const [vertical, horizontal] = [third(y, map.length), third(map[y].indexOf(most), map[0].length)];
  const words = [["top", "middle", "bottom"][vertical], ["left", "", "right"][horizontal]].filter(Boolean).join(" ");
  return words === "middle" ? "in the middle" : `at the ${words}`;
}

// ---------------------------------------------------------------------------------------------------------
// A photo's card
// ---------------------------------------------------------------------------------------------------------

let explaining = Promise.resolve(); // one map after the other: the server draws no more at once either

class Card {
  constructor(file) {
    this.file = file;
    this.root = $("card").content.cloneNode(true).firstElementChild;
    this.maps = new Map(); // label to the server's answer
    this.label = null; // whose heat map is wanted
    this.part("h2").textContent = file.name;
    this.part(".state").textContent = "Waiting…";
    const photo = this.part(".photo");
    photo.alt = file.name;
    photo.addEventListener("error", () => this.root.classList.add("blind"));
    this.show(file);
    this.part(".again").addEventListener("click", () => enqueue([this]));
    this.part("input").addEventListener("input", () => this.strengthen());
    const legend = this.part(".legend").getContext("2d");
    for (let x = 0; x < 64; x++) {
      legend.fillStyle = `rgb(${colour(x / 63)})`;
      legend.fillRect(x, 0, 1, 1);
    }
  }

  part(selector) {
    return this.root.querySelector(selector);
  }

  show(blob) {
    URL.revokeObjectURL(this.url);
    this.url = URL.createObjectURL(blob);
    this.part(".photo").src = this.url;
  }

  discard() {
    this.gone = true;
    URL.revokeObjectURL(this.url);
    this.root.remove();
  }

  state(text, kind = "") {
    this.part(".state").textContent = text;
    this.part(".state").hidden = !text;
    this.root.dataset.kind = kind;
  }

  /** Classify the photo and show the answer, or why there is none. */
  async run() {
    this.part(".again").hidden = true;
    this.state("Looking…", "busy");
    try {
      await this.file.slice(0, 1).arrayBuffer().catch(() => {
        throw new Trouble("This cannot be read: it is a folder, or a file that is gone.");
      });
      if (!this.sent) await this.prepare();
      if (this.sent.size > LIMIT) throw new Trouble(TOO_LARGE);
      const { answer, took, inside } = await send("predict", this.sent, this.name, (text) => this.state(text, "busy"));
      if (!this.gone) this.answered(answer, took, inside);
    } catch (error) {
      if (!(error instanceof Trouble)) throw error;
      this.state(error.message, "failed");
      this.part(".again").hidden = !error.again;
      say(`${this.file.name}: ${error.message}`);
    }
    count();
  }

  async prepare() {
    const small = await shrink(this.file);
    this.sent = small?.blob ?? this.file;
    this.name = small?.name ?? this.file.name;
    if (!small) return;
    this.show(small.blob);
    const { width, height } = small.canvas;
    const line = this.part(".sent");
    line.textContent = `Sent at ${width} × ${height} pixels, ${size(small.blob.size)} instead of ${size(this.file.size)}.`;
    line.hidden = false;
  }

  answered({ model, predictions = [], values = [] }, took, inside) {
    this.state("", "done");
    const numbers = this.part(".values"); // of a regression, which knows no labels
    numbers.textContent = values.map((value) => Number(value.toPrecision(4)).toLocaleString()).join("  ");
    numbers.hidden = !values.length;
    const rows = predictions.map(({ label, probability }) => {
      const row = $("row").content.cloneNode(true).firstElementChild;
      const button = row.firstElementChild;
      button.dataset.label = label;
      button.querySelector(".label").textContent = spoken(label);
      button.querySelector(".percent").textContent = percent(probability);
      button.querySelector(".bar > span").style.width = `${100 * probability}%`;
      button.addEventListener("click", () => this.choose(label));
      return row;
    });
    this.part(".rows").replaceChildren(...rows);
    this.part(".hint").hidden = !predictions.length;
    const times = this.part(".times");
    times.textContent = `${model} · ${milliseconds(took)} there and back`;
    if (inside !== null) times.textContent += `, ${milliseconds(inside)} of them in the server`;
    times.hidden = false;
    this.part("details").hidden = false;
    this.codes();
    const [best] = predictions;
    say(`${this.file.name}: ${best ? `${spoken(best.label)}, ${percent(best.probability)}` : numbers.textContent}`);
  }

  /** Fill the boxes that repeat this request elsewhere. */
  codes() {
    const link = this.part("details a");
    [link.href, link.download, link.textContent] = [this.url, this.name, this.name];
    const boxes = [
      ["As curl", asCurl(address("predict"), this.name)],
      ["As Python", asPython(address("predict"), this.name)],
    ];
    if (this.label !== null) {
      const query = `explain?label=${encodeURIComponent(this.label)}`;
      boxes.push(["The heat map as curl", asCurl(address(query), this.name, `${this.label.replace(/[^\w-]/g, "_")}.png`)]);
    }
    const filled = boxes.map(([title, text]) => {
      const box = $("code").content.cloneNode(true).firstElementChild;
      box.querySelector("p").textContent = title;
      box.querySelector("code").textContent = text;
      box.querySelector("pre").setAttribute("aria-label", title);
      const button = box.querySelector("button");
      button.setAttribute("aria-label", `Copy: ${title}`);
      button.addEventListener("click", () => copy(box));
      return box;
    });
    this.part(".codes").replaceChildren(...filled);
  }

  /** Show the heat map of a label; hide it where it is shown. */
  async choose(label) {
    this.label = this.label === label ? null : label;
    for (const button of this.root.querySelectorAll(".rows button"))
      button.setAttribute("aria-pressed", button.dataset.label === this.label);
    this.part(".heat").hidden = true;
    this.part("figcaption").hidden = this.label === null;
    this.codes();
    if (this.label === null) return;
    this.part(".scale").hidden = true;
    this.part(".why").textContent = "Looking where…";
    this.root.dataset.heat = "busy";
    const slow = setTimeout(() => {
      if (this.label === label) this.part(".why").textContent = "Looking where… The first time the server loads what it needs.";
    }, 1500);
    try {
      const turn = explaining.then(() => this.explain(label));
      explaining = turn.catch(() => {});
      await turn;
      if (this.label === label) this.heat(label);
    } catch (error) {
      if (!(error instanceof Trouble)) throw error;
      if (this.label === label) {
        this.part(".why").textContent = error.message;
        this.root.dataset.heat = "failed";
        say(error.message);
      }
    } finally {
      clearTimeout(slow);
    }
  }

  async explain(label) {
    if (this.maps.has(label) || this.label !== label || this.gone) return;
    const { answer } = await send(`explain?label=${encodeURIComponent(label)}`, this.sent, this.name);
    this.maps.set(label, answer);
  }

  heat(label) {
    const answer = this.maps.get(label);
    const canvas = this.part(".heat");
    const where = place(answer.map);
    const words = where
      ? `What speaks for “${spoken(label)}” is strongest ${where}.`
      : `Nothing in this picture speaks for “${spoken(label)}”.`;
    paint(canvas, answer);
    if (this.root.classList.contains("blind")) this.part(".frame").style.aspectRatio = `${answer.width} / ${answer.height}`;
    canvas.setAttribute("aria-label", `Heat map. ${words}`);
    canvas.hidden = false;
    this.part(".why").textContent = words;
    this.part(".scale").hidden = !where;
    this.root.dataset.heat = "shown";
    this.strengthen();
    say(words);
  }

  strengthen() {
    this.part(".heat").style.opacity = this.part("input").value / 100;
  }
}

/** Copy a box's text, also where the browser allows its clipboard only to pages with a certificate. */
async function copy(box) {
  const [code, button] = [box.querySelector("code"), box.querySelector("button")];
  try {
    await navigator.clipboard.writeText(code.textContent);
  } catch {
    getSelection().selectAllChildren(code);
    document.execCommand("copy");
  }
  button.textContent = "Copied";
  say("Copied");
  setTimeout(() => (button.textContent = "Copy"), 2000);
}

// ---------------------------------------------------------------------------------------------------------
// The page
// ---------------------------------------------------------------------------------------------------------

let cards = [];
const queue = [];
let running = 0;

function enqueue(more) {
  queue.push(...more);
  while (running < AT_ONCE && queue.length) {
    running += 1;
    queue
      .shift()
      .run()
      .finally(() => {
        running -= 1;
        enqueue([]);
      });
  }
}

/** Take files in: the newest on top, those that came together in their order. */
function take(files) {
  const fresh = [...files].map((file) => new Card(file));
  if (!fresh.length) return;
  cards.push(...fresh);
  $("results").prepend(...fresh.map((card) => card.root));
  document.body.classList.add("busy");
  $("clear").hidden = false;
  enqueue(fresh);
  count();
}

function count() {
  const kinds = cards.map((card) => card.root.dataset.kind);
  const [done, failed] = ["done", "failed"].map((kind) => kinds.filter((k) => k === kind).length);
  $("count").textContent = cards.length < 2 ? "" : `${done} of ${cards.length} photos answered${failed ? `, ${failed} failed` : ""}`;
}

function clear() {
  queue.length = 0;
  for (const card of cards) card.discard();
  cards = [];
  document.body.classList.remove("busy");
  $("clear").hidden = true;
  $("choose").focus();
  count();
}

async function sample() {
  try {
    const response = await fetch("static/dog.jpg");
    if (!response.ok) throw new Error();
    take([new File([await response.blob()], "dog.jpg", { type: "image/jpeg" })]);
  } catch {
    say("The sample photo cannot be had: is the server still running?");
  }
}

/** Let whole windows of files be dropped anywhere. */
function watchDrops() {
  let depth = 0; // a drag enters each element that it comes over
  const over = (change) => {
    depth = change === 0 ? 0 : Math.max(0, depth + change);
    document.body.classList.toggle("dragging", depth > 0);
  };
  const carriesFiles = (event) => event.dataTransfer?.types.includes("Files");
  addEventListener("dragenter", (event) => carriesFiles(event) && over(1));
  addEventListener("dragleave", (event) => carriesFiles(event) && over(-1));
  addEventListener("dragover", (event) => carriesFiles(event) && event.preventDefault());
  addEventListener("drop", (event) => {
    if (!carriesFiles(event)) return;
    event.preventDefault();
    over(0);
    take(event.dataTransfer.files);
  });
  addEventListener("paste", (event) => take(event.clipboardData?.files ?? []));
}

if (width) {
  for (const [button, input] of [["choose", "files"], ["camera", "shot"]]) {
    $(button).addEventListener("click", () => $(input).click());
    $(input).addEventListener("change", () => {
      take($(input).files);
      $(input).value = ""; // so that the same file can be chosen again
    });
  }
  $("sample").addEventListener("click", sample);
  $("clear").addEventListener("click", clear);
  $("leave").addEventListener("click", () => $("door").close(""));
  $("door").addEventListener("submit", (event) => {
    event.preventDefault();
    $("door").close("given");
  });
  watchDrops();
}
