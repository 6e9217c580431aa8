// Elements made from names, attributes and text. Nothing here, or anywhere on the page, turns text into markup:
// children that are strings stay text, whatever they hold.

/**
 * @param {string} name
 * @param {Object<string, string | number | boolean | EventListener | null | undefined>} [attributes]
 *   functions are listeners, true is an attribute without a value, false and null are none
 * @param {...(Node | string | null)} children
 * @returns {HTMLElement}
 */
export function el(name, attributes, ...children) {
  return fill(document.createElement(name), attributes, children);
}

/** The same in SVG. */
export function svg(name, attributes, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}

function fill(node, attributes, children) {
  // Children first: below dir="auto", every one that is added would be searched for its direction again.
  node.append(...children.filter((child) => child !== null && child !== undefined));
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") node.addEventListener(key, value);
    else node.setAttribute(key, value === true ? "" : String(value));
  }
  return node;
}

/** The element with this id, which is in index.html. */
export const byId = (id) => document.getElementById(id);

/** Sets the text only if it differs, so that screen readers and selections are left alone. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

const plain = new Intl.NumberFormat("en");
const units = ["B", "KiB", "MiB", "GiB", "TiB"];

/** 12345 as "12,345". */
export const count = (value) => plain.format(value);

/** A number in three digits or so, as one reads it. */
export function brief(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (Number.isInteger(value)) return plain.format(value);
  if (Math.abs(value) < 0.1) return value.toPrecision(2);
  return value >= 100 ? plain.format(Math.round(value)) : value.toFixed(value >= 10 ? 0 : 1);
}

/** Bytes in binary units. */
export function bytes(value) {
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) { value /= 1024; unit += 1; }
  return (unit === 0 || value >= 100 ? Math.round(value) : value.toFixed(1)) + " " + units[unit];
}

/** Seconds, as "0.21 s", "48 ms", "3 min 05 s". */
export function duration(seconds) {
  if (seconds === null || seconds === undefined || Number.isNaN(seconds)) return "–";
  if (seconds < 0.1) return (seconds * 1000).toFixed(seconds < 0.01 ? 1 : 0) + " ms";
  if (seconds < 10) return seconds.toFixed(2) + " s";
  if (seconds < 60) return seconds.toFixed(0) + " s";
  const whole = Math.round(seconds);
  if (whole >= 3600) return Math.floor(whole / 3600) + " h " + Math.floor(whole / 60 % 60) + " min";
  return Math.floor(whole / 60) + " min " + String(whole % 60).padStart(2, "0") + " s";
}
