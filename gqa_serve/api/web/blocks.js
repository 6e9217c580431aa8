// The map of KV blocks: one cell for each, in the order of the cache, as large as fits. Where there are more
// blocks than cells, a cell stands for several and shows the busiest.

import { byId, count, el, setText } from "./dom.js";

/** States as /ui/state numbers them. */
const STATES = [
  { name: "free", about: "nothing in it" },
  { name: "cached", about: "nobody uses it, its content may be found again" },
  { name: "active", about: "one request uses it" },
  { name: "shared", about: "several requests use it: one prefix, kept once" },
];
const MAX_HEIGHT = 240, LARGEST = 16, SMALLEST = 2;

let values = null;
let shown = null;

export function setUpBlocks() {
  values = STATES.map(() => el("strong"));
  byId("legend").append(...STATES.map(({ name, about }, state) =>
    el("li", { title: about }, el("span", { class: "key block-" + name, "aria-hidden": "true" }), name + " ", values[state])));
  document.addEventListener("themechange", () => shown && paint(shown));
  new ResizeObserver(() => shown && paint(shown)).observe(byId("blocks").parentElement);
}

/** @param {{num_free: number, num_cached: number, num_active: number, num_shared: number, states: string}} blocks */
export function drawBlocks(blocks, block_size) {
  const counts = [blocks.num_free, blocks.num_cached, blocks.num_active, blocks.num_shared];
  counts.forEach((number, state) => setText(values[state], count(number)));
  const total = counts.reduce((sum, number) => sum + number, 0);
  shown = { states: unpack(blocks.states, total), total, block_size };
  paint(shown);
}

/** Two bits each, the first block in the lowest bits. */
function unpack(text, total) {
  const packed = atob(text);
  const states = new Uint8Array(total);
  for (let index = 0; index < total; index += 1) states[index] = packed.charCodeAt(index >> 2) >> (index % 4 * 2) & 3;
  return states;
}

/** The size of a cell in CSS pixels, and how many blocks each stands for. */
export function layout(total, width) {
  for (let size = LARGEST; size >= SMALLEST; size -= 1) {
    const columns = Math.floor(width / size);
    if (columns && Math.ceil(total / columns) * size <= MAX_HEIGHT) return { size, columns, each: 1 };
  }
  const columns = Math.max(1, Math.floor(width / SMALLEST));
  return { size: SMALLEST, columns, each: Math.ceil(total / (columns * Math.floor(MAX_HEIGHT / SMALLEST))) };
}

function paint({ states, total, block_size }) {
  const canvas = byId("blocks");
  const width = Math.floor(canvas.parentElement.clientWidth
    - parseFloat(getComputedStyle(canvas.parentElement).paddingLeft) * 2);
  if (width <= 0) return;  // not on the screen
  const { size, columns, each } = layout(total, width);
  const cells = Math.ceil(total / each);
  const height = Math.ceil(cells / columns) * size;
  const ratio = window.devicePixelRatio || 1;
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  canvas.style.height = height + "px";
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  const gap = size >= 5 ? 1 : 0;
  const colours = STATES.map(({ name }) => getComputedStyle(document.querySelector(".key.block-" + name)).backgroundColor);
  for (let cell = 0; cell < cells; cell += 1) {
    let state = 0;
    for (let index = cell * each; index < Math.min(total, (cell + 1) * each); index += 1) state = Math.max(state, states[index]);
    context.fillStyle = colours[state];
    const column = cell % columns;  // columns spread over the whole width, at whole pixels
    const x = Math.round(column * width / columns), end = Math.round((column + 1) * width / columns);
    context.fillRect(x, Math.floor(cell / columns) * size, end - x - gap, size - gap);
  }
  setText(byId("blocks-text"), `${count(total)} blocks of ${count(block_size)} tokens`
    + (each > 1 ? `; each cell is ${count(each)} blocks and shows the busiest.` : "; each cell is one block."));
}
