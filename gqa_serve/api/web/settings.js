// The sampling controls: what they are, what was typed into them, and the fields of a request that they make.
// An empty control sends nothing, so that the server's and the checkpoint's own defaults hold.

import { byId, el } from "./dom.js";

const STORE = "gqa-serve-settings";

/** Name in the API, label, lowest, highest, step, and what it does. */
const NUMBERS = [
  ["temperature", "Temperature", 0, 2, 0.05, "0 always takes the likeliest token"],
  ["top_p", "Top p", 0.01, 1, 0.01, "keep the likeliest tokens that together reach this probability"],
  ["top_k", "Top k", -1, 1000000, 1, "keep so many of the likeliest tokens; 0 or -1: all"],
  ["min_p", "Min p", 0, 1, 0.01, "drop tokens less likely than this share of the likeliest"],
  ["max_tokens", "Max tokens", 1, 10000000, 1, "longest answer"],
  ["seed", "Seed", -9007199254740991, 9007199254740991, 1, "same seed, same answer"],
  ["presence_penalty", "Presence penalty", -2, 2, 0.1, "against tokens that the answer has already"],
  ["frequency_penalty", "Frequency penalty", -2, 2, 0.1, "the same, each time they come"],
  ["repetition_penalty", "Repetition penalty", 0.01, 10, 0.01, "above 1: against tokens of prompt and answer"],
];

export function setUpSettings() {
  const grid = byId("sampling");
  for (const [name, label, min, max, step, title] of NUMBERS) {
    grid.append(el("label", { for: name, title }, label),
      el("input", { id: name, type: "number", inputmode: "decimal", min, max, step: step < 1 ? "any" : step, placeholder: "default", title }));
  }
  grid.append(el("label", { for: "stop-strings", title: "texts that end the answer, one a line" }, "Stop strings"),
    el("textarea", { id: "stop-strings", rows: 1, placeholder: "one a line" }));
  restore();
  byId("settings").addEventListener("input", store);
  byId("settings").addEventListener("submit", (event) => event.preventDefault());
  byId("reset").addEventListener("click", () => {
    for (const input of inputs()) input.value = "";
    byId("with-logprobs").checked = true;
    store();
  });
  byId("settings-box").open = matchMedia("(min-width: 62rem)").matches;
}

const inputs = () => [...byId("settings").querySelectorAll("input[type=number], textarea")];

/** What the request carries of the settings. A number out of range goes along: the server says what is wrong. */
export function samplingFields() {
  const fields = {};
  for (const [name] of NUMBERS) {
    const input = byId(name);
    if (input.value.trim() !== "" && !Number.isNaN(input.valueAsNumber)) fields[name] = input.valueAsNumber;
  }
  const stop = byId("stop-strings").value.split("\n").filter(Boolean);
  if (stop.length) fields.stop = stop;
  if (byId("with-logprobs").checked) Object.assign(fields, { logprobs: true, top_logprobs: 5 });
  return fields;
}

export const systemPrompt = () => byId("system").value.trim();

/** Shows which control an error of the server is about, and takes the mark away again. @param {?string} param */
export function markWrong(param) {
  for (const input of inputs()) input.removeAttribute("aria-invalid");
  const input = param && byId(param === "stop" ? "stop-strings" : param);
  if (!input || !byId("settings").contains(input)) return;
  input.setAttribute("aria-invalid", "true");
  byId("settings-box").open = true;
}

function store() {
  const values = Object.fromEntries(inputs().map((input) => [input.id, input.value]));
  try {
    sessionStorage.setItem(STORE, JSON.stringify({ values, logprobs: byId("with-logprobs").checked }));
  } catch { /* the settings last as long as the page */ }
}

function restore() {
  try {
    const { values, logprobs } = JSON.parse(sessionStorage.getItem(STORE));
    for (const input of inputs()) input.value = values[input.id] || "";
    byId("with-logprobs").checked = logprobs;
  } catch { /* nothing stored yet */ }
}
