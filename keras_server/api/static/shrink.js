// A worker that makes pictures smaller, so that the page stays smooth meanwhile.

const WORTH = 2 ** 20; // bytes from which a photo is shrunk
const THUMBNAIL = 240; // pixels of its height

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
 * Eight times the model's input on the longer side and four on the shorter is as much as the server decodes of a large
 * JPEG itself. Profiles are not applied: the server applies none. Other formats are shrunk only where the server would
 * refuse them: even areas do not bear JPEG. Transparency and printers' colours never are.
 */
async function shrink({ file, input, limit }) {
  const isJpeg = file.type === "image/jpeg";
  if (file.size <= (isJpeg ? Math.min(WORTH, limit) : limit)) return null;
  if (isJpeg ? (await channels(file)) > 3 : !["image/png", "image/webp"].includes(file.type)) return null;
  const bitmap = await createImageBitmap(file, { imageOrientation: "from-image", colorSpaceConversion: "none" });
  const [long, short] = [Math.max(bitmap.width, bitmap.height), Math.min(bitmap.width, bitmap.height)];
  const scale = Math.min(1, Math.max((8 * input) / long, (4 * input) / short));
  if (scale === 1 && file.size <= limit) return null;
  const [width, height] = [Math.round(scale * bitmap.width), Math.round(scale * bitmap.height)];
  const canvas = new OffscreenCanvas(width, height);
  const brush = canvas.getContext("2d", { willReadFrequently: !isJpeg });
  brush.imageSmoothingQuality = "high";
  brush.drawImage(bitmap, 0, 0, width, height);
  bitmap.close();
  if (!isJpeg && brush.getImageData(0, 0, width, height).data.some((value, i) => i % 4 === 3 && value < 255)) return null;
  const blob = await canvas.convertToBlob({ type: "image/jpeg", quality: 0.92 });
  return blob.size < file.size ? { blob, width, height } : null;
}

/** Return a small copy of a picture. */
async function thumbnail({ file }) {
  const options = { imageOrientation: "from-image", resizeHeight: THUMBNAIL, resizeQuality: "medium" };
  const bitmap = await createImageBitmap(file, options);
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  canvas.getContext("2d").drawImage(bitmap, 0, 0);
  bitmap.close();
  return { blob: await canvas.convertToBlob({ type: "image/webp", quality: 0.8 }) };
}

let done = Promise.resolve(); // one after the other: the page takes the answers in order

addEventListener("message", ({ data }) => {
  done = done
    .then(() => (data.forTile ? thumbnail : shrink)(data))
    .catch(() => null) // where the browser cannot read a picture
    .then(postMessage);
});
