// A photo in large, with its labels and heat maps.

import { asCurl, asPython, copy } from "./copy.js";
import { colour, paint, place } from "./heat.js";
import { enqueue } from "./photo.js";
import { Trouble, address } from "./server.js";
import { $, figure, milliseconds, percent, say, spoken } from "./words.js";

let explaining = Promise.resolve(); // one map after the other: the server draws no more at once either

export class Card {
  constructor(photo) {
    this.photo = photo;
    this.root = $("card").content.cloneNode(true).firstElementChild;
    this.label = null; // whose heat map is wanted
    this.part("h2").textContent = photo.path;
    const picture = this.part(".photo");
    picture.alt = photo.path;
    picture.addEventListener("error", () => this.root.classList.add("blind"));
    this.part(".again").addEventListener("click", () => enqueue([photo]));
    this.part("input").addEventListener("input", () => this.strengthen());
    const legend = this.part(".legend").getContext("2d");
    for (let x = 0; x < 64; x++) {
      legend.fillStyle = `rgb(${colour(x / 63)})`;
      legend.fillRect(x, 0, 1, 1);
    }
    this.update();
  }

  part(selector) {
    return this.root.querySelector(selector);
  }

  show(text, selector) {
    const part = this.part(selector);
    part.textContent = text;
    part.hidden = !text;
  }

  /** Bring it to what the photo has become. */
  update() {
    const { photo } = this;
    if (this.picture !== photo.picture) {
      URL.revokeObjectURL(this.url);
      this.picture = photo.picture;
      this.part(".photo").src = this.url = URL.createObjectURL(photo.picture);
    }
    this.show(photo.text, ".state");
    this.root.dataset.kind = photo.kind;
    this.part(".again").hidden = !photo.again;
    this.show(photo.resized, ".sent");
    if (photo.answer && this.answer !== photo.answer) this.answered();
  }

  discard() {
    this.gone = true;
    URL.revokeObjectURL(this.url);
    this.root.remove();
  }

  answered() {
    const { answer, took, inside, values } = this.photo;
    const { model, predictions = [] } = (this.answer = answer);
    this.show(values.map(figure).join("  "), ".values"); // of a regression, which knows no labels
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
    const within = inside === null ? "" : `, ${milliseconds(inside)} of them in the server`;
    this.show(`${model} · ${milliseconds(took)} there and back${within}`, ".times");
    this.part("details").hidden = false;
    this.codes();
  }

  /** Fill the boxes that repeat this request elsewhere. */
  codes() {
    const { name } = this.photo;
    const link = this.part("details a");
    [link.href, link.download, link.textContent] = [this.url, name, name];
    const boxes = [
      ["As curl", asCurl(address("predict"), name)],
      ["As Python", asPython(address("predict"), name)],
    ];
    if (this.label !== null) {
      const query = `explain?label=${encodeURIComponent(this.label)}`;
      boxes.push(["The heat map as curl", asCurl(address(query), name, `${this.label.replace(/[^\w-]/g, "_")}.png`)]);
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
    const wanted = () => this.label === label && !this.gone;
    this.part(".scale").hidden = true;
    this.part(".why").textContent = "Looking where…";
    this.root.dataset.heat = "busy";
    const slow = setTimeout(() => {
      if (wanted()) this.part(".why").textContent = "Looking where… The first time the server loads what it needs.";
    }, 1500);
    try {
      const turn = explaining.then(() => wanted() && this.photo.explain(label));
      explaining = turn.catch(() => {});
      const map = await turn;
      if (wanted()) this.heat(label, map);
    } catch (error) {
      if (!(error instanceof Trouble)) throw error;
      if (wanted()) {
        this.part(".why").textContent = error.message;
        this.root.dataset.heat = "failed";
        say(error.message);
      }
    } finally {
      clearTimeout(slow);
    }
  }

  heat(label, answer) {
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
