// Heat maps.

const RAMP = document.body.dataset.ramp.split(" "); // the server's colours of heat, from nothing to most

/** Return colour `t`, 0 to 1, of the ramp as three numbers. */
export function colour(t) {
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

/** Draw a map on the part of the picture that it is of. */
export function paint(canvas, { map, width, height, seen }) {
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
export function place(map) {
  const most = Math.max(...map.flat());
  if (most === 0) return "";
  const y = map.findIndex((row) => row.includes(most));
  const third = (i, n) => Math.min(2, Math.floor((3 * (i + 0.5)) / n));
  const [vertical, horizontal] = [third(y, map.length), third(map[y].indexOf(most), map[0].length)];
  const words = [["top", "middle", "bottom"][vertical], ["left", "", "right"][horizontal]].filter(Boolean).join(" ");
  return words === "middle" ? "in the middle" : `at the ${words}`;
}
