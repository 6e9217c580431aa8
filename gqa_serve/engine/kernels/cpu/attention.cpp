// How one layer's attention is cut into items, so that all threads have work of about the same length.
//
// Owns the cut and nothing that is computed: every cut gives the same bits (attention.h). Knows nothing of the
// cache's contents or of instruction sets.
#include "attention.h"

#include <algorithm>

#include "attention_layout.h"

namespace gqa {
namespace {

// A thread gets about this many items, so that the last ones to finish leave the others idle for little.
constexpr int kItemsPerThread = 8;
// Rows that a KV token of one item costs at least: with fewer, reading it takes longer than computing.
constexpr int kMinCostRows = 8;

// Partials of one step take at most this many floats (64 MiB); what would take more stays whole.
constexpr size_t kMaxPartials = size_t(16) << 20;

// Query tokens per item: as many as fit, but a multiple that fills blocks of 6 rows where there is one.
int tokens_per_item(const AttentionParams& p) {
  const int group = p.group_size(), most = std::max(1, max_item_rows(p) / group);
  for (int count = most; count > most / 2; count--) {
    if (count * group % 6 == 0) return count;
  }
  return most;
}

struct Planned {
  AttentionItem item;
  int64_t cost; // KV tokens times rows
};

// One item for each KV head and run of query tokens, over all the splits its tokens see.
std::vector<Planned> whole_items(const AttentionParams& p, const AttentionBatch& batch) {
  std::vector<Planned> items;
  const int step = tokens_per_item(p);
  for (int b = 0; b < batch.num_requests; b++) {
    const int first = batch.query_start[b], last = batch.query_start[b + 1];
    for (int token = first; token < last; token += step) {
      const int count = std::min(step, last - token);
      const int position = batch.context_len[b] - last + token;
      const int begin = first_visible(p, position), end = position + count;
      const int64_t cost = int64_t(end - begin) * std::max(kMinCostRows, count * p.group_size());
      for (int head = 0; head < p.num_kv_heads; head++) {
        const AttentionItem item = {b, head, token, count, begin / kSplit, (end - 1) / kSplit + 1, -1, 0};
        items.push_back({item, cost});
      }
    }
  }
  return items;
}

// Cuts an item into `parts` runs of splits, and adds the merges that put them together.
void cut(const Planned& whole, int parts, AttentionPlan& plan, std::vector<Planned>& items) {
  const AttentionItem& item = whole.item;
  const int splits = item.split_end - item.split_begin;
  for (int i = 0; i < parts; i++) {
    Planned part = whole;
    const int begin = int(int64_t(splits) * i / parts), end = int(int64_t(splits) * (i + 1) / parts);
    part.item.split_begin = item.split_begin + begin;
    part.item.split_end = item.split_begin + end;
    part.item.partial = plan.num_partials + begin;
    part.item.partial_stride = splits;
    part.cost = whole.cost * (end - begin) / splits;
    items.push_back(part);
  }
  for (int t = 0; t < item.count; t++) {
    plan.merges.push_back({item.request, item.kv_head, item.token + t, plan.num_partials + t * splits, splits});
  }
  plan.num_partials += item.count * splits;
}

}  // namespace

AttentionPlan plan_attention(const AttentionParams& p, const AttentionBatch& batch, int threads) {
  const std::vector<Planned> whole = whole_items(p, batch);
  int64_t total = 0;
  for (const Planned& item : whole) total += item.cost;
  const int64_t share = std::max<int64_t>(1, total / (int64_t(threads) * kItemsPerThread));
  AttentionPlan plan = {{}, {}, 0};
  std::vector<Planned> items;
  for (const Planned& each : whole) {
    const int splits = each.item.split_end - each.item.split_begin;
    // Cut where it is worth partials and a merge: an item of less than two shares is not.
    const int parts = threads == 1 ? 1 : int(std::min<int64_t>(splits, each.cost / share));
    const size_t partials = size_t(plan.num_partials) + size_t(each.item.count) * splits;
    if (parts > 1 && partials * partial_floats(p) <= kMaxPartials) {
      cut(each, parts, plan, items);
    } else {
      items.push_back(each);
    }
  }
  std::stable_sort(items.begin(), items.end(), [](const Planned& a, const Planned& b) { return a.cost > b.cost; });
  plan.items.reserve(items.size());
  for (const Planned& each : items) plan.items.push_back(each.item);
  return plan;
}

size_t partial_floats(const AttentionParams& p) { return partial_layout(p).floats(); }

size_t scratch_floats(const AttentionParams& p) { return scratch_layout(p).floats(); }

}  // namespace gqa
