// An answer token by token, coloured by how sure the model was, with the alternatives it had. One tab stop:
// arrow keys go from token to token, as the pointer does.

import { el } from "./dom.js";

/** Lowest probability of each colour; the class is its index. */
const STEPS = [0.9, 0.5, 0.2, 0.05, 0];
const NAMES = ["90 % and more", "50 % and more", "20 % and more", "5 % and more", "less"];
let lists = 0;

export const percent = (logprob) => {
  const share = Math.exp(logprob) * 100;
  if (share >= 99.95) return "100 %";
  return (share >= 10 ? share.toFixed(0) : share >= 0.1 ? share.toFixed(1) : "< 0.1") + " %";
};

/** White space and the like, made visible. */
const visible = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣") || "∅";
const stepOf = (logprob) => STEPS.findIndex((lowest) => Math.exp(logprob) >= lowest);

/** @param {import("./conversation.js").Token[]} tokens @returns {HTMLElement} */
export function tokenView(tokens) {
  lists += 1;
  const id = "tokens-" + lists;
  const options = tokens.map((token, index) => el("span", {
    id: `${id}-${index}`, role: "option", "aria-selected": "false", class: "token p" + stepOf(token.logprob),
    "aria-label": `${visible(token.text)}, ${percent(token.logprob)}`, "data-index": index,
  }, token.text.replaceAll("\n", "↵\n")));
  const detail = el("div", { class: "token-detail", id: id + "-detail", "aria-live": "polite" },
    el("p", { class: "hint" }, "Point at a token, or go through them with the arrow keys, to see what else it could have been."));
  const list = el("div", {
    role: "listbox", tabindex: "0", class: "token-list", "aria-label": "Tokens of the answer", "aria-describedby": id + "-detail",
  }, ...options);
  let active = -1;

  function select(index) {
    if (index === active || index < 0 || index >= tokens.length) return;
    if (active >= 0) options[active].setAttribute("aria-selected", "false");
    active = index;
    options[active].setAttribute("aria-selected", "true");
    list.setAttribute("aria-activedescendant", options[active].id);
    detail.replaceChildren(alternatives(tokens[active], active));
  }

  list.addEventListener("pointerover", (event) => {
    if (event.target.dataset.index) select(Number(event.target.dataset.index));
  });
  list.addEventListener("click", (event) => {
    if (event.target.dataset.index) select(Number(event.target.dataset.index));
  });
  list.addEventListener("focus", () => select(active < 0 ? 0 : active));
  list.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (step) select(active + step);
    else if (event.key === "Home") select(0);
    else if (event.key === "End") select(tokens.length - 1);
    else return;
    event.preventDefault();
    options[active].scrollIntoView({ block: "nearest" });
  });
  return el("div", { class: "token-view" }, list, detail, legend());
}

function legend() {
  return el("ul", { class: "token-legend", "aria-label": "Colours by probability" },
    ...NAMES.map((name, step) => el("li", {}, el("span", { class: "token p" + step }, name))));
}

function alternatives(token, index) {
  const others = token.top.some(([text]) => text === token.text) ? token.top : [[token.text, token.logprob], ...token.top];
  const rows = others.map(([text, logprob]) => el("tr", { class: text === token.text ? "chosen" : null },
    el("th", { scope: "row" }, visible(text), text === token.text ? el("span", { class: "hidden" }, " (chosen)") : null),
    el("td", {}, percent(logprob)),
    el("td", { "aria-hidden": "true" }, bar(logprob))));
  return el("table", {}, el("caption", {}, `Token ${index + 1}`),
    el("thead", { class: "hidden" }, el("tr", {}, el("th", { scope: "col" }, "Token"), el("th", { scope: "col" }, "Probability"), el("td"))),
    el("tbody", {}, ...rows));
}

function bar(logprob) {
  const node = el("span", { class: "share" });
  node.style.width = Math.max(1, Math.exp(logprob) * 100).toFixed(1) + "%";
  return node;
}
