// Runs the script of docs.html on a DOM of a few lines: node stub_dom.js docs.html openapi.json
"use strict";
const fs = require("node:fs");
const [page, description] = process.argv.slice(2).map((name) => fs.readFileSync(name, "utf8"));

class Element {
  constructor(name) { Object.assign(this, { name, children: [], attributes: {}, listeners: {}, hidden: false, value: "" }); }
  setAttribute(key, value) { this.attributes[key] = value; if (key === "id") this.id = value; }
  append(...children) { this.children.push(...children); }
  addEventListener(type, listener) { (this.listeners[type] ||= []).push(listener); }
  dispatchEvent(event) { for (const listener of this.listeners[event.type] || []) listener(event); }
  get textContent() { return this.children.map((one) => typeof one === "string" ? one : one.textContent).join(""); }
  set textContent(text) { this.children = [text]; }
}

const byId = Object.fromEntries(["title", "about", "filter", "routes"].map((id) => [id, new Element(id)]));
globalThis.document = {
  baseURI: "http://host/llm/docs#top", activeElement: null,
  createElement: (name) => new Element(name), getElementById: (id) => byId[id], addEventListener() {},
};
globalThis.location = { hash: "" };
const asked = [];
globalThis.fetch = async (url) => { asked.push(url); return { ok: true, json: async () => JSON.parse(description) }; };

/** Opens every fold once, a few levels down (schemas may hold themselves). */
function unfold(node, depth) {
  if (typeof node === "string" || depth > 14) return;
  if (node.name === "details") { node.open = true; node.dispatchEvent({ type: "toggle" }); }
  for (const child of [...node.children]) unfold(child, depth + 1);
}

(0, eval)(page.match(/<script>([^]*?)<\/script>/)[1].replace('"use strict";', ""));
setTimeout(() => {
  const groups = byId.routes.children;
  const boxes = groups.flatMap((group) => group.children.filter((one) => one.name === "details"));
  unfold(byId.routes, 0);
  const texts = Object.fromEntries(boxes.map((box) => [box.id, box.textContent]));
  byId.filter.value = "post top_logprobs";
  byId.filter.dispatchEvent({ type: "input" });
  const found = boxes.filter((box) => !box.hidden).map((box) => box.id);
  console.log(JSON.stringify({ asked, title: byId.title.textContent, texts, found }));
}, 50);
