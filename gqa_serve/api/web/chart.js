// Small line charts in SVG: some series over the last minutes, a grid, the latest values in the legend, and a
// sentence that says the same to who cannot see the lines.

import { el, setText, svg } from "./dom.js";

const HEIGHT = 128, LEFT = 50, RIGHT = 2, BOTTOM = 18, TOP = 8;  // pixels; the width is what there is
const SHORTEST_S = 60;  // what a chart shows at first; its span grows with what it knows
let charts = 0;

export class Chart {
  /**
   * @param {{title: string, note: string, span_s: number, series: string[], format: (value: ?number) => string}} options
   */
  constructor(options) {
    charts += 1;
    this.options = options;
    const id = "chart-" + charts;
    this.lines = options.series.map((_, index) => svg("path", { class: "line s" + index }));
    this.grid = svg("g", { class: "grid" });
    this.past = svg("text", { x: LEFT, y: HEIGHT - 4 });
    this.now = svg("text", { y: HEIGHT - 4, "text-anchor": "end" }, "now");
    this.values = options.series.map(() => el("strong"));
    const keys = options.series.map((name, index) => el("li", {}, el("span", { class: "key s" + index, "aria-hidden": "true" }), name + " ", this.values[index]));
    this.summary = el("p", { class: "hidden", id: id + "-text" });
    this.picture = svg("svg", { role: "img", "aria-labelledby": id, "aria-describedby": id + "-text" },
      this.grid, this.past, this.now, ...this.lines);
    this.node = el("figure", { class: "chart panel" },
      el("figcaption", {}, el("h2", { id }, options.title), el("span", { class: "hint" }, options.note)),
      this.picture, el("ul", { class: "legend" }, ...keys), this.summary);
  }

  /** @param {{at_s: number, values: (?number)[]}[]} points in order @param {number} now_s */
  draw(points, now_s) {
    const { series, format, title } = this.options;
    const known_s = points.length ? now_s - points[0].at_s : 0;
    const span_s = Math.min(this.options.span_s, Math.max(SHORTEST_S, Math.ceil(known_s / 60) * 60));
    const width = Math.max(200, this.picture.clientWidth);
    const highest = Math.max(0, ...points.flatMap((point) => point.values.filter((value) => value !== null)));
    const top = roundUp(highest);
    const x = (at_s) => LEFT + (width - LEFT - RIGHT) * (1 - (now_s - at_s) / span_s);
    const y = (value) => TOP + (HEIGHT - TOP - BOTTOM) * (1 - value / top);
    setText(this.past, `${span_s / 60} min ago`);
    this.now.setAttribute("x", width - RIGHT);
    this.drawGrid(top, y, width);
    series.forEach((name, index) => {
      this.lines[index].setAttribute("d", path(points, index, x, y));
      const known = points.length ? points[points.length - 1].values[index] : null;
      setText(this.values[index], format(known));
    });
    const said = series.map((name, index) => `${name}: now ${this.values[index].textContent}`);
    setText(this.summary, `${title}, ${said.join("; ")}; highest ${format(highest)}.`);
  }

  drawGrid(top, y, width) {
    if (this.top === top && this.width === width) return;
    [this.top, this.width] = [top, width];
    this.grid.replaceChildren(...[0, top / 2, top].flatMap((value) => [
      svg("line", { x1: LEFT, x2: width, y1: y(value), y2: y(value) }),
      svg("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, value ? this.options.format(value) : "0"),
    ]));
  }
}

/** A line through the known values; a gap where there is none, a dot where one stands alone. */
function path(points, index, x, y) {
  let data = "", open = false;
  for (const point of points) {
    const value = point.values[index];
    if (value === null) { open = false; continue; }
    const place = `${x(point.at_s).toFixed(1)} ${y(value).toFixed(1)}`;
    data += open ? "L" + place : `M${place}h.01`;
    open = true;
  }
  return data;
}

/** The next of 1, 2, 5, 10, 20 ... times a power of ten. */
function roundUp(value) {
  if (value <= 0) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 4, 5, 10].map((factor) => factor * power).find((top) => top >= value * 0.999);
}
