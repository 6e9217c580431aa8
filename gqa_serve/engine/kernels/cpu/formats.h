// The memory layouts that the kernels read, and nothing that computes.
//
// A weight matrix [n, k] (n outputs, k inputs) is cut into panels of 32 outputs; a panel is one contiguous run,
// read from its first to its last byte:
//
//     F32     k rows of 32 floats
//     F16     k rows of 32 halves
//     BF16    k/2 rows of 32 words; word j of row p holds inputs 2p (low half) and 2p + 1 (high half) of output j,
//             so that a shift or a mask widens 16 outputs, and 16 half rows are one tile of AMX
//
//     I8, I4  one run per group of `group` inputs, the last one shorter:
//             | 32 f16 scales | 32 f16 minima, if has_min | quads |
//             I8  group/4 quads of 128 bytes: byte 4*j + i is input 4*quad + i of output j, stored as q + 128
//             I4  group/8 pairs of quads, 128 bytes each: the low half-byte is of the first quad, the high one
//                 of the second; stored as q + 8, or as q where there is a minimum
//             weight = scale * q (+ minimum);  I8: -128 <= q <= 127;  I4: -8 <= q <= 7, or 0 <= q <= 15 with
//             a minimum
//
// Outputs beyond n and inputs beyond k are zero: k is padded to a multiple of 32 for BF16, I8 and I4, and not at all
// for the others.
//
// Invariant: the layouts of weights and cache do not depend on the instruction set. Activations are written and read
// by the same kernels, and AMX arranges its tiles of int8 in its own way (linear_amx.inl).
#pragma once

#include <cstddef>
#include <cstdint>

namespace gqa {

constexpr int kPanel = 32;      // outputs of one panel
constexpr int kQuantBlock = 32; // a group is a multiple of this
constexpr int kInputPad = 32;   // and so is k as it is packed, for BF16, I8 and I4

enum class WeightFormat : uint8_t { F32, BF16, F16, I8, I4 };

// One packed weight matrix. `data` holds num_panels() * panel_bytes bytes, aligned to 64.
struct PackedWeight {
  WeightFormat format;
  bool has_min;
  int n, k;
  int k_padded;
  int group;           // I8, I4: inputs per scale
  size_t panel_bytes;
  const uint8_t* data;
  const float* bias;   // [n], or null

  bool quantized() const { return format == WeightFormat::I8 || format == WeightFormat::I4; }
  int num_panels() const { return (n + kPanel - 1) / kPanel; }
  int num_groups() const { return (k_padded + group - 1) / group; }
};

// Activations of `rows` tokens as linear() reads them, in tiles of `tile` rows; the last may have fewer. A tile
// that starts at row r0 and has r rows:
//
//     float      f32 + r0 * k               k runs of r floats: input i of row r0 + m is at [i * r + m]
//     split      bf16 + r0 * k_padded * 3   k_padded/32 steps of 3 * r rows of 32 words: word i of row p * r + m
//                                           is part p of input 32 * step + i of row r0 + m
//     quantized  q + r0 * k_padded          k_padded/4 runs of r quads: input 4*c + i of row r0 + m is at
//                                           [(c * r + m) * 4 + i]
//                scale, sum + r0 * groups   groups runs of r: group g of row r0 + m is at [g * r + m]
//
// split, for BF16 weights on AMX: x is the sum of three bfloat16 parts; inputs beyond k are zero. quantized:
// x = scale * q with -127 <= q <= 127, per row and group; `sum` is the sum of q over the group. An input that is
// more than kOutlier times its group's mean magnitude has q = 0, so that it does not spoil the scale of the others; it
// is in the row's list instead, in order: outliers + row * outlier_capacity(k), outlier_count[row] of them.
constexpr int kOutlier = 8;
static inline int outlier_capacity(int k) { return k / kOutlier + 1; } // more cannot exceed the mean that far

struct Outlier {
  int32_t group, offset; // which input: the offset is in the group
  float value;
};

struct Activations {
  int rows, k, tile;
  bool quantized, split;
  int k_padded;                // as the weight's
  int group, groups;           // quantized only
  const float* f32;
  const uint16_t* bf16;
  const int8_t* q;
  const float* scale;
  const int32_t* sum;
  const Outlier* outliers;
  const int32_t* outlier_count;

  int num_tiles() const { return (rows + tile - 1) / tile; }
  int tile_rows(int index) const { return index * tile + tile <= rows ? tile : rows - index * tile; }
};

// K and V of one layer, in blocks of `block_size` tokens (a multiple of 16), one KV head of one block after the
// other: [num_blocks, num_kv_heads, ...] with, per KV head of a block,
//
//     K  F32   block_size/16 runs of [dim][16 tokens]: the lanes of a vector are tokens, so a score needs no
//              horizontal sum
//        BF16  block_size/16 runs of [dim/2][16 tokens][2]: two dimensions per 32-bit word
//        I8    block_size/16 runs of [dim][16 tokens]
//     V  F32   [block_size tokens][dim]
//        BF16  [block_size/2][dim][2]: two tokens per 32-bit word
//        I8    [block_size tokens][dim]
//
// where dim is head_dim rounded up to a multiple of 16 and the padding is zero. I8 has one float32 scale per
// token and KV head, in k_scale and v_scale: [num_blocks, num_kv_heads, block_size].
enum class KVFormat : uint8_t { F32, BF16, I8 };

struct KVLayer {
  KVFormat format;
  int num_kv_heads, head_dim, dim, block_size;
  uint8_t* k;
  uint8_t* v;
  float* k_scale; // I8 only
  float* v_scale;

  size_t head_bytes() const { // of K, or of V, of one KV head of one block
    size_t size = format == KVFormat::F32 ? 4 : format == KVFormat::BF16 ? 2 : 1;
    return size_t(block_size) * dim * size;
  }
};

}  // namespace gqa
