// What attend(), merge() and the plan agree on beyond attention.h: partials, scratch, sizes, what a token sees.
//
// Invariant: everything here is in an unnamed namespace, since code for several instruction sets includes it and
// each compilation must keep its own copies.
#pragma once

#include "attention.h"

namespace gqa {
namespace {

// A partial is [G][dim] weighted values, then [G] maxima, then [G] sums; a sum of 0 says that nothing was seen.
struct PartialLayout {
  size_t group, dim;

  size_t maxima() const { return group * dim; }
  size_t sums() const { return maxima() + group; }
  size_t floats() const { return (sums() + group + 15) / 16 * 16; }
};

// attend()'s scratch: parts of float32, each a multiple of 64 bytes, in this order in memory.
struct ScratchLayout {
  size_t rows, dim;  // query rows of one item at most; head_dim padded

  static constexpr int kRowStates = 7;

  size_t q() const { return 0; }                             // [row blocks][head_dim][rows of the block]
  size_t scores() const { return q() + rows * dim; }         // [rows][kTile]
  size_t values() const { return scores() + rows * kTile; }  // [rows][dim]: of this split
  size_t merged() const { return values() + rows * dim; }    // [rows][dim]: of the splits before it
  size_t k() const { return merged() + rows * dim; }         // one tile in float32, laid out as in the cache
  size_t v() const { return k() + kTile * dim; }             // one tile in float32, laid out as in the cache
  size_t state() const { return v() + kTile * dim; }         // [kRowStates][padded_rows]
  size_t padded_rows() const { return (rows + 15) / 16 * 16; }
  size_t floats() const { return state() + kRowStates * padded_rows() + 16; }  // 16: to align the first part
};

inline size_t padded_dim(int head_dim) { return size_t(head_dim + 15) / 16 * 16; }

// Query rows (tokens * G) of one item: enough to make good use of a tile of K and V once it is in the
// first-level cache, few enough to stay in the second.
constexpr int kItemRows = 96;

inline int max_item_rows(const AttentionParams& p) { return p.group_size() > kItemRows ? p.group_size() : kItemRows; }

inline ScratchLayout scratch_layout(const AttentionParams& p) {
  return {size_t(max_item_rows(p)), padded_dim(p.head_dim)};
}

inline PartialLayout partial_layout(const AttentionParams& p) {
  return {size_t(p.group_size()), padded_dim(p.head_dim)};
}

// The query token at `position` sees KV positions [first_visible, position + 1).
inline int first_visible(const AttentionParams& p, int position) {
  return p.window > 0 && position + 1 > p.window ? position + 1 - p.window : 0;
}

}  // namespace
}  // namespace gqa
