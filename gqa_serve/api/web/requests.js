// The table of requests that have not ended. Ids come from clients and are only ever text.

import { byId, count, duration, el, setText } from "./dom.js";

const COLUMNS = [
  ["Request", (one) => one.request_id],
  ["State", (one) => one.state],
  ["Age", (one) => duration(one.age_s)],
  ["Prompt", (one) => count(one.num_prompt_tokens)],
  ["Cached", (one) => count(one.num_cached_tokens)],
  ["Output", (one) => count(one.num_output_tokens)],
  ["Blocks", (one) => count(one.num_blocks)],
  ["Replica", (one) => count(one.replica)],  // the last, which the style hides where there is one engine
];

export function setUpRequests() {
  byId("requests").append(
    el("thead", {}, el("tr", {}, ...COLUMNS.map(([name]) => el("th", { scope: "col" }, name)))),
    el("tbody", {}),
  );
}

/**
 * @param {{requests: object[], num_running: number, num_waiting: number, num_preparing: number}} picture
 * @param {boolean} several whether there is more than one engine
 */
export function drawRequests(picture, several) {
  byId("requests").classList.toggle("one-engine", !several);
  const body = byId("requests").tBodies[0];
  const { requests } = picture;
  while (body.rows.length > requests.length) body.lastElementChild.remove();
  requests.forEach((request, index) => {
    const row = body.rows[index] || body.appendChild(newRow());
    row.className = request.state;
    COLUMNS.forEach(([, text], column) => setText(row.cells[column], text(request)));
  });
  const total = picture.num_running + picture.num_waiting + picture.num_preparing;
  setText(byId("requests-text"), total === 0 ? "None under way."
    : `${count(picture.num_running)} running, ${count(picture.num_waiting)} waiting`
      + (picture.num_preparing ? `, ${count(picture.num_preparing)} preparing their grammar` : "")
      + (total > requests.length ? `; the first ${count(requests.length)} are shown.` : "."));
  byId("requests").hidden = total === 0;
}

function newRow() {
  return el("tr", {}, ...COLUMNS.map((_, column) => (column ? el("td") : el("th", { scope: "row" }))));
}
