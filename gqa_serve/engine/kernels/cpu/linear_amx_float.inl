// Linear layers of bfloat16 weights on AMX tiles: 16 rows x 16 outputs x 32 inputs per instruction.
//
// A float32 activation is the sum of three bfloat16 numbers: its first 8 bits, the next 8, and the last 8.
//
//     activations of a tile of r rows             weights of a panel
//     step of 32 inputs: r rows of 64 bytes       step of 32 inputs: 16 rows of 2 x 64 bytes
//     of first bits, r of next, r of last         = two tiles, outputs 0..15 and 16..31, rows 128 bytes apart
//
// Owns the splitting of activations and the loop over a panel.
// Invariant: per step, in order, the sum of the products with the first bits is added to an output's sum, then that
// with the next, then that with the last. Such a sum of products is what tdpbf16ps computes: fma over the even inputs
// from 0.0f, fma over the odd ones, then one plus the other. Numbers below 2^-126, products and sums included,
// count as zero, as the instruction has it. Rows, tiles and chunks do not change what is computed; float32 weights
// and other instruction sets sum in another order (linear.inl).
// Each call configures the tiles and releases them, since other libraries use them too.
#pragma once

namespace gqa {
namespace {

constexpr int kSplitInputs = 32;                         // of a step
constexpr int kSplitChunk = 1024;                        // inputs of a chunk, where it serves several tiles
constexpr size_t kStepBytes = kSplitInputs * kPanel * 2; // of weights
constexpr size_t kStreamAhead = 4 << 10;                 // bytes read ahead, where a chunk serves one tile
constexpr int kShares = 6;                               // of what a step reads ahead

// --- activations ---

// The first 16 bits of 32 floats, as 32 words.
GQA_INLINE void store_first_halves(uint16_t* out, f32x16 a, f32x16 b) {
  const i32x16 low = shift_right<16>(as_int(a)), high = iand(as_int(b), iset1(int32_t(0xffff0000u)));
  // Lanes of a in low halves, lanes of b in high ones; then in order.
  static const uint16_t order[32] = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                                     1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
  _mm512_storeu_si512(out, _mm512_permutexvar_epi16(iload(order).v, ior(low, high).v));
}

GQA_INLINE f32x16 first_bits(f32x16 x) { return as_float(iand(as_int(x), iset1(int32_t(0xffff0000u)))); }

// One row's step, `count` inputs at x, into words at out, out + part and out + 2 * part. What is left of a number that
// is not finite is not a number.
GQA_INLINE void split_inputs(const float* x, int count, uint16_t* out, size_t part) {
  f32x16 rest[2] = {load_up_to(x, count), load_up_to(x + 16, count - 16)};
  for (int p = 0; p < 3; p++) {
    store_first_halves(out + p * part, rest[0], rest[1]);
    for (int v = 0; v < 2; v++) rest[v] = rest[v] - first_bits(rest[v]); // exact
  }
}

void prepare_split(const float* x, size_t ld, int rows, const Activations& out, int row) {
  uint16_t* to = const_cast<uint16_t*>(out.bf16) + size_t(row) * out.k_padded * 3;
  const size_t part = size_t(rows) * kSplitInputs;
  for (int i = 0; i < out.k; i += kSplitInputs) {
    for (int m = 0; m < rows; m++) split_inputs(x + m * ld + i, out.k - i, to + size_t(m) * kSplitInputs, part);
    to += 3 * part;
  }
}

// --- one panel ---

// Tiles: 0 to 3 sums, of up to 16 rows and both halves of the panel, and of up to 16 more; 4 and 5 their activations;
// 6 and 7 the weights.
void configure_split(int first, int second) {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {};
  } config;
  const uint8_t a = uint8_t(first), b = uint8_t(second ? second : first);
  const uint8_t tile_rows[8] = {a, a, b, b, a, b, 16, 16};
  memcpy(config.rows, tile_rows, 8);
  asm volatile("" : : "r"(&config) : "memory"); // the intrinsic does not say that it reads all of it
  _tile_loadconfig(&config);
}

// Reads ahead between multiplications, some lines at a time: more would hold up the loads of tiles. kNear: into L1.
template <bool kNear> GQA_INLINE void fetch_share(Ahead& ahead) {
  for (size_t i = 0; i < ahead.step; i += 64) __builtin_prefetch(ahead.next + i, 0, kNear ? 3 : 2);
  ahead.next += ahead.step;
}

// sums [rows][32] += one chunk, of up to 16 rows.
template <bool kNear>
void add_steps(const uint8_t* w, int steps, const uint16_t* x, int rows, float* sums, Ahead ahead) {
  const size_t part = size_t(rows) * kSplitInputs;
  _tile_loadd(0, sums, 128);
  _tile_loadd(1, sums + 16, 128);
  for (int s = 0; s < steps; s++) {
    _tile_loadd(6, w, 128);
    fetch_share<kNear>(ahead);
    _tile_loadd(4, x, 64);
    _tile_dpbf16ps(0, 4, 6);
    fetch_share<kNear>(ahead);
    _tile_loadd(7, w + 64, 128);
    fetch_share<kNear>(ahead);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, x + part, 64);
    fetch_share<kNear>(ahead);
    _tile_dpbf16ps(0, 5, 6);
    _tile_dpbf16ps(1, 5, 7);
    fetch_share<kNear>(ahead);
    _tile_loadd(4, x + 2 * part, 64);
    _tile_dpbf16ps(0, 4, 6);
    fetch_share<kNear>(ahead);
    _tile_dpbf16ps(1, 4, 7);
    w += kStepBytes;
    x += 3 * part;
  }
  _tile_stored(0, sums, 128);
  _tile_stored(1, sums + 16, 128);
}

// The same of 17 to 32 rows, `first` of them in the first tiles. An activation tile is loaded while those before it
// are multiplied.
template <bool kNear>
void add_steps(const uint8_t* w, int steps, const uint16_t* x, int rows, int first, float* sums, Ahead ahead) {
  const size_t part = size_t(rows) * kSplitInputs, second = size_t(first) * kSplitInputs;
  float* below = sums + first * kPanel;
  _tile_loadd(0, sums, 128);
  _tile_loadd(1, sums + 16, 128);
  _tile_loadd(2, below, 128);
  _tile_loadd(3, below + 16, 128);
  for (int s = 0; s < steps; s++) {
    _tile_loadd(6, w, 128);
    _tile_loadd(7, w + 64, 128);
    _tile_loadd(4, x, 64);
#pragma GCC unroll 3
    for (int p = 0; p < 3; p++) {
      _tile_loadd(5, x + second, 64);
      _tile_dpbf16ps(0, 4, 6);
      fetch_share<kNear>(ahead);
      _tile_dpbf16ps(1, 4, 7);
      x += part;
      if (p < 2) _tile_loadd(4, x, 64);
      _tile_dpbf16ps(2, 5, 6);
      fetch_share<kNear>(ahead);
      _tile_dpbf16ps(3, 5, 7);
    }
    w += kStepBytes;
  }
  _tile_stored(0, sums, 128);
  _tile_stored(1, sums + 16, 128);
  _tile_stored(2, below, 128);
  _tile_stored(3, below + 16, 128);
}

// sums [rows of the tiles][32] += one chunk, inputs `begin` and on. kNear: there is one tile.
template <bool kNear>
void add_chunk(const uint8_t* w, int inputs, const Activations& x, int begin, int tile_begin, int tile_end,
               float* sums) {
  const int tiles = tile_end - tile_begin, steps = inputs / kSplitInputs;
  int configured = 0;
  for (int t = tile_begin; t < tile_end; t++) {
    const int rows = x.tile_rows(t), first = rows > 16 ? (rows + 1) / 2 : rows;
    const uint16_t* input = x.bf16 + (size_t(t) * x.tile * x.k_padded + size_t(begin) * rows) * 3;
    const Ahead ahead = kNear ? Ahead{w + kStreamAhead, (kStepBytes + kShares - 1) / kShares}
                              : read_ahead(w, steps * kStepBytes, t - tile_begin, tiles, steps * kShares);
    if (rows != configured) configure_split(first, rows - first);
    configured = rows;
    if (rows > 16) add_steps<kNear>(w, steps, input, rows, first, sums, ahead);
    else add_steps<kNear>(w, steps, input, rows, sums, ahead);
    sums += 32 * rows;
  }
}

// sums [rows of the tiles][32] += one panel. A single tile takes it in one go, and so reads it from memory.
void multiply_panel_split(const uint8_t* w, const Activations& x, int tile_begin, int tile_end, float* sums) {
  if (tile_end - tile_begin == 1) {
    add_chunk<true>(w, x.k_padded, x, 0, tile_begin, tile_end, sums);
  } else {
    for (int i = 0; i < x.k_padded; i += kSplitChunk) {
      const int inputs = x.k_padded - i < kSplitChunk ? x.k_padded - i : kSplitChunk;
      add_chunk<false>(w, inputs, x, i, tile_begin, tile_end, sums);
      w += size_t(inputs) / kSplitInputs * kStepBytes;
    }
  }
  _tile_release();
}

}  // namespace
}  // namespace gqa
