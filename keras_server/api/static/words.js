// What is said and shown in words.

export const $ = (id) => document.getElementById(id);

const { nameless } = document.body.dataset;
/** Return a label as people write it; of a model without a class list it is a number. */
export const spoken = (label) => (nameless === undefined ? label.replaceAll("_", " ") : `Class ${label}`);
export const percent = (p) => (p > 0 && p < 0.001 ? "< 0.1%" : `${(100 * p).toFixed(1)}%`);
export const figure = (value) => Number(value.toPrecision(4)).toLocaleString();
export const size = (bytes) => (bytes < 1e6 ? `${Math.max(1, Math.round(bytes / 1e3))} kB` : `${(bytes / 1e6).toFixed(1)} MB`);
export const milliseconds = (ms) => (ms < 9.95 ? `${ms.toFixed(1)} ms` : `${Math.round(ms)} ms`);

/** Tell a screen reader. */
export function say(text) {
  const line = document.createElement("p");
  line.textContent = text;
  $("log").append(line);
  while ($("log").children.length > 8) $("log").firstChild.remove();
}
