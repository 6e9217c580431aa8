// The little Markdown that models write, as elements: paragraphs, headings, lists, quotes, tables, code, emphasis
// and links. Text never becomes markup: whatever is not understood stays as it was written. Nothing is loaded:
// an image becomes a link, and only http, https and mailto are links at all. Every search is bounded, so that
// no answer, however hostile, costs more than its length.

import { el } from "./dom.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]{0,30})/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*$/;
const RULE = /^ {0,3}(?:-\s*){3,}$|^ {0,3}(?:\*\s*){3,}$|^ {0,3}(?:_\s*){3,}$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const QUOTE = /^ {0,3}> ?(.*)$/;
const TABLE_LINE = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;
const MAX_DEPTH = 6;
const MAX_LINE = 2000;  // longer lines are text, which spares the expressions above
const REACH = 2000;  // characters within which emphasis, code and links must end

/**
 * Shows `text` in `parent`; called again with more text, it makes only those blocks anew that have changed.
 * @param {HTMLElement} parent @param {string} text
 */
export function renderInto(parent, text) {
  const parts = split(text.split("\n"));
  parts.forEach((part, index) => {
    const old = parent.children[index];
    const source = part.kind + "\n" + part.lines.join("\n");
    if (old && sources.get(old) === source) return;
    const node = build(part, 0);
    sources.set(node, source);
    if (old) old.replaceWith(node);
    else parent.append(node);
  });
  while (parent.children.length > parts.length) parent.lastElementChild.remove();
}

/** What each shown block was made from. @type {WeakMap<Element, string>} */
const sources = new WeakMap();

const matches = (expression, line) => (line.length <= MAX_LINE ? expression.exec(line) : null);

/** @typedef {{kind: string, lines: string[], info?: string}} Part  A block and the lines inside it. */

/** @param {string[]} lines @returns {Part[]} */
function split(lines) {
  const parts = [];
  for (let at = 0; at < lines.length;) {
    if (!lines[at].trim()) { at += 1; continue; }
    const end = endOf(lines, at, parts);
    at = end;
  }
  return parts;
}

/** Adds the block that begins at line `at`; returns the line after it. */
function endOf(lines, at, parts) {
  const line = lines[at];
  const fence = matches(FENCE, line);
  if (fence) return addFence(lines, at, parts, fence);
  if (matches(HEADING, line)) { parts.push({ kind: "heading", lines: [line] }); return at + 1; }
  if (matches(RULE, line)) { parts.push({ kind: "rule", lines: [line] }); return at + 1; }
  let end = at + 1;
  if (matches(QUOTE, line)) {
    while (end < lines.length && matches(QUOTE, lines[end])) end += 1;
    parts.push({ kind: "quote", lines: lines.slice(at, end) });
    return end;
  }
  const item = matches(ITEM, line);
  if (item) {
    while (end < lines.length && belongsToList(lines, end, item)) end += 1;
    parts.push({ kind: "list", lines: lines.slice(at, end) });
    return end;
  }
  if (line.includes("|") && end < lines.length && lines[end].includes("-") && matches(TABLE_LINE, lines[end])) {
    while (end < lines.length && lines[end].includes("|")) end += 1;
    parts.push({ kind: "table", lines: lines.slice(at, end) });
    return end;
  }
  while (end < lines.length && lines[end].trim() && !begins(lines[end])) end += 1;
  parts.push({ kind: "paragraph", lines: lines.slice(at, end) });
  return end;
}

function addFence(lines, at, parts, [, mark, language]) {
  let end = at + 1;
  while (end < lines.length && !isClosing(lines[end], mark)) end += 1;
  parts.push({ kind: "code", lines: lines.slice(at + 1, end), info: language });
  return end + 1;
}

function isClosing(line, mark) {
  const text = line.trim();
  return text.length >= mark.length && text.length <= MAX_LINE && text === mark[0].repeat(text.length);
}

const begins = (line) => [FENCE, HEADING, RULE, QUOTE, ITEM].some((expression) => matches(expression, line));

/** A list goes on with its next item, with lines indented below an item, and over single empty lines. */
function belongsToList(lines, at, first) {
  const line = lines[at];
  if (!line.trim()) return at + 1 < lines.length && lines[at + 1].trim() !== "" && belongsToList(lines, at + 1, first);
  if (/^\s/.test(line) && indent(line) > first[1].length) return true;
  const item = matches(ITEM, line);
  if (item) return isOrdered(item) === isOrdered(first) || item[1].length > first[1].length;
  return Boolean(lines[at - 1].trim()) && !begins(line);  // a long item, wrapped
}

const isOrdered = (item) => item[2].length > 1;
const indent = (line) => line.length - line.trimStart().length;

/** @param {Part} part @param {number} depth */
function build(part, depth) {
  switch (part.kind) {
    case "code": return codeBlock(part);
    case "heading": {
      const [, marks, text] = matches(HEADING, part.lines[0]);
      // The page's own headings are h1 and h2; those of an answer go below.
      return el("h" + Math.min(6, marks.length + 2), { dir: "auto" }, ...inline(text, 0));
    }
    case "rule": return el("hr");
    case "quote": return el("blockquote", { dir: "auto" }, ...nested(part.lines.map((line) => matches(QUOTE, line)[1]), depth));
    case "list": return list(part.lines, depth);
    case "table": return table(part.lines);
    default: return el("p", { dir: "auto" }, ...inline(part.lines.join("\n"), 0));
  }
}

function nested(lines, depth) {
  if (depth >= MAX_DEPTH) return [el("p", {}, lines.join("\n"))];
  return split(lines).map((part) => build(part, depth + 1));
}

function codeBlock(part) {
  const text = part.lines.join("\n");
  const copy = el("button", { type: "button", class: "plain", click: () => copyText(copy, text) }, "Copy");
  const head = el("div", { class: "code-head" }, el("span", {}, part.info || "code"), copy);
  return el("div", { class: "code" }, head, el("pre", { tabindex: "0", dir: "ltr" }, el("code", {}, text)));
}

/** Copies, and says so on the button for a moment. */
export async function copyText(button, text) {
  const name = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Not allowed here";  // browsers let pages copy over https and from localhost only
  }
  setTimeout(() => { button.textContent = name; }, 1500);
}

function list(lines, depth) {
  const first = matches(ITEM, lines[0]);
  const items = [];
  for (const line of lines) {
    const item = matches(ITEM, line);
    if (item && item[1].length <= first[1].length) items.push([item[3]]);
    else items[items.length - 1].push(line);
  }
  const start = isOrdered(first) ? parseInt(first[2], 10) : 1;
  return el(isOrdered(first) ? "ol" : "ul", { start: start === 1 ? null : start, dir: "auto" },
    ...items.map((item) => el("li", {}, ...itemContent(item, depth))));
}

/** An item that is one run of text is shown without a paragraph around it. */
function itemContent(lines, depth) {
  const rest = lines.slice(1).filter((line) => line.trim());
  const cut = rest.length ? Math.min(...rest.map(indent)) : 0;
  const dedented = [lines[0], ...lines.slice(1).map((line) => line.slice(Math.min(cut, indent(line))))];
  const inside = nested(dedented, depth);
  if (inside.length && inside[0].tagName === "P") inside.splice(0, 1, ...inside[0].childNodes);
  return inside;
}

function cells(line) {
  return line.trim().replace(/^\|/, "").replace(/\|$/, "").split("|").map((cell) => cell.trim());
}

function table(lines) {
  const head = cells(lines[0]).map((cell) => el("th", { scope: "col" }, ...inline(cell, 0)));
  const rows = lines.slice(2).map((line) => el("tr", {}, ...cells(line).map((cell) => el("td", {}, ...inline(cell, 0)))));
  return el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Table" },
    el("table", { "aria-label": "Table" }, el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...rows)));
}

const MARKS = [["**", "strong"], ["__", "strong"], ["~~", "del"], ["*", "em"], ["_", "em"]];
const ADDRESS = /https?:\/\/[^\s<>"'`()[\]]{1,500}/y;

/** @param {string} text @param {number} depth @returns {(Node | string)[]} */
function inline(text, depth) {
  return new Inline(text, depth).nodes();
}

/** One run of text. Remembers where marks close, so that marks which never do are not searched again each time. */
class Inline {
  constructor(text, depth) {
    this.text = text;
    this.depth = depth;
    /** Of each mark: from where the next closing one was searched, and where it is. @type {Map<string, [number, number]>} */
    this.closers = new Map();
  }

  nodes() {
    const { text } = this;
    const out = [];
    let plain = "";
    const flush = () => { if (plain) out.push(plain); plain = ""; };
    for (let at = 0; at < text.length;) {
      const found = this.special(at);
      if (!found) { plain += text[at]; at += 1; continue; }
      if (typeof found.node === "string") plain += found.node;
      else { flush(); out.push(found.node); }
      at = found.end;
    }
    flush();
    return out;
  }

  /** What begins at `at`, if it is more than a character. */
  special(at) {
    const { text } = this;
    const char = text[at];
    if (char === "\n") return { node: el("br"), end: at + 1 };
    if (char === "\\" && /[\\`*_~[\]()#+.!|<>{}-]/.test(text[at + 1] || "")) return { node: text[at + 1], end: at + 2 };
    if (char === "`") return codeSpan(text, at);
    if (char === "h") return address(text, at);
    if (char === "[") return this.link(at);
    if (char === "!" && text[at + 1] === "[") return this.link(at + 1);
    return "*_~".includes(char) ? this.emphasis(at) : null;
  }

  /** `[text](address)`, after a `!` as well: an image would load something, a link does not. */
  link(at) {
    const reach = this.text.slice(at, at + REACH);
    const middle = reach.indexOf("](");
    const end = middle < 0 ? -1 : reach.indexOf(")", middle);
    if (end < 0 || this.depth >= MAX_DEPTH) return null;
    const [url] = reach.slice(middle + 2, end).trim().split(/\s/, 1);
    const node = anchor(url, [reach.slice(1, middle) || url]);
    return node && { node, end: at + end + 1 };
  }

  emphasis(at) {
    const { text } = this;
    for (const [mark, name] of MARKS) {
      if (!text.startsWith(mark, at)) continue;
      if (this.depth >= MAX_DEPTH || (mark[0] === "_" && /\w/.test(text[at - 1] || ""))) break;
      const begin = at + mark.length;
      const end = /\s/.test(text[begin] || " ") ? -1 : this.closing(mark, begin + 1);
      if (end < 0 || end - begin > REACH) continue;
      return { node: el(name, {}, ...inline(text.slice(begin, end), this.depth + 1)), end: end + mark.length };
    }
    let run = 1;  // marks that close nothing are text, all of them at once
    while (text[at + run] === text[at]) run += 1;
    return { node: text.slice(at, at + run), end: at + run };
  }

  /** The first place from `from` on where `mark` may close something, or -1. */
  closing(mark, from) {
    const known = this.closers.get(mark);
    if (known && known[0] <= from && (known[1] < 0 || from <= known[1])) return known[1];
    let end = this.text.indexOf(mark, from);
    while (end >= 0 && !this.closes(mark, end)) end = this.text.indexOf(mark, end + 1);
    this.closers.set(mark, [from, end]);
    return end;
  }

  closes(mark, end) {
    const before = this.text[end - 1], after = this.text[end + mark.length] || "";
    if (/\s/.test(before)) return false;
    if (mark.length === 1 && (after === mark || before === mark)) return false;  // half of a double one
    return mark[0] !== "_" || !/\w/.test(after);
  }
}

function codeSpan(text, at) {
  let ticks = 1;
  while (text[at + ticks] === "`") ticks += 1;
  const reach = text.slice(at + ticks, at + ticks + REACH);
  const end = ticks <= 3 ? reach.indexOf("`".repeat(ticks)) : -1;
  if (end <= 0) return { node: "`".repeat(ticks), end: at + ticks };
  return { node: el("code", {}, reach.slice(0, end)), end: at + 2 * ticks + end };
}

function address(text, at) {
  ADDRESS.lastIndex = at;
  const match = at === 0 || /\W/.test(text[at - 1]) ? ADDRESS.exec(text) : null;
  if (!match) return null;
  const url = match[0].replace(/[.,;:!?*_]+$/, "");
  const node = anchor(url, [url]);
  return node && { node, end: at + url.length };
}

/** A link out, or null where the address is none a page should follow. */
function anchor(url, children) {
  let parsed;
  try { parsed = new URL(url); } catch { return null; }
  if (!["http:", "https:", "mailto:"].includes(parsed.protocol)) return null;
  return el("a", { href: parsed.href, target: "_blank", rel: "noopener noreferrer nofollow", title: parsed.href }, ...children);
}
