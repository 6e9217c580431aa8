// One random token of one row of logits.
//
// Owns the mask, temperature, top-k, top-p, min-p and the draw. Does not know where the random number comes from.
// Invariant: the token is a function of the row and the parameters alone; the vocabulary is never sorted, only
// those of its tokens that a filter may keep.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace gqa {

// top_k 0, top_p 1 and min_p 0 filter nothing. `unit` is uniform in [0, 1).
struct DrawParams {
  float temperature;
  int top_k;
  float top_p, min_p;
  double unit;
};

// What a thread keeps from row to row.
struct DrawScratch {
  std::vector<float> weights, sums;
  std::vector<float> candidates;
};

// x[i] = -inf for each i of n whose bit is 0: bit i % 8, the lowest first, of byte i / 8; there is none beyond `bytes`.
// Returns the first index of the largest value left, -1 if that is not finite.
int mask(const Kernels& kernels, float* x, int n, const uint8_t* bits, size_t bytes);

// Divide logits x [n] by the temperature; of the tokens by falling probability keep the first top_k, then of
// these the fewest whose mass reaches top_p, then those with at least min_p times the largest probability;
// tokens that tie with the last one kept are kept. Returns the token at which the cumulative probability of
// those kept exceeds `unit`; -1 if x holds NaN or +inf, or nothing but -inf.
int draw(const Kernels& kernels, const float* x, int n, const DrawParams& params, DrawScratch& scratch);

}  // namespace gqa
