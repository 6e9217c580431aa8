// Grouped attention over the paged cache: what is computed, and how a step's work is cut into items.
//
//     split 0            split 1            split 2 (unfinished)
//     |tile|tile|tile|...|tile|tile|tile|...|tile|ti       KV tokens of one request, from position 0
//
// Softmax is online within a split of kSplit tokens, tile by tile of kTile; splits are merged in order of
// position. Both sizes are fixed and start at position 0, so that a token's result does not depend on how
// its prompt was chunked, what else is in the batch, or how many threads there are. An item runs all splits of
// its query tokens one after the other and merges as it goes, or leaves them as partials, where there would be too
// few items for the threads; a merge then puts them together by the same operations in the same order.
// A sliding window skips tiles that no query of the item sees; skipping and masking give the same bits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "formats.h"

namespace gqa {

constexpr int kTile = 64;   // KV tokens per softmax update
constexpr int kSplit = 256; // KV tokens per independently computed part

struct AttentionParams {
  int num_heads, num_kv_heads, head_dim;
  float scale;
  float soft_cap; // 0: none
  int window;     // tokens a query sees, itself included; 0: all before it

  int group_size() const { return num_heads / num_kv_heads; }
};

// One step's requests. The new tokens of request b are rows query_start[b] .. query_start[b + 1] of q and out,
// at positions context_len[b] - query_len .. context_len[b] - 1. Its blocks: block_tables + b * max_blocks.
struct AttentionBatch {
  int num_requests;
  int max_blocks;
  const int32_t* query_start;  // [num_requests + 1]
  const int32_t* context_len;  // [num_requests]
  const int32_t* block_tables; // [num_requests, max_blocks]
};

// `count` query tokens of one request and KV head, over splits [split_begin, split_end). `partial` < 0: these
// are all the splits the tokens see, the result goes to `out`. Else: the running maximum, sum and weighted values
// of the G heads of split `split_begin + s` and query token `token + t` go to partial number
// `partial + t * partial_stride + s`.
struct AttentionItem {
  int request, kv_head;
  int token, count; // first row of q, number of rows
  int split_begin, split_end;
  int partial, partial_stride;
};

// The partials [first, first + count) of one query token and KV head, in order of position.
struct AttentionMerge {
  int request, kv_head, token;
  int first, count;
};

// What one layer's attention is cut into. Items may run in any order on any thread, the longest are first; then
// the merges, in any order.
struct AttentionPlan {
  std::vector<AttentionItem> items;
  std::vector<AttentionMerge> merges;
  int num_partials;
};

// The plan for layers of this shape and window. What is computed does not depend on it, nor on `threads`.
AttentionPlan plan_attention(const AttentionParams& p, const AttentionBatch& batch, int threads);

size_t partial_floats(const AttentionParams& p); // per partial
size_t scratch_floats(const AttentionParams& p); // per thread

}  // namespace gqa
