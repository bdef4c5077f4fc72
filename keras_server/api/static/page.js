// The page. Few photos stand in large; more in a grid of thumbnails, laid out and decoded only where it is seen.

import { Card } from "./card.js";
import { asCsv, asJson, chosen, download, dropped } from "./files.js";
import { Photo, enqueue, stop, thumbnail } from "./photo.js";
import { $, percent, say, spoken } from "./words.js";
import { hasWebcam, openWebcam } from "./webcam.js";

const FEW = 6; // photos that are shown in large

let photos = []; // the newest on top, those that came together in their order
let open = null; // the card in the large view

// A thumbnail and its label

const watch = new IntersectionObserver(
  (entries) => {
    for (const { isIntersecting, target } of entries) if (isIntersecting) draw(target.tile);
  },
  { rootMargin: "300px" },
);

async function draw(tile) {
  watch.unobserve(tile.root);
  const small = await thumbnail(tile.photo.picture);
  if (small && !tile.gone) tile.root.querySelector("img").src = tile.url = URL.createObjectURL(small.blob);
}

class Tile {
  constructor(photo) {
    this.photo = photo;
    this.root = $("tile").content.cloneNode(true).firstElementChild;
    this.root.tile = this;
    this.root.querySelector(".name").textContent = photo.path;
    this.root.querySelector("button").addEventListener("click", () => enlarge(photo));
    this.update();
    watch.observe(this.root);
  }

  update() {
    const { best, kind, text, words } = this.photo;
    this.root.dataset.kind = kind;
    this.root.querySelector(".label").textContent = best ? spoken(best.label) : words || text;
    this.root.querySelector(".percent").textContent = best ? percent(best.probability) : "";
  }

  discard() {
    this.gone = true;
    watch.unobserve(this.root);
    URL.revokeObjectURL(this.url);
    this.root.remove();
  }
}

// The results: which are shown, in which order

const many = () => photos.length > FEW;
const certainty = ({ best, values }) => best?.probability ?? values[0];
/** Compare two things of photos; those that have none come last. */
const by = (value, sign) => (a, b) => {
  const [x, y] = [value(a), value(b)];
  if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
  return x < y ? -sign : x > y ? sign : 0;
};
const most = by(certainty, -1);
const label = by(({ best }) => best && spoken(best.label).toLowerCase(), 1);
const ORDERS = { most, least: by(certainty, 1), label: (a, b) => label(a, b) || most(a, b) };

/** The name under which the filter has a photo. */
const group = ({ best, kind }) => (best ? `=${best.label}` : kind === "done" ? "values" : kind);

/** Return the photos that are shown, as they are sorted. */
function shown() {
  if (!many()) return photos;
  const { value } = $("filter");
  const wanted = photos.filter((photo) => !value || group(photo) === value);
  const order = ORDERS[$("sort").value];
  return order ? wanted.sort(order) : wanted;
}

let planned = false;

/** Show what has changed, once a frame. */
function refresh() {
  if (planned) return;
  planned = true;
  requestAnimationFrame(() => {
    planned = false;
    count();
    if (many()) listGroups();
    arrange();
  });
}

/** Bring the list into its order, and leave the focus where it is. */
function arrange() {
  const wanted = shown().map(({ view }) => view.root);
  const list = $("results");
  if (wanted.length === list.children.length && wanted.every((root, i) => root === list.children[i])) return;
  const focused = document.activeElement;
  list.replaceChildren(...wanted);
  if (focused !== document.activeElement && list.contains(focused)) focused.focus({ preventScroll: true });
}

/** Offer the labels that there are, the most frequent first. */
function listGroups() {
  const counts = new Map();
  for (const photo of photos) counts.set(group(photo), (counts.get(group(photo)) ?? 0) + 1);
  const filter = $("filter");
  const chosen = counts.has(filter.value) ? filter.value : "";
  const options = [["", `all (${photos.length})`]];
  for (const [value, number] of [...counts].sort((a, b) => b[1] - a[1]))
    options.push([value, `${value[0] === "=" ? spoken(value.slice(1)) : value} (${number})`]);
  const now = JSON.stringify(options);
  if (filter.dataset.now === now) return;
  filter.dataset.now = now;
  filter.replaceChildren(...options.map(([value, text]) => new Option(text, value, false, value === chosen)));
}

/** Show each photo in large where there are few, else as a tile. */
function setUp() {
  document.body.classList.toggle("many", many());
  for (const photo of photos) {
    if (photo.view instanceof Tile === many() && photo.view) continue;
    photo.view?.discard();
    photo.view = many() ? new Tile(photo) : inLarge(photo);
  }
  arrange();
}

/** Return a photo in large, as an item of the list. */
function inLarge(photo) {
  const [card, root] = [new Card(photo), document.createElement("li")];
  root.append(card.root);
  return { root, update: () => card.update(), discard: () => (card.discard(), root.remove()) };
}

let busy = false; // when they were counted last

function count() {
  const number = (...kinds) => photos.filter(({ kind }) => kinds.includes(kind)).length;
  const [done, failed, stopped, under] = [number("done"), number("failed"), number("stopped"), number("waiting", "busy")];
  const text = `${done} of ${photos.length} photos answered${failed ? `, ${failed} failed` : ""}${stopped ? `, ${stopped} stopped` : ""}`;
  $("count").textContent = photos.length < 2 ? "" : text;
  $("progress").hidden = !under || photos.length < 2;
  [$("progress").max, $("progress").value] = [photos.length, photos.length - under];
  toggle("stop", under, "go-on");
  toggle("go-on", stopped && !under, "stop");
  $("tools").hidden = !photos.length;
  $("csv").disabled = $("json").disabled = !(done + failed);
  if (many() && busy && !under) say(text);
  busy = under > 0;
}

/** Show a button or hide it; where it has the focus, the other one gets it, or the download. */
function toggle(id, wanted, other) {
  const focused = document.activeElement === $(id);
  $(id).hidden = !wanted;
  if (focused && !wanted) setTimeout(() => ($(other).hidden ? $("csv") : $(other)).focus());
}

// The large view of one among many

function enlarge(photo) {
  open?.discard();
  open = new Card(photo);
  $("large").append(open.root);
  if (!$("large").open) $("large").showModal();
  $("large").scrollTop = 0;
  const list = shown();
  [$("previous").disabled, $("next").disabled] = [photo === list[0], photo === list.at(-1)];
}

function step(by) {
  const list = shown();
  const next = list[list.indexOf(open.photo) + by];
  if (!next) return;
  enlarge(next);
  say(`${next.path}: ${next.words || next.text}`);
  if (document.activeElement === document.body) $("shut").focus();
}

function shut() {
  const { photo } = open;
  open.discard();
  open = null;
  photo.view?.root.querySelector("button")?.focus();
}

// Photos in

function changed(photo) {
  photo.view?.update();
  if (open?.photo === photo) open.update();
  if (photo.kind === "done" && !many()) say(`${photo.path}: ${photo.words}`);
  if (photo.kind !== "busy") refresh();
}

/** Take files in, each with its path. */
function take({ files, leftOut }) {
  const fresh = files.map(([file, path]) => new Photo(file, path, changed));
  note(leftOut ? `Left out of folders: ${leftOut} not called like images.` : "");
  if (!fresh.length) return;
  const focused = document.activeElement;
  photos = [...fresh, ...photos];
  history.replaceState({ photos: photos.length }, "");
  document.body.classList.add("busy");
  $("clear").hidden = false;
  setUp();
  if (focused !== document.body && !focused.checkVisibility())
    photos[0].view.root.querySelector(many() ? "button" : "h2").focus({ preventScroll: true });
  enqueue(fresh);
  refresh();
}

/** Say something that is no photo's, or nothing any more. */
function note(text) {
  $("note").textContent = text;
  $("note").hidden = !text;
  if (text) say(text);
}

function clear() {
  stop();
  for (const { view } of photos) view.discard();
  photos = [];
  $("filter").value = "";
  history.replaceState(null, "");
  document.body.classList.remove("busy", "many");
  $("clear").hidden = true;
  note("");
  $("choose").focus();
  count();
}

async function sample() {
  try {
    const response = await fetch("static/dog.jpg");
    if (!response.ok) throw new Error();
    take({ files: [[new File([await response.blob()], "dog.jpg", { type: "image/jpeg" }), "dog.jpg"]], leftOut: 0 });
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
  addEventListener("drop", async (event) => {
    if (!carriesFiles(event)) return;
    event.preventDefault();
    over(0);
    take(await dropped(event.dataTransfer));
  });
  addEventListener("paste", (event) => take(chosen(event.clipboardData?.files ?? [])));
}

const finished = () => photos.filter(({ kind }) => kind === "done" || kind === "failed");
const clicks = {
  choose: () => $("files").click(),
  "choose-folder": () => $("folder").click(),
  camera: () => (hasWebcam() ? openWebcam(take) : $("shot").click()),
  sample,
  clear,
  stop,
  "go-on": () => enqueue(photos.filter(({ kind }) => kind === "stopped")),
  csv: () => download("labels.csv", "text/csv", asCsv(finished())),
  json: () => download("labels.json", "application/json", asJson(finished())),
  previous: () => step(-1),
  next: () => step(1),
  shut: () => $("large").close(),
  "webcam-leave": () => $("webcam").close(),
  leave: () => $("door").close(""),
};

$("model")?.addEventListener("change", ({ target }) => (location.search = new URLSearchParams({ model: target.value })));
if (document.body.dataset.width && $("ask").querySelector("#choose")) {
  for (const [id, act] of Object.entries(clicks)) $(id).addEventListener("click", () => act());
  for (const id of ["files", "folder", "shot"])
    $(id).addEventListener("change", () => {
      take(chosen($(id).files));
      $(id).value = ""; // so that the same file can be chosen again
    });
  for (const id of ["sort", "filter"]) $(id).addEventListener("change", arrange);
  $("large").addEventListener("close", shut);
  $("large").addEventListener("keydown", ({ key, target }) => {
    if (target.matches("input, pre")) return;
    if (key === "ArrowLeft" || key === "ArrowRight") step(key === "ArrowLeft" ? -1 : 1);
  });
  $("door").addEventListener("submit", (event) => {
    event.preventDefault();
    $("door").close("given");
  });
  $("camera").classList.toggle("works", hasWebcam());
  watchDrops();
  const before = history.state?.photos; // of this page, before it was reloaded
  if (before) note(`This page keeps nothing: what was here before the reload is gone (photos: ${before}).`);
  history.replaceState(null, "");
}
