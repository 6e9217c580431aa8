// The dashboard: once a second, while somebody looks, it reads /metrics (numbers and their change over time) and
// /ui/state (blocks and requests), and shows both. Where an answer fails to come it says so and asks on.

import { ApiError, getJson, getText } from "./api.js";
import { drawBlocks, setUpBlocks } from "./blocks.js";
import { Chart } from "./chart.js";
import { met, onReady } from "./connection.js";
import { brief, byId, count, duration, el, setText } from "./dom.js";
import { factsView } from "./facts.js";
import { quantiles, rate, Reading } from "./metrics.js";
import { drawRequests, setUpRequests } from "./requests.js";

const PERIOD_MS = 1000;
const SPAN_S = 300;  // what the charts show
const WINDOW_S = 10;  // what a point of the latency charts is about
const STALE_S = 3;  // a picture older than this is worth a word
const P = "gqa_serve_";

/** What each tile shows of a reading. @type {[string, string, (reading: Reading) => string][]} */
const TILES = [
  ["running", "Running", (reading) => number(reading.value(P + "num_requests_running"))],
  ["waiting", "Waiting", (reading) => number(reading.value(P + "num_requests_waiting"))],
  ["usage", "KV cache in use", (reading) => share(reading.mean(P + "kv_cache_usage_perc"))],
  ["hits", "Prefix cache hits", (reading) => share(reading.value(P + "prefix_cache_hits_total") / reading.value(P + "prefix_cache_queries_total"))],
  ["prompt", "Prompt tokens", (reading) => number(reading.value(P + "prompt_tokens_total"))],
  ["output", "Output tokens", (reading) => number(reading.value(P + "generation_tokens_total"))],
  ["preempted", "Preemptions", (reading) => number(reading.value(P + "num_preemptions_total"))],
  ["refused", "Refused", (reading) => number(reading.value(P + "refusals_total") || 0)],  // no series until the first
];

const NOBODY = { requests: [], num_running: 0, num_waiting: 0, num_preparing: 0 };
const empty = (num_blocks) => ({ num_free: num_blocks, num_cached: 0, num_active: 0, num_shared: 0, states: "" });

const number = (value) => (value === null ? "–" : count(value));
const share = (value) => (value === null || !Number.isFinite(value) ? "–" : (value * 100).toFixed(1) + " %");

const CHARTS = [
  {
    title: "Tokens per second", note: "computed", series: ["of prompts", "of answers"], format: brief,
    values: (earlier, now) => ["prompt_computed", "output"].map((kind) => rate(earlier, now, P + "tokens_total", kind)),
  },
  {
    title: "Requests", note: "at once", series: ["running", "waiting"], format: brief,
    values: (_, now) => [now.value(P + "num_requests_running"), now.value(P + "num_requests_waiting")],
  },
  {
    title: "Time to first token", note: `of the last ${WINDOW_S} s`, series: ["half within", "95 % within"], format: duration,
    values: (_, now, old) => quantiles(old, now, P + "time_to_first_token_seconds", [0.5, 0.95]),
  },
  {
    title: "Time between tokens", note: `of the last ${WINDOW_S} s`, series: ["half within", "95 % within"], format: duration,
    values: (_, now, old) => quantiles(old, now, P + "inter_token_latency_seconds", [0.5, 0.95]),
  },
];

export function setUpDashboard() {
  setUpBlocks();
  setUpRequests();
  const dashboard = new Dashboard();
  onReady(() => dashboard.wake());  // a key was given, or the server came back
  return dashboard;
}

class Dashboard {
  constructor() {
    this.timer = 0;
    this.looking = false;
    /** @type {?AbortController} */
    this.asking = null;
    /** @type {Reading[]} those of the last `WINDOW_S` */
    this.readings = [];
    /** @type {string} what the facts were drawn from */
    this.model = "";
    this.values = TILES.map(([id]) => el("dd", { id: "tile-" + id }, "–"));
    byId("tiles").append(...TILES.map(([, name], index) => el("div", {}, el("dt", {}, name), this.values[index])));
    this.charts = CHARTS.map((options) => ({ chart: new Chart({ ...options, span_s: SPAN_S }), points: [], values: options.values }));
    byId("charts").append(...this.charts.map(({ chart }) => chart.node));
  }

  /** Somebody looks, or nobody does. @param {boolean} looking */
  look(looking) {
    if (looking === this.looking) return;
    this.looking = looking;
    if (looking) this.tick();
    else {
      clearTimeout(this.timer);
      if (this.asking) this.asking.abort();
    }
  }

  /** Asks now instead of later. */
  wake() {
    if (this.looking && !this.asking) this.tick();
  }

  async tick() {
    clearTimeout(this.timer);
    const asking = this.asking = new AbortController();
    let again = true;
    try {
      const [state, text] = await Promise.all([getJson("ui/state", asking.signal), getText("metrics", asking.signal)]);
      this.show(state, new Reading(text, performance.now() / 1000));
    } catch (error) {
      if (error.name === "AbortError") return;
      if (!(error instanceof ApiError)) throw error;
      again = error.status !== 401;  // until a key comes, every answer would be the same
      this.trouble(error.message);
      met(error);
    } finally {
      if (this.asking === asking) this.asking = null;
    }
    if (this.looking && again) this.timer = setTimeout(() => this.tick(), PERIOD_MS);
  }

  trouble(text) {
    setText(byId("trouble"), text);
    byId("trouble").hidden = !text;
  }

  show(state, reading) {
    const several = state.replicas.length > 1;
    this.trouble(said(state));
    TILES.forEach(([, , value], index) => setText(this.values[index], value(reading)));
    this.plot(reading);
    if (state.picture) {
      drawBlocks(state.picture.blocks, state.model.block_size);
      drawRequests(state.picture, several);
    } else if (state.engine !== "ready") {
      drawRequests(NOBODY, several);  // what it computed and held went with it
      if (state.model) drawBlocks(empty(state.model.num_blocks * state.replicas.length), state.model.block_size);
    }
    if (state.engine !== "ready") met(new ApiError(`The engine is ${state.engine}.`, { status: 503 }));
    const model = JSON.stringify([state.model, state.replicas.length]);
    if (state.model && model !== this.model) {
      this.model = model;
      byId("facts").replaceChildren(...factsView(state.model, state.replicas.length));
    }
  }

  /** @param {Reading} reading */
  plot(reading) {
    const latest = this.readings[this.readings.length - 1];
    if (latest) {
      const old = this.readings.find((one) => reading.at_s - one.at_s <= WINDOW_S + 0.5) || latest;
      for (const { chart, points, values } of this.charts) {
        points.push({ at_s: reading.at_s, values: values(latest, reading, old) });
        while (points[0].at_s < reading.at_s - SPAN_S) points.shift();
        chart.draw(points, reading.at_s);
      }
    }
    this.readings.push(reading);
    while (this.readings[0].at_s < reading.at_s - WINDOW_S - 1) this.readings.shift();
  }
}

/** What is to be said of the engine; nothing if all is well. */
function said(state) {
  if (state.engine === "restarting") return "The engine is being restarted; what it held is gone. This page goes on by itself.";
  if (state.engine !== "ready") return `The engine is ${state.engine}.`;
  if (!state.picture) return "The engine is busy with its first step.";
  const gone = state.replicas.flatMap((one, index) => (one === "ready" ? [] : [`replica ${index} is ${one}`]));
  if (gone.length) return `Of ${count(state.replicas.length)} engines, ${gone.join(", ")}; the others go on.`;
  if (state.picture_age_s > STALE_S) return `The engine is in a long step; blocks and requests are as of ${duration(state.picture_age_s)} ago.`;
  return "";
}
