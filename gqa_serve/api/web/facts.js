// What grouped-query attention means for the loaded model: its heads as a drawing, and what its cache holds
// beside what it would hold if every query head had a K and V of its own (MHA).

import { bytes, count, el, svg } from "./dom.js";

/** @param {object} model `ModelFacts` of /ui/state @param {number} replicas engines @returns {HTMLElement[]} */
export function factsView(model, replicas) {
  const group = model.num_heads / model.num_kv_heads;
  const tokens = model.num_blocks * model.block_size;
  const tokensMha = Math.floor(model.num_blocks / group) * model.block_size;
  const perRequest = Math.ceil(model.max_model_len / model.block_size);
  const fit = Math.floor(model.num_blocks / perRequest);
  const fitMha = Math.floor(Math.floor(model.num_blocks / group) / perRequest);
  const perToken = model.kv_bytes_per_token;
  return [
    el("p", {}, sentence(model, group)),
    drawing(model.num_heads, model.num_kv_heads, group),
    el("div", { class: "scroll", role: "region", "aria-label": "GQA and MHA compared", tabindex: "0" }, el("table", { class: "compare", "aria-label": "GQA and MHA compared" },
      el("thead", {}, row("th", "", "This model", "With MHA")),
      el("tbody", {},
        row("td", "KV heads", count(model.num_kv_heads), count(model.num_heads)),
        row("td", "KV cache per token", bytes(perToken), bytes(perToken * group)),
        row("td", `KV cache of ${count(tokens)} tokens`, bytes(tokens * perToken), bytes(tokens * perToken * group)),
        row("td", `Tokens that fit in ${bytes(tokens * perToken)}`, count(tokens), count(tokensMha)),
        row("td", `Requests of the whole context (${count(model.max_model_len)})`, count(fit), count(fitMha)),
      ))),
    el("dl", { class: "model" }, ...[
      ["Model", `${model.name} (${model.architecture})`],
      ["Weights", `${bytes(model.weight_bytes)}, ${model.dtype}` + (model.quantization === "none" ? "" : `, ${model.quantization}`)],
      ["KV cache", `${count(model.num_blocks)} blocks of ${count(model.block_size)} tokens, ${model.kv_dtype}`],
      ["Computed by", `${model.backend} on ${model.device}, at most ${count(model.max_num_seqs)} requests at once`],
      ...(replicas > 1 ? [["Engines", `${count(replicas)}, each with the weights and a KV cache as described here`]] : []),
    ].map(([name, text]) => el("div", {}, el("dt", {}, name), el("dd", {}, text)))),
  ];
}

function sentence(model, group) {
  if (group === 1) {
    return `Every one of the ${count(model.num_heads)} query heads has a K and V of its own (MHA): this model's cache saves nothing.`;
  }
  const share = model.num_kv_heads === 1 ? "one KV head (MQA)" : `${count(model.num_kv_heads)} KV heads`;
  return `${count(model.num_heads)} query heads share ${share}: each K and V is kept once and read by a group of ${count(group)}, `
    + `so the cache needs ${count(group)} times less memory than multi-head attention would.`;
}

function row(cell, name, ...values) {
  return el("tr", {}, name ? el("th", { scope: "row" }, name) : el("td"),
    ...values.map((value) => el(cell, cell === "th" ? { scope: "col" } : {}, value)));
}

/** Groups of query heads over their KV head; only the first few groups of a large model. */
function drawing(heads, kvHeads, group) {
  const groups = Math.min(kvHeads, 16), drawn = Math.min(group, 16);
  const size = 12, step = 15, wide = drawn * step + 14;
  const perRow = Math.max(1, Math.floor(560 / wide));
  const figures = [];
  for (let index = 0; index < groups; index += 1) {
    const middle = drawn * step / 2 - 1.5;
    const queries = Array.from({ length: drawn }, (_, query) => [
      svg("path", { class: "wire", d: `M${query * step + size / 2} ${size + 1}Q${query * step + size / 2} 28 ${middle} 36` }),
      svg("rect", { class: "query", x: query * step, y: 1, width: size, height: size, rx: 2 }),
    ]).flat();
    const x = index % perRow * wide, y = Math.floor(index / perRow) * 64;
    figures.push(svg("g", { transform: `translate(${x + 2} ${y})` }, ...queries,
      svg("rect", { class: "kv", x: middle - 8, y: 36, width: 16, height: 16, rx: 2 })));
  }
  const width = Math.min(groups, perRow) * wide, height = Math.ceil(groups / perRow) * 64 - 8;
  const more = groups < kvHeads || drawn < group ? `, of which the first are drawn` : "";
  return el("figure", { class: "heads" },
    svg("svg", { viewBox: `0 0 ${width} ${height}`, width, role: "img", "aria-label": `${count(heads)} query heads in ${count(kvHeads)} groups, each over one KV head` }, ...figures),
    el("figcaption", { class: "hint" }, `above: ${count(heads)} query heads; below: ${count(kvHeads)} KV heads${more}`));
}
