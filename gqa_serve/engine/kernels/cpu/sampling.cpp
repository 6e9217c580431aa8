#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

namespace gqa {

namespace {

// Candidates of a filter are at first the tokens within this many temperatures of the best; e^-8 of its
// probability, so most nuclei end before.
constexpr float kFirstReach = 8;

// The smallest logit that top-k and top-p keep. `sorted` are the logits of the likeliest tokens, falling; they are
// all tokens if `complete`. Returns false if that cannot be told from them.
bool find_floor(const std::vector<float>& sorted, bool complete, float best, double total, const DrawParams& p,
                int top_k, float* floor) {
  auto weight = [&](float x) { return std::exp(double(x - best) / p.temperature); };
  size_t limit = top_k > 0 ? size_t(top_k) : std::numeric_limits<size_t>::max();
  if (!complete && top_k > 0 && sorted.size() < limit) return false;
  double mass = total;
  if (top_k > 0) {
    mass = 0;
    for (size_t i = 0; i < sorted.size() && i < limit; i++) mass += weight(sorted[i]);
  }
  double before = 0;
  for (size_t i = 0; i < sorted.size(); i++) {
    bool keep = i == 0 || (i < limit && (p.top_p >= 1 || before < p.top_p * mass));
    if (!keep) return true;
    *floor = sorted[i];
    before += weight(sorted[i]);
  }
  return complete || sorted.size() >= limit;
}

float top_floor(const float* x, int n, float best, double total, const DrawParams& p, DrawScratch& scratch) {
  int top_k = p.top_k > 0 && p.top_k < n ? p.top_k : 0;
  float floor = -std::numeric_limits<float>::infinity();
  if (top_k == 0 && p.top_p >= 1) return floor;
  std::vector<float>& candidates = scratch.candidates;
  // Banned tokens are no candidates, however far one reaches.
  const auto possible = std::count_if(x, x + n, [](float v) { return !std::isinf(v); });
  for (float reach = kFirstReach;; reach *= 2) {
    float lowest = best - reach * p.temperature;
    candidates.clear();
    for (int i = 0; i < n; i++)
      if (x[i] >= lowest) candidates.push_back(x[i]);
    bool complete = int64_t(candidates.size()) >= possible || std::isinf(lowest);
    if (top_k > 0 && candidates.size() > size_t(top_k)) {  // the rest can only tie with the last of these
      std::nth_element(candidates.begin(), candidates.begin() + top_k - 1, candidates.end(), std::greater<float>());
      candidates.resize(top_k);
    }
    std::sort(candidates.begin(), candidates.end(), std::greater<float>());
    if (find_floor(candidates, complete, best, total, p, top_k, &floor)) return floor;
  }
}

}  // namespace

// Sum of the weights, which are made on the way: of tokens from `floor` on.
static double weigh(const Kernels& kernels, const float* x, int n, float best, float temperature, float floor,
                    DrawScratch& scratch) {
  kernels.exponentials(x, n, best, temperature, floor, scratch.weights.data(), scratch.sums.data());
  double total = 0;
  for (float sum : scratch.sums) total += sum;
  return total;
}

int mask(const Kernels& kernels, float* x, int n, const uint8_t* bits, size_t bytes) {
  const float banned = -std::numeric_limits<float>::infinity();
  int i = 0;
  for (size_t byte = 0; byte < bytes && i < n; byte++) {
    const unsigned allowed = bits[byte];
    const int end = std::min(n, i + 8);
    if (allowed == 0) {
      std::fill(x + i, x + end, banned);
    } else if (allowed != 255) {
      for (int bit = 0; i + bit < end; bit++)
        if (!(allowed >> bit & 1)) x[i + bit] = banned;
    }
    i = end;
  }
  std::fill(x + i, x + n, banned);
  const float best = kernels.row_max(x, n);
  return std::isfinite(best) ? int(std::find(x, x + n, best) - x) : -1;
}

int draw(const Kernels& kernels, const float* x, int n, const DrawParams& p, DrawScratch& scratch) {
  scratch.weights.resize(n);
  scratch.sums.resize((n + kSumBlock - 1) / kSumBlock);
  const float best = kernels.row_max(x, n), infinity = std::numeric_limits<float>::infinity();
  double kept = weigh(kernels, x, n, best, p.temperature, -infinity, scratch);
  if (!std::isfinite(best) || !std::isfinite(kept)) return -1;
  float floor = top_floor(x, n, best, kept, p, scratch);
  if (p.min_p > 0) floor = std::max(floor, best + p.temperature * std::log(p.min_p));
  if (floor > -infinity) kept = weigh(kernels, x, n, best, p.temperature, std::min(floor, best), scratch);
  const double target = p.unit * kept;
  double cumulative = 0;
  int block = 0, blocks = int(scratch.sums.size()), last = -1;
  while (block + 1 < blocks && cumulative + scratch.sums[block] <= target) cumulative += scratch.sums[block++];
  for (int i = block * kSumBlock; i < n; i++) {
    if (scratch.weights[i] == 0) continue;
    cumulative += scratch.weights[i];
    last = i;
    if (cumulative > target) break;
  }
  if (last >= 0) return last;
  for (int i = n - 1; i >= 0; i--)  // rounding left the target beyond the last token
    if (scratch.weights[i] > 0) return i;
  return -1;
}

}  // namespace gqa
