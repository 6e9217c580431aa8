// Functions that tests run inside the page.

/** [red, green, blue, alpha] of a computed colour, the channels from 0 to 1. */
function channels(text) {
  const numbers = text.match(/-?[\d.]+(e-?\d+)?/g).map(Number);
  if (text.startsWith("rgb")) return [numbers[0] / 255, numbers[1] / 255, numbers[2] / 255, numbers[3] ?? 1];
  if (text.startsWith("color(srgb")) return [numbers[0], numbers[1], numbers[2], numbers[3] ?? 1];
  throw new Error("a colour this test cannot read: " + text);
}

function over(top, bottom) {
  const alpha = top[3];
  return [0, 1, 2].map((index) => top[index] * alpha + bottom[index] * (1 - alpha)).concat(1);
}

function luminance(colour) {
  const [red, green, blue] = colour.slice(0, 3).map((one) => (one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4));
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
}

function ground(element) {
  const layers = [];
  for (let node = element; node; node = node.parentElement) layers.push(channels(getComputedStyle(node).backgroundColor));
  return layers.reverse().reduce((below, layer) => over(layer, below), [1, 1, 1, 1]);
}

/** Texts on the screen whose contrast with their ground is below WCAG's AA; and how many were looked at. */
function contrast() {
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const low = [];
  let seen = 0;
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.checkVisibility() || element.closest(".hidden, noscript, option")) continue;
    const style = getComputedStyle(element);
    const back = ground(element);
    const front = over(channels(element instanceof SVGElement ? style.fill : style.color), back);
    const [light, dark] = [luminance(front), luminance(back)].sort((one, other) => other - one);
    const ratio = (light + 0.05) / (dark + 0.05);
    const size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    seen += 1;
    if (ratio < (large ? 3 : 4.5)) low.push(`${ratio.toFixed(2)} ${element.tagName}.${element.className}: ${walker.currentNode.data.trim().slice(0, 40)}`);
  }
  return { low, seen };
}

/** Elements that reach beyond the right edge of the screen without lying in something that scrolls. */
function overflowing() {
  const width = document.documentElement.clientWidth;
  const found = [...document.body.querySelectorAll("*")].filter((element) =>
    element.checkVisibility() && element.getBoundingClientRect().right > width + 1
    && !element.closest(".scroll, pre, .hidden, .skip"));
  return { page: document.documentElement.scrollWidth - width, found: found.map((one) => one.tagName + "#" + one.id + "." + one.className) };
}

/** How many pixels of the block map have each legend colour, as numbers of whole cells. */
function cellsByColour() {
  const canvas = document.getElementById("blocks");
  const context = canvas.getContext("2d");
  const { data } = context.getImageData(0, 0, canvas.width, canvas.height);
  const counts = {};
  for (const name of ["free", "cached", "active", "shared"]) {
    const [red, green, blue] = channels(getComputedStyle(document.querySelector(".key.block-" + name)).backgroundColor).map((one) => Math.round(one * 255));
    counts[name] = 0;
    for (let at = 0; at < data.length; at += 4) {
      if (data[at] === red && data[at + 1] === green && data[at + 2] === blue && data[at + 3] === 255) counts[name] += 1;
    }
  }
  return counts;
}

/** What the keyboard's focus is on, and whether one sees it. */
function focus() {
  const element = document.activeElement;
  const style = getComputedStyle(element);
  return {
    id: element.id, tag: element.tagName, text: element.textContent.slice(0, 40),
    visible: element.matches(":focus-visible") && style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 1,
  };
}

/** Renders Markdown outside the page's own conversation: names of the elements made, links, and the text. */
async function markdown(text) {
  const { renderInto } = await import(new URL("ui/markdown.js", document.baseURI));
  const box = document.createElement("div");
  renderInto(box, text);
  return {
    names: [...box.querySelectorAll("*")].map((one) => one.localName),
    links: [...box.querySelectorAll("a")].map((one) => [one.href, one.rel, one.target]),
    attributes: [...new Set([...box.querySelectorAll("*")].flatMap((one) => one.getAttributeNames()))],
    text: box.textContent,
  };
}

/** How many of the letter "a" are left of each text when it is rendered: all of them, in reasonable time. */
async function letters(texts) {
  const { renderInto } = await import(new URL("ui/markdown.js", document.baseURI));
  return texts.map((text) => {
    const box = document.createElement("div");
    renderInto(box, text);
    return box.textContent.split("a").length - 1;
  });
}
