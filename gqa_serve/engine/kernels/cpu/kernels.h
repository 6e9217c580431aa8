// What is compiled once per instruction set, as a table of functions; program.cpp calls through it.
//
// Invariant: an output element is reduced in an order that follows from the model and from token positions
// alone. It does not depend on how many rows a tile has, which thread computes it, or the instruction set (but for
// bfloat16 weights on AMX, which have an order of their own).
#pragma once

#include "attention.h"
#include "formats.h"

namespace gqa {

enum class Activation : uint8_t { Silu, Gelu, GeluTanh };
enum class QKNorm : uint8_t { None, Head, Full };

constexpr int kSumBlock = 256;

// What rotate_and_write() needs of a layer beyond the cache. Norm weights are float32, null without QKNorm:
// Head: [head_dim] each; Full: [num_heads * head_dim] and [num_kv_heads * head_dim].
struct HeadParams {
  int num_heads, num_kv_heads, head_dim;
  int rotary_dim;      // 0: no rotation; dimensions i and i + rotary_dim/2 turn together
  QKNorm qk_norm;
  float eps;
  const float* q_norm;
  const float* k_norm;
};

struct Kernels {
  const char* name;

  // --- linear layers (linear.inl) ---
  // Whether BF16 weights are multiplied by activations that are split into three bfloat16 numbers.
  bool splits;
  // Rows per tile for a product with this many rows in all.
  int (*tile_rows)(WeightFormat format, int rows);
  // Fill tile `tile` of `out` (whose buffers the caller owns) from x [rows, k] with row stride `ld`.
  void (*prepare)(const float* x, size_t ld, const Activations& out, int tile);
  // out[row, column] for the outputs of one panel and the rows of tiles [tile_begin, tile_end):
  // x @ weight.T + bias. `out` points at row 0 and the weight's first output, rows are `ld` floats apart; only
  // the weight's n outputs are written.
  void (*linear)(const PackedWeight& w, int panel, const Activations& x, int tile_begin, int tile_end, float* out,
                 size_t ld);
  // out[row, column] = activation(x @ gate.T + bias) * (x @ up.T + bias), likewise, for gate and up of one shape that
  // read the same activations. As linear() twice, then gated().
  void (*gated_linear)(const PackedWeight& gate, const PackedWeight& up, int panel, const Activations& x,
                       int tile_begin, int tile_end, float* out, size_t ld, Activation activation);

  // --- the rest of a step (rows.inl), one row of n floats at a time ---
  // out = x / sqrt(mean(x^2) + eps) * weight. `out` may be `x`.
  void (*rms_norm)(const float* x, const float* weight, float* out, int n, float eps);
  // residual += scale * x.
  void (*add)(const float* x, float* residual, int n, float scale);
  // out = activation(gate) * up. `out` may be `gate`.
  void (*gated)(const float* gate, const float* up, float* out, int n, Activation activation);
  // out *= scale
  void (*scale)(float* x, int n, float scale);
  // x = cap * tanh(x * scale / cap) with cap > 0, else x * scale
  void (*scale_and_cap)(float* x, int n, float scale, float cap);
  // One token: qkv [(H + 2 KV) * D] -> q_out [H * D] normed and rotated; K and V written to `slot`.
  // cos, sin: [rotary_dim / 2].
  void (*rotate_and_write)(const HeadParams& p, const float* qkv, const float* cos, const float* sin, float* q_out,
                           const KVLayer& cache, int64_t slot);
  // The first index of the largest value, or -1 if one of the n values is not finite.
  int (*argmax)(const float* x, int n);
  // The largest value; any number if one is not a number.
  float (*row_max)(const float* x, int n);
  // out[i] = exp((x[i] - best) / temperature), or 0 where x[i] < floor; sums[b] is their sum over the b-th
  // kSumBlock of them.
  void (*exponentials)(const float* x, int n, float best, float temperature, float floor, float* out, float* sums);

  // --- attention (attention.inl), see attention.h ---
  void (*attend)(const AttentionParams& p, const AttentionBatch& batch, const KVLayer& cache, const float* q,
                 const AttentionItem& item, float* partials, float* out, float* scratch);
  void (*merge)(const AttentionParams& p, const AttentionBatch& batch, const AttentionMerge& merge,
                const float* partials, float* out);
};

// The table of the instruction set in use; see isa.h.
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
const Kernels& kernels_amx();
const Kernels& kernels_neon();

}  // namespace gqa
