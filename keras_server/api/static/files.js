// Files in, and results out.

// Looked for in folders, as simple_request.py does.
const IMAGE_NAME = /^[^.].*\.(avif|bmp|gif|hei[cf]|jfif|jpe|jpe?g|mpo|png|tiff?|webp)$/is;

/** Put paths in the order in which simple_request.py walks a folder: its files, then the folders below. */
function inOrder([, a], [, b]) {
  const [x, y] = [a.split("/"), b.split("/")];
  const i = x.findIndex((part, n) => part !== y[n] || n === x.length - 1 || n === y.length - 1);
  const [fileX, fileY] = [i === x.length - 1, i === y.length - 1];
  if (fileX !== fileY) return fileX ? -1 : 1;
  return x[i] < y[i] ? -1 : 1;
}

/** Walk a folder. What is not called like an image is counted. */
async function walk(folder, found) {
  const reader = folder.createReader();
  for (;;) {
    const entries = await new Promise((resolve) => reader.readEntries(resolve, () => resolve([])));
    if (!entries.length) return; // it hands out a hundred at a time
    for (const entry of entries)
      if (entry.isDirectory ? entry.name.startsWith(".") : !IMAGE_NAME.test(entry.name)) found.leftOut += 1;
      else await (entry.isDirectory ? walk(entry, found) : keep(entry, found));
  }
}

async function keep(entry, found) {
  const file = await new Promise((resolve) => entry.file(resolve, () => resolve(null)));
  if (file) found.files.push([file, entry.fullPath.slice(1)]);
  else found.leftOut += 1;
}

/** Return what was dropped, with all that is in folders: pairs of a file and its path, and how many were left out. */
export async function dropped({ items, files }) {
  const found = { files: [], leftOut: 0 };
  const entries = [...items].map((item) => (item.kind === "file" ? (item.webkitGetAsEntry?.() ?? null) : null));
  if (!entries.some((entry) => entry?.isDirectory)) found.files = [...files].map((file) => [file, file.name]);
  else {
    for (const entry of entries.filter(Boolean)) await (entry.isDirectory ? walk(entry, found) : keep(entry, found));
    found.files.sort(inOrder);
  }
  return found;
}

/** Return what was chosen: a folder's files have a path. */
export function chosen(files) {
  const pairs = [...files].map((file) => [file, file.webkitRelativePath || file.name]);
  const wanted = pairs.filter(([, path]) => !path.includes("/") || (IMAGE_NAME.test(path.split("/").pop()) && !/\/\./.test(path)));
  if (wanted[0]?.[1].includes("/")) wanted.sort(inOrder);
  return { files: wanted, leftOut: pairs.length - wanted.length };
}

const quoted = (text) => (/[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);

/** Return finished photos as `keras-server predict` writes its CSV. */
export function asCsv(photos) {
  const rows = photos.map((photo) => [
    photo.path,
    photo.best?.label ?? "",
    photo.best?.probability.toFixed(6) ?? "",
    photo.values.map((value) => String(Number(value.toPrecision(9)))).join(" "),
    photo.answer?.model ?? "",
    photo.kind === "failed" ? photo.text : "",
  ]);
  const head = ["filename", "label", "probability", "values", "model", "error"];
  return [head, ...rows].map((row) => `${row.map(quoted).join(",")}\r\n`).join("");
}

/** Return finished photos as JSON: a list of what simple_request.py --json prints. */
export function asJson(photos) {
  const lines = photos.map(({ path, kind, text, answer }) =>
    kind === "done" ? { filename: path, ...answer } : { filename: path, success: false, model: null, error: text },
  );
  return `${JSON.stringify(lines, null, 1)}\n`;
}

/** Let the person save a text as a file. */
export function download(name, type, text) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
