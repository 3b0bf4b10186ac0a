// Two charts, as SVG. Each says in words what it shows: colours alone tell nobody enough.

import { h } from "./dom.js";

const HEIGHT = 40;
const WIDTH = 240;

/** Columns of parts on top of each other; `series` is a list of [class, numbers]. */
export function columns(label, series) {
  const count = series[0][1].length;
  const sums = series[0][1].map((_, n) => series.reduce((sum, [, numbers]) => sum + numbers[n], 0));
  const scale = HEIGHT / Math.max(1, ...sums);
  const width = WIDTH / count;
  const tops = new Array(count).fill(HEIGHT);
  const parts = series.flatMap(([kind, numbers]) =>
    numbers.map((number, n) => {
      tops[n] -= number * scale;
      const size = { x: n * width, y: tops[n], width: width - 1, height: number * scale };
      return h("rect", { class: kind, ...size });
    }),
  );
  return chart(label, parts);
}

/** A line through numbers, the newest at the right; `most` is how many there is room for. */
export function line(label, numbers, most) {
  const scale = (HEIGHT - 2) / Math.max(1, ...numbers);
  const begin = WIDTH - ((numbers.length - 1) * WIDTH) / (most - 1);
  const points = numbers.map(
    (number, n) => `${begin + (n * WIDTH) / (most - 1)} ${HEIGHT - 1 - number * scale}`,
  );
  const path = numbers.length > 1 ? `M${points.join("L")}` : "";
  return chart(label, [h("path", { class: "line", d: path })]);
}

function chart(label, shapes) {
  const view = { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none" };
  return h("svg", { class: "chart", role: "img", "aria-label": label, ...view }, ...shapes);
}
