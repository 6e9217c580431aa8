// Linear layers: activations into tiles, and one panel of 32 outputs times tiles of rows.
//
//     weights of one panel      chunk 0 | chunk 1 | ...      each chunk is read from memory once, stays in L1 and
//                                  |                         serves every tile of rows; what one tile has summed
//     tile 0, tile 1, ...  ------> sums [rows][32]           so far waits in `sums` for the next chunk
//
// Owns the micro-kernels and the quantization of activations. Does not know threads or where tensors come from.
// Invariant: float: fma over inputs 0, 1, ... from 0.0f, then + bias. Quantized: per group, in order,
// acc = fma(float(i) * x_scale, w_scale, acc) with i the exact integer sum, then the same with the sum of the
// activations and the minimum; then acc = fma(x, w, acc) for each outlier; then + bias. Rows, tiles and chunks do not
// change what is computed. The exception: AMX multiplies BF16 weights in its own order (linear_amx_float.inl).
#pragma once

namespace gqa {
namespace {

// Rows of a tile, as many as keep sums, weights and one broadcast activation in registers; 512-bit kernels take
// the panel's 32 outputs at once, the others 16 (all 32 for one or two rows).
#if defined(__AVX512F__)
constexpr bool kHalves = false;
constexpr int kFloatRows = 14, kQuantRows = 12;
#elif defined(__AVX2__)
constexpr bool kHalves = true;
constexpr int kFloatRows = 6, kQuantRows = 4;
#else
constexpr bool kHalves = true;
constexpr int kFloatRows = 6, kQuantRows = 6;
#endif
template <int R> constexpr int kVectors = kHalves && R > 2 ? 1 : 2;

constexpr int kSumRows = 112;        // rows whose sums wait for the next chunk, at most
constexpr int kFloatChunk = 128;     // inputs of a chunk
constexpr int kQuantChunk = 256;

// An int32 i with |i| <= 2^22, added to the bits of 1.5 * 2^23, is the bits of the float 1.5 * 2^23 + i. Activation
// scales have 22 significant bits, so 1.5 * 2^23 * scale is exact, and one fma gives float(i) * scale rounded once.
constexpr float kMagic = 12582912.0f;
constexpr int32_t kMagicBits = 0x4b400000;
constexpr int kMagicSum = 1 << 22;

// --- activations ---

#if defined(__AMX_INT8__)  // linear_amx.inl, linear_amx_float.inl
constexpr bool kSplits = true;
constexpr int kAmxRows = 16, kAmxLeast = 6, kSplitRows = 32;
bool on_amx(const Activations& x);
void prepare_amx(const float* x, size_t ld, int rows, const Activations& out, int row);
void multiply_panel_amx(const PackedWeight& w, const uint8_t* data, const Activations& x, int tile_begin, int tile_end,
                        float* sums);
void prepare_split(const float* x, size_t ld, int rows, const Activations& out, int row);
void multiply_panel_split(const uint8_t* w, const Activations& x, int tile_begin, int tile_end, float* sums);
#else
constexpr bool kSplits = false;
#endif

int tile_rows(WeightFormat format, int rows) {
  const bool quantized = format == WeightFormat::I8 || format == WeightFormat::I4;
  int most = quantized ? kQuantRows : kFloatRows;
#if defined(__AMX_INT8__)
  if (quantized && rows >= kAmxLeast) most = kAmxRows;
  if (format == WeightFormat::BF16) most = kSplitRows;
#endif
  if (rows <= most) return rows < 1 ? 1 : rows;
  const int tiles = (rows + most - 1) / most;
  return (rows + tiles - 1) / tiles;
}

// Four rows' floats x[i] .. x[i + 3], transposed into out[i * rows].
typedef float f32x4 __attribute__((vector_size(16)));

GQA_INLINE void transpose4(const float* x, size_t ld, float* out, int rows) {
  f32x4 a, b, c, d;
  memcpy(&a, x, 16);
  memcpy(&b, x + ld, 16);
  memcpy(&c, x + 2 * ld, 16);
  memcpy(&d, x + 3 * ld, 16);
  f32x4 ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), cd = __builtin_shufflevector(c, d, 0, 4, 1, 5);
  f32x4 r0 = __builtin_shufflevector(ab, cd, 0, 1, 4, 5), r1 = __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
  ab = __builtin_shufflevector(a, b, 2, 6, 3, 7), cd = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  f32x4 r2 = __builtin_shufflevector(ab, cd, 0, 1, 4, 5), r3 = __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
  memcpy(out, &r0, 16);
  memcpy(out + rows, &r1, 16);
  memcpy(out + 2 * rows, &r2, 16);
  memcpy(out + 3 * rows, &r3, 16);
}

void prepare_float(const float* x, size_t ld, int rows, int k, float* out) {
  if (rows == 1) {
    memcpy(out, x, size_t(k) * sizeof(float));
    return;
  }
  int i = 0;
  if (rows >= 4) {
    for (; i + 4 <= k; i += 4) {
      for (int m = 0; m < rows; m += 4) {
        const int first = m + 4 <= rows ? m : rows - 4; // the last four rows may have been written already
        transpose4(x + first * ld + i, ld, out + size_t(i) * rows + first, rows);
      }
    }
  }
  for (; i < k; i++) {
    for (int m = 0; m < rows; m++) out[size_t(i) * rows + m] = x[m * ld + i];
  }
}

// Inputs beyond `count` are zero.
GQA_INLINE f32x16 load_up_to(const float* x, int count) {
  if (count >= 16) return load(x);
  return count > 0 ? load_first(x, count) : zero();
}

// 16 bytes as four quads, `stride` bytes apart.
GQA_INLINE void store_quads(int8_t* out, size_t stride, i32x16 values) {
  if (stride == 4) {
    store_i8(out, values);
    return;
  }
  int8_t bytes[16];
  store_i8(bytes, values);
  for (int c = 0; c < 4; c++) memcpy(out + c * stride, bytes + 4 * c, 4);
}

// The outliers of one row.
struct OutlierList {
  Outlier* list;
  int32_t count;
};

// One group of one row: its largest magnitude, what it takes to be an outlier, whether it has only finite numbers.
struct GroupRange {
  float largest, limit;
  bool finite;
};

GQA_INLINE GroupRange measure_group(const float* x, int count) {
  f32x16 largest = zero(), total = zero();
  for (int i = 0; i < count; i += 16) {
    const f32x16 v = abs(load_up_to(x + i, count - i));
    largest = max(v, largest);
    total = total + v;
  }
  const float magnitudes = sum(total);
  return {maximum(largest), magnitudes * (float(kOutlier) / float(count)), magnitudes - magnitudes == 0.0f};
}

// Appends the outliers among `count` inputs at x; returns the largest magnitude of the others.
GQA_INLINE float split_outliers(const float* x, int count, int group, float limit, OutlierList& outliers) {
  f32x16 largest = zero();
  for (int i = 0; i < count; i += 16) {
    const f32x16 v = abs(load_up_to(x + i, count - i));
    const mask16 beyond = less(set1(limit), v);
    largest = max(select(beyond, zero(), v), largest);
    for (uint32_t lanes = bits(beyond); lanes != 0; lanes &= lanes - 1) {
      const int offset = i + __builtin_ctz(lanes);
      outliers.list[outliers.count++] = {group, offset, x[offset]};
    }
  }
  return maximum(largest);
}

// One row's group: `count` inputs at x, zero up to `padded`. Groups beyond 1e30 count as not finite, groups below 1e-30
// as zero, so that neither the reciprocal nor kMagic * scale overflows.
GQA_INLINE void quantize_group(const float* x, int count, int padded, int group, int8_t* q, size_t stride, float* scale,
                               int32_t* total, OutlierList& outliers) {
  const GroupRange range = measure_group(x, count);
  const bool split = range.largest > range.limit;
  const float amax = split ? split_outliers(x, count, group, range.limit, outliers) : range.largest;
  const bool finite = range.finite && amax < 1e30f;
  const bool empty = !finite || amax < 1e-30f;
  const f32x16 inverse = set1(empty ? 0.0f : 127.0f / amax);
  i32x16 sums = izero();
  for (int i = 0; i < padded; i += 16) {
    f32x16 value = load_up_to(x + i, count - i);
    value = select(less(set1(range.limit), abs(value)), zero(), value);
    const i32x16 v = empty ? izero() : to_int(value * inverse);
    sums = iadd(sums, v);
    store_quads(q + (i / 4) * stride, stride, v);
  }
  const float s = empty ? 0.0f : amax / 127.0f;
  uint32_t word;
  memcpy(&word, &s, 4);
  word = finite ? word & ~3u : 0x7fc00000u;
  memcpy(scale, &word, 4);
  *total = int32_t(sum(to_float(sums))); // exact: far below 2^24
}

// The list of a row, empty.
GQA_INLINE OutlierList outliers_of(const Activations& x, int row) {
  return {const_cast<Outlier*>(x.outliers) + size_t(row) * outlier_capacity(x.k), 0};
}

void prepare_quantized(const float* x, size_t ld, int rows, const Activations& out, int row) {
  int8_t* q = const_cast<int8_t*>(out.q) + size_t(row) * out.k_padded;
  float* scale = const_cast<float*>(out.scale) + size_t(row) * out.groups;
  int32_t* sums = const_cast<int32_t*>(out.sum) + size_t(row) * out.groups;
  for (int m = 0; m < rows; m++) {
    OutlierList outliers = outliers_of(out, row + m);
    for (int g = 0; g < out.groups; g++) {
      const int begin = g * out.group;
      const int padded = out.k_padded - begin < out.group ? out.k_padded - begin : out.group;
      const int count = out.k - begin < padded ? out.k - begin : padded;
      quantize_group(x + m * ld + begin, count, padded, g, q + (size_t(begin) / 4 * rows + m) * 4,
                     size_t(rows) * 4, scale + size_t(g) * rows + m, sums + size_t(g) * rows + m, outliers);
    }
    const_cast<int32_t*>(out.outlier_count)[row + m] = outliers.count;
  }
}

void prepare(const float* x, size_t ld, const Activations& out, int tile) {
  const int rows = out.tile_rows(tile), row = tile * out.tile;
  x += size_t(row) * ld;
#if defined(__AMX_INT8__)
  if (out.split) return prepare_split(x, ld, rows, out, row);
  if (on_amx(out)) return prepare_amx(x, ld, rows, out, row);
#endif
  if (out.quantized) prepare_quantized(x, ld, rows, out, row);
  else prepare_float(x, ld, rows, out.k, const_cast<float*>(out.f32) + size_t(row) * out.k);
}

// --- reading ahead ---

// While one chunk is multiplied, the next one (of this panel, or the beginning of the next panel) is fetched, each
// tile fetching its share: memory then works at an even rate, also where a chunk serves several tiles.
struct Ahead {
  const uint8_t* next;
  size_t step; // bytes per input (float) or per quad of inputs (quantized)
};

// The share of tile `index` of `tiles` in the `bytes` that follow this chunk's, which has `steps` steps.
GQA_INLINE Ahead read_ahead(const uint8_t* chunk, size_t bytes, int index, int tiles, int steps) {
  const size_t share = bytes / size_t(tiles);
  return {chunk + bytes + share * size_t(index), (share + size_t(steps) - 1) / size_t(steps)};
}

template <int kBytes> GQA_INLINE void fetch(Ahead& ahead) {
  __builtin_prefetch(ahead.next, 0, 2);
  if constexpr (kBytes == 128) __builtin_prefetch(ahead.next + 64, 0, 2);
  ahead.next += ahead.step;
}

// --- float weights ---

// Keeps what follows from being moved before what precedes, and what `p` points at in memory.
template <class T> GQA_INLINE void pin(T*& p) { asm volatile("" : "+r"(p) : : "memory"); }

// acc = fma(a, b, acc), in place: else GCC, where sums fill the registers, moves some to memory and back.
#if defined(__AVX512F__)
GQA_INLINE void add_product(f32x16& acc, f32x16 a, f32x16 b) {
  asm("vfmadd231ps %2, %1, %0" : "+v"(acc.v) : "v"(a.v), "v"(b.v));
}
#elif defined(__AVX2__)
GQA_INLINE void add_product(f32x16& acc, f32x16 a, f32x16 b) {
  asm("vfmadd231ps %2, %1, %0" : "+x"(acc.a) : "x"(a.a), "x"(b.a));
  asm("vfmadd231ps %2, %1, %0" : "+x"(acc.b) : "x"(a.b), "x"(b.b));
}
#else
GQA_INLINE void add_product(f32x16& acc, f32x16 a, f32x16 b) { acc = fma(a, b, acc); }
#endif

// A panel's rows hold one input of 32 outputs, or a pair of them.
template <WeightFormat F> constexpr int kRowInputs = F == WeightFormat::BF16 ? 2 : 1;
template <WeightFormat F> constexpr int kRowBytes = F == WeightFormat::F16 ? 64 : 128;

// V vectors of the 32 weights of input I of a row, from half H on.
template <WeightFormat F, int V, int H, int I> GQA_INLINE void widen(const uint8_t* w, f32x16* out) {
#pragma GCC unroll 2
  for (int v = 0; v < V; v++) {
    if constexpr (F == WeightFormat::F32) out[v] = load(reinterpret_cast<const float*>(w) + 16 * (H + v));
    else if constexpr (F == WeightFormat::F16) out[v] = load_f16(reinterpret_cast<const uint16_t*>(w) + 16 * (H + v));
    else if constexpr (I == 0) out[v] = bf16_low(iload(w + 64 * (H + v)));
    else out[v] = bf16_high(iload(w + 64 * (H + v)));
  }
}

// Input I of the row at w, of R rows of activations.
template <WeightFormat F, int R, int V, int H, int I>
GQA_INLINE void add_input(const uint8_t* w, const float* x, f32x16 (&acc)[R][V], Ahead& ahead) {
  f32x16 weights[V];
  widen<F, V, H, I>(w, weights);
  if constexpr (H == 0) fetch<kRowBytes<F> / kRowInputs<F>>(ahead);
#pragma GCC unroll 16
  for (int m = 0; m < R; m++) {
    const f32x16 input = set1(x[R * I + m]);
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) add_product(acc[m][v], input, weights[v]);
  }
}

template <WeightFormat F, int R, int V, int H>
GQA_INLINE void float_half(const uint8_t* w, int inputs, const float* x, float* sums, Ahead ahead) {
  f32x16 acc[R][V];
#pragma GCC unroll 16
  for (int m = 0; m < R; m++)
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) acc[m][v] = load(sums + 32 * m + 16 * (H + v));
#pragma GCC unroll 1
  for (int i = kRowInputs<F>; i <= inputs; i += kRowInputs<F>) {
    add_input<F, R, V, H, 0>(w, x, acc, ahead);
    if constexpr (kRowInputs<F> == 2) {
      pin(w); // or what was loaded would be kept for its other half, in registers that sums need
      add_input<F, R, V, H, 1>(w, x, acc, ahead);
    }
    w += kRowBytes<F>;
    x += R * kRowInputs<F>;
  }
  if (inputs % kRowInputs<F>) add_input<F, R, V, H, 0>(w, x, acc, ahead);
#pragma GCC unroll 16
  for (int m = 0; m < R; m++)
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) store(sums + 32 * m + 16 * (H + v), acc[m][v]);
}

// sums [R][32] += x [inputs][R] times the weights of `inputs` inputs.
template <WeightFormat F, int R>
void float_rows(const uint8_t* w, int inputs, const float* x, float* sums, Ahead ahead) {
  constexpr int V = kVectors<R>;
  float_half<F, R, V, 0>(w, inputs, x, sums, ahead);
  if constexpr (V == 1) float_half<F, R, V, 1>(w, inputs, x, sums, ahead);
}

using FloatKernel = void (*)(const uint8_t* w, int inputs, const float* x, float* sums, Ahead ahead);

template <WeightFormat F, int R = kFloatRows> FloatKernel float_kernel(int rows) {
  if constexpr (R > 1) {
    if (rows < R) return float_kernel<F, R - 1>(rows);
  }
  return &float_rows<F, R>;
}

// --- quantized weights ---

// How a group's weights meet the activations: kOffset is what the integer sum holds too much per unit of the
// activations' sum. `block` adds 32 inputs of R rows to acc; set s of acc takes every kSets-th quad, so that few
// rows do not wait for one multiply-add after the other.
template <int R, int V> constexpr int kSets = kHalves ? 1 : R == 1 ? 4 : R <= 4 ? 2 : 1;

GQA_INLINE i32x16 broadcast_quad(const int8_t* q) {
  int32_t quad;
  memcpy(&quad, q, 4);
  return iset1(quad);
}

#if defined(__AVX512F__)
constexpr int kOffsetI8 = 128;
GQA_INLINE i32x16 weights_i8(const uint8_t* w) { return iload(w); }
GQA_INLINE i32x16 dot_i8(i32x16 acc, i32x16 w, i32x16 x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc.v) : "v"(w.v), "v"(x.v));
  return acc;
}
GQA_INLINE i32x16 dot_i4(i32x16 acc, i32x16 w, i32x16 x) { return dot_i8(acc, w, x); }
#elif defined(__AVX2__)
// |w| <= 128 times x with w's sign: a pair's sum is at most 2 * 128 * 127, which 16 bits hold.
constexpr int kOffsetI8 = 0;
struct SignedWeights { i32x16 magnitude, value; };
GQA_INLINE SignedWeights weights_i8(const uint8_t* p) {
  const i32x16 w = iload(p);
  const __m256i flip = _mm256_set1_epi8(char(-128));
  const i32x16 value = {_mm256_xor_si256(w.a, flip), _mm256_xor_si256(w.b, flip)};
  return {{_mm256_abs_epi8(value.a), _mm256_abs_epi8(value.b)}, value};
}
GQA_INLINE __m256i dot_pairs(__m256i acc, __m256i u8, __m256i s8) {
  return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(u8, s8), _mm256_set1_epi16(1)));
}
GQA_INLINE i32x16 dot_i8(i32x16 acc, const SignedWeights& w, i32x16 x) {
  return {dot_pairs(acc.a, w.magnitude.a, _mm256_sign_epi8(x.a, w.value.a)),
          dot_pairs(acc.b, w.magnitude.b, _mm256_sign_epi8(x.b, w.value.b))};
}
#else
constexpr int kOffsetI8 = 0;
GQA_INLINE i32x16 weights_i8(const uint8_t* p) {
  i32x16 r;
  for (int i = 0; i < 4; i++) r.v[i] = vreinterpretq_s32_u8(veorq_u8(vld1q_u8(p + 16 * i), vdupq_n_u8(0x80)));
  return r;
}
GQA_INLINE i32x16 dot_i8(i32x16 acc, i32x16 w, i32x16 x) {
  for (int i = 0; i < 4; i++)
    acc.v[i] = vdotq_s32(acc.v[i], vreinterpretq_s8_s32(w.v[i]), vreinterpretq_s8_s32(x.v[i]));
  return acc;
}
GQA_INLINE i32x16 dot_i4(i32x16 acc, i32x16 w, i32x16 x) { return dot_i8(acc, w, x); }
#endif

template <int R, int V, int H>
GQA_INLINE void block_i8(const uint8_t* w, const int8_t* q, i32x16 (&acc)[kSets<R, V>][R][V], Ahead& ahead) {
#pragma GCC unroll 8
  for (int c = 0; c < 8; c++) {
    decltype(weights_i8(w)) weights[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) weights[v] = weights_i8(w + 128 * c + 64 * v);
    if constexpr (H == 0) fetch<128>(ahead);
#pragma GCC unroll 16
    for (int m = 0; m < R; m++) {
      const i32x16 x = broadcast_quad(q + (c * R + m) * 4);
      i32x16(&to)[V] = acc[c % kSets<R, V>][m];
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) to[v] = dot_i8(to[v], weights[v], x);
    }
  }
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// A pair's sum is at most 2 * 15 * 127, and 16 bits hold eight of them: one widening per 32 inputs.
template <int R, int V, int H>
GQA_INLINE void block_i4(const uint8_t* w, const int8_t* q, i32x16 (&acc)[kSets<R, V>][R][V], Ahead& ahead) {
  const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
#pragma GCC unroll 2
  for (int v = 0; v < V; v++) {
    i32x16 pairs[R];
#pragma GCC unroll 8
    for (int c = 0; c < 8; c++) {
      i32x16 weights = iload(w + 128 * (c / 2) + 64 * v);
      if (H == 0 && v == 0) fetch<64>(ahead);
      if (c % 2) weights = shift_right<4>(weights);
      weights = {_mm256_and_si256(weights.a, low), _mm256_and_si256(weights.b, low)};
#pragma GCC unroll 16
      for (int m = 0; m < R; m++) {
        const i32x16 x = broadcast_quad(q + (c * R + m) * 4);
        const __m256i a = _mm256_maddubs_epi16(weights.a, x.a), b = _mm256_maddubs_epi16(weights.b, x.b);
        if (c == 0) pairs[m] = {a, b};
        else pairs[m] = {_mm256_add_epi16(pairs[m].a, a), _mm256_add_epi16(pairs[m].b, b)};
      }
    }
#pragma GCC unroll 16
    for (int m = 0; m < R; m++)
      acc[0][m][v] = iadd(acc[0][m][v], {_mm256_madd_epi16(pairs[m].a, ones), _mm256_madd_epi16(pairs[m].b, ones)});
  }
}
#else
template <int R, int V, int H>
GQA_INLINE void block_i4(const uint8_t* w, const int8_t* q, i32x16 (&acc)[kSets<R, V>][R][V], Ahead& ahead) {
  const i32x16 low = iset1(0x0f0f0f0f);
#pragma GCC unroll 8
  for (int c = 0; c < 8; c++) {
    i32x16 weights[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) {
      const i32x16 packed = iload(w + 128 * (c / 2) + 64 * v);
      weights[v] = iand(c % 2 ? shift_right<4>(packed) : packed, low);
    }
    if constexpr (H == 0) fetch<64>(ahead);
#pragma GCC unroll 16
    for (int m = 0; m < R; m++) {
      const i32x16 x = broadcast_quad(q + (c * R + m) * 4);
      i32x16(&to)[V] = acc[c % kSets<R, V>][m];
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) to[v] = dot_i4(to[v], weights[v], x);
    }
  }
}
#endif

// One tile's activations from some group on.
struct QuantInput {
  const int8_t* q;
  const float* scale;
  const int32_t* sum;
  int group;
};

// What one group's sums start from and end with, per row. They are broadcast from memory: the arithmetic ports are
// busy, the load ports are not.
struct RowTerms {
  const int32_t* start; // of the integer sums
  const float* scale;
  const float* magic;   // -kMagic * scale
  const float* sum;     // float(sum) * scale, where there is a minimum
};

template <WeightFormat F> constexpr int kBlockBytes = F == WeightFormat::I8 ? 1024 : 512;
template <bool kMin> constexpr int kHeadBytes = kMin ? 128 : 64;

template <int R, int V> GQA_INLINE void start_sums(const int32_t* start, i32x16 (&acc)[kSets<R, V>][R][V]) {
#pragma GCC unroll 16
  for (int m = 0; m < R; m++)
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) {
      acc[0][m][v] = iset1(start[m]);
#pragma GCC unroll 4
      for (int s = 1; s < kSets<R, V>; s++) acc[s][m][v] = izero();
    }
}

// One group for half H of the panel (or all of it, with V == 2). `run` points at the group's scales. With kWide an
// integer sum may exceed kMagicSum.
template <WeightFormat F, bool kMin, bool kWide, int R, int V, int H>
GQA_INLINE void quant_group(const uint8_t* run, int inputs, const int8_t* q, const RowTerms& x, float* sums,
                            Ahead& ahead) {
  i32x16 acc[kSets<R, V>][R][V];
  start_sums<R, V>(x.start, acc);
  const uint8_t* w = run + kHeadBytes<kMin> + 64 * H;
  const uint8_t* end = w + inputs / kQuantBlock * kBlockBytes<F>;
  do {
    if constexpr (F == WeightFormat::I8) block_i8<R, V, H>(w, q, acc, ahead);
    else block_i4<R, V, H>(w, q, acc, ahead);
    w += kBlockBytes<F>;
    q += kQuantBlock * R;
  } while (w != end);
  f32x16 scale[V], minimum[V];
#pragma GCC unroll 2
  for (int v = 0; v < V; v++) {
    scale[v] = load_f16(reinterpret_cast<const uint16_t*>(run) + 16 * (H + v));
    if constexpr (kMin) minimum[v] = load_f16(reinterpret_cast<const uint16_t*>(run) + 32 + 16 * (H + v));
  }
#pragma GCC unroll 16
  for (int m = 0; m < R; m++) {
    const f32x16 x_scale = set1(x.scale[m]), x_magic = set1(x.magic[m]);
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) {
      i32x16 total = acc[0][m][v];
#pragma GCC unroll 4
      for (int s = 1; s < kSets<R, V>; s++) total = iadd(total, acc[s][m][v]);
      const f32x16 product = kWide ? to_float(total) * x_scale : fma(as_float(total), x_scale, x_magic);
      float* to = sums + 32 * m + 16 * (H + v);
      f32x16 result = fma(product, scale[v], load(to));
      if constexpr (kMin) result = fma(set1(x.sum[m]), minimum[v], result);
      store(to, result);
    }
  }
}

// sums [R][32] += the groups that make up `inputs` inputs: one group, or at most kQuantChunk inputs.
template <WeightFormat F, bool kMin, bool kWide, int R>
void quant_rows(const uint8_t* run, int inputs, const QuantInput& x, float* sums, Ahead ahead) {
  constexpr int V = kVectors<R>, most = kQuantChunk / kQuantBlock * R;
  constexpr int offset = F == WeightFormat::I8 ? kOffsetI8 : kMin ? 0 : 8;
  int32_t start[most];
  float magic[most], sum[most];
  const int group = x.group, terms = (inputs + group - 1) / group * R;
  for (int i = 0; i < terms; i++) {
    start[i] = (kWide ? 0 : kMagicBits) - offset * x.sum[i];
    magic[i] = -kMagic * x.scale[i];
    if (kMin) sum[i] = float(x.sum[i]) * x.scale[i];
  }
  RowTerms of = {start, x.scale, magic, sum};
  const int8_t* q = x.q;
  do {
    const int count = inputs < group ? inputs : group;
    pin(of.start);
    quant_group<F, kMin, kWide, R, V, 0>(run, count, q, of, sums, ahead);
    if constexpr (V == 1) quant_group<F, kMin, kWide, R, V, 1>(run, count, q, of, sums, ahead);
    run += kHeadBytes<kMin> + size_t(count) / kQuantBlock * kBlockBytes<F>;
    q += size_t(count) * R;
    of = {of.start + R, of.scale + R, of.magic + R, of.sum + R};
    pin(sums);
    inputs -= count;
  } while (inputs > 0);
}

using QuantKernel = void (*)(const uint8_t* run, int inputs, const QuantInput& x, float* sums, Ahead ahead);

template <WeightFormat F, bool kMin, int R = kQuantRows> QuantKernel quant_kernel(int rows, bool wide) {
  if constexpr (R > 1) {
    if (rows < R) return quant_kernel<F, kMin, R - 1>(rows, wide);
  }
  return wide ? &quant_rows<F, kMin, true, R> : &quant_rows<F, kMin, false, R>;
}

// --- the end of a panel: outliers, bias ---

// The 32 weights of one outlier's input. `data` is the panel's.
template <WeightFormat F, bool kMin>
GQA_INLINE void weight_column(const uint8_t* data, size_t group_bytes, const Outlier& of, f32x16 (&column)[2]) {
  constexpr bool bytes = F == WeightFormat::I8;
  const uint8_t* run = data + size_t(of.group) * group_bytes;
  const uint8_t* words = run + kHeadBytes<kMin> + size_t(of.offset / (bytes ? 4 : 8)) * 128;
  const int shift = 8 * (of.offset % 4) + (bytes ? 0 : of.offset % 8 / 4 * 4);
  const i32x16 mask = iset1(bytes ? 255 : 15), offset = iset1(bytes ? 128 : kMin ? 0 : 8);
#pragma GCC unroll 2
  for (int v = 0; v < 2; v++) {
    const f32x16 q = to_float(isub(iand(shift_right_by(iload(words + 64 * v), shift), mask), offset));
    const f32x16 scale = load_f16(reinterpret_cast<const uint16_t*>(run) + 16 * v);
    if constexpr (kMin) column[v] = fma(q, scale, load_f16(reinterpret_cast<const uint16_t*>(run) + 32 + 16 * v));
    else column[v] = q * scale;
  }
}

// out = sums + bias for rows [row, row + rows) and the panel's first `columns` outputs, after add_rest(row, sum) has
// added to a row's sum of 32 what is not in `sums`.
template <class F>
GQA_INLINE void finish(const float* sums, int row, int rows, const float* bias, int columns, float* out, size_t ld,
                       F add_rest) {
  f32x16 add[2] = {zero(), zero()};
  for (int v = 0; bias && v < 2; v++) add[v] = load_up_to(bias + 16 * v, columns - 16 * v);
  for (int m = 0; m < rows; m++) {
    f32x16 sum[2] = {load(sums + 32 * m), load(sums + 32 * m + 16)};
    add_rest(row + m, sum);
    for (int v = 0; v < 2 && columns > 16 * v; v++) {
      if (bias) sum[v] = sum[v] + add[v];
      if (columns >= 16 * v + 16) store(out + m * ld + 16 * v, sum[v]);
      else store_first(out + m * ld + 16 * v, sum[v], columns - 16 * v);
    }
  }
}

template <WeightFormat F, bool kMin>
void finish_quantized(const PackedWeight& w, const uint8_t* data, const Activations& x, const float* sums, int row,
                      int rows, const float* bias, int columns, float* out, size_t ld) {
  const size_t group_bytes = kHeadBytes<kMin> + size_t(w.group) / kQuantBlock * kBlockBytes<F>;
  const size_t capacity = outlier_capacity(x.k);
  finish(sums, row, rows, bias, columns, out, ld, [&](int of, f32x16 (&sum)[2]) {
    const Outlier *outlier = x.outliers + size_t(of) * capacity, *end = outlier + x.outlier_count[of];
    for (; outlier != end; outlier++) {
      f32x16 column[2];
      weight_column<F, kMin>(data, group_bytes, *outlier, column);
#pragma GCC unroll 2
      for (int v = 0; v < 2; v++) sum[v] = fma(set1(outlier->value), column[v], sum[v]);
    }
  });
}

// --- one panel ---

template <WeightFormat F>
void float_panel(const uint8_t* w, const Activations& x, int tile_begin, int tile_end, float* sums) {
  const FloatKernel full = float_kernel<F>(x.tile), last = float_kernel<F>(x.tile_rows(x.num_tiles() - 1));
  for (int i = 0; i < x.k; i += kFloatChunk) {
    const int inputs = x.k - i < kFloatChunk ? x.k - i : kFloatChunk;
    const size_t bytes = size_t(inputs) * kRowBytes<F> / kRowInputs<F>;
    float* to = sums;
    for (int t = tile_begin; t < tile_end; t++) {
      const int rows = x.tile_rows(t);
      const float* input = x.f32 + size_t(t) * x.tile * x.k + size_t(i) * rows;
      const Ahead ahead = read_ahead(w, bytes, t - tile_begin, tile_end - tile_begin, inputs);
      (rows == x.tile ? full : last)(w, inputs, input, to, ahead);
      to += 32 * rows;
    }
    w += bytes;
  }
}

template <WeightFormat F, bool kMin>
void quant_panel(const uint8_t* w, const Activations& x, int tile_begin, int tile_end, float* sums) {
  constexpr int largest = 127 * (F == WeightFormat::I8 ? 128 : 15);
  const bool wide = int64_t(x.group) * largest > kMagicSum;
  const QuantKernel full = quant_kernel<F, kMin>(x.tile, wide);
  const QuantKernel last = quant_kernel<F, kMin>(x.tile_rows(x.num_tiles() - 1), wide);
  const int groups = x.group < kQuantChunk ? kQuantChunk / x.group : 1; // of a chunk
  for (int g = 0; g < x.groups; g += groups) {
    const int begin = g * x.group, left = x.k_padded - begin;
    const int inputs = left < groups * x.group ? left : groups * x.group;
    const size_t bytes = size_t(inputs) / kQuantBlock * kBlockBytes<F> +
                         size_t((inputs + x.group - 1) / x.group) * kHeadBytes<kMin>;
    float* to = sums;
    for (int t = tile_begin; t < tile_end; t++) {
      const int rows = x.tile_rows(t);
      const size_t row = size_t(t) * x.tile, first = row * x.groups + size_t(g) * rows;
      const QuantInput input = {x.q + row * x.k_padded + size_t(begin) * rows, x.scale + first, x.sum + first,
                                x.group};
      const Ahead ahead = read_ahead(w, bytes, t - tile_begin, tile_end - tile_begin, inputs / 4);
      (rows == x.tile ? full : last)(w, inputs, input, to, ahead);
      to += 32 * rows;
    }
    w += bytes;
  }
}

void multiply_panel(const PackedWeight& w, const uint8_t* data, const Activations& x, int tile_begin, int tile_end,
                    float* sums) {
#if defined(__AMX_INT8__)
  if (x.split) return multiply_panel_split(data, x, tile_begin, tile_end, sums);
  if (on_amx(x)) return multiply_panel_amx(w, data, x, tile_begin, tile_end, sums);
#endif
  switch (w.format) {
    case WeightFormat::F32: return float_panel<WeightFormat::F32>(data, x, tile_begin, tile_end, sums);
    case WeightFormat::BF16: return float_panel<WeightFormat::BF16>(data, x, tile_begin, tile_end, sums);
    case WeightFormat::F16: return float_panel<WeightFormat::F16>(data, x, tile_begin, tile_end, sums);
    case WeightFormat::I8: return quant_panel<WeightFormat::I8, false>(data, x, tile_begin, tile_end, sums);
    case WeightFormat::I4:
      if (w.has_min) return quant_panel<WeightFormat::I4, true>(data, x, tile_begin, tile_end, sums);
      return quant_panel<WeightFormat::I4, false>(data, x, tile_begin, tile_end, sums);
  }
}

// out = one panel times the rows of tiles [tile_begin, tile_end), at most kSumRows of them.
void panel_rows(const PackedWeight& w, int panel, const Activations& x, int tile_begin, int tile_end, float* sums,
                float* out, size_t ld) {
  const uint8_t* data = w.data + size_t(panel) * w.panel_bytes;
  const int column = panel * kPanel, columns = w.n - column < kPanel ? w.n - column : kPanel;
  const float* bias = w.bias ? w.bias + column : nullptr;
  const int row = tile_begin * x.tile, rows = (tile_end * x.tile < x.rows ? tile_end * x.tile : x.rows) - row;
  memset(sums, 0, size_t(rows) * kPanel * sizeof(float));
  multiply_panel(w, data, x, tile_begin, tile_end, sums);
  if (!x.quantized) {
    finish(sums, row, rows, bias, columns, out, ld, [](int, f32x16 (&)[2]) {});
  } else if (w.format == WeightFormat::I8) {
    finish_quantized<WeightFormat::I8, false>(w, data, x, sums, row, rows, bias, columns, out, ld);
  } else if (w.has_min) {
    finish_quantized<WeightFormat::I4, true>(w, data, x, sums, row, rows, bias, columns, out, ld);
  } else {
    finish_quantized<WeightFormat::I4, false>(w, data, x, sums, row, rows, bias, columns, out, ld);
  }
}

// f(first tile, tile after the last) for runs of tiles with at most kSumRows rows.
template <class F> GQA_INLINE void over_runs(const Activations& x, int tile_begin, int tile_end, F f) {
  const int tiles = kSumRows / x.tile;
  for (int t = tile_begin; t < tile_end; t += tiles) f(t, t + tiles < tile_end ? t + tiles : tile_end);
}

void linear(const PackedWeight& w, int panel, const Activations& x, int tile_begin, int tile_end, float* out,
            size_t ld) {
  alignas(64) float sums[kSumRows * kPanel];
  over_runs(x, tile_begin, tile_end, [&](int begin, int end) {
    panel_rows(w, panel, x, begin, end, sums, out + size_t(begin) * x.tile * ld + panel * kPanel, ld);
  });
}

void gated_linear(const PackedWeight& gate, const PackedWeight& up, int panel, const Activations& x, int tile_begin,
                  int tile_end, float* out, size_t ld, Activation activation) {
  alignas(64) float gates[kSumRows * kPanel], ups[kSumRows * kPanel];
  const int column = panel * kPanel, columns = gate.n - column < kPanel ? gate.n - column : kPanel;
  over_runs(x, tile_begin, tile_end, [&](int begin, int end) {
    panel_rows(gate, panel, x, begin, end, gates, gates, kPanel);
    panel_rows(up, panel, x, begin, end, ups, ups, kPanel);
    const int row = begin * x.tile, rows = (end * x.tile < x.rows ? end * x.tile : x.rows) - row;
    for (int m = 0; m < rows; m++)
      gated(gates + kPanel * m, ups + kPanel * m, out + (row + m) * ld + column, columns, activation);
  });
}

}  // namespace
}  // namespace gqa
