// Grouped attention: one item of attention.h at a time, tile by tile of KV tokens.
//
//     scores[row][token]  = sum over d of q[row][d] * K[d][token]      lanes are tokens
//     values[row][d]     += sum over t of p[row][t] * V[t][d]          lanes are dimensions
//
// Rows are the item's query tokens times the G heads of the group. Both products are blocks of R rows by C
// vectors held in registers, and each K or V vector that is loaded (and widened) serves all R rows. Where there
// are many rows, a bfloat16 or int8 tile is widened once into scratch instead.
//
// Owns the order of operations of a row: see attention.h; within a tile, scores are summed over d from 0, the
// row's own visible tokens are added to its values from first to last, and p is summed as (p0 + p1) + (p2 + p3)
// of 16 lanes each, then as a tree. Knows nothing of threads.
//
// Invariants: a row's result depends on its own visible tokens alone: what it does not see is never multiplied
// into it, not even by zero, so NaN in stale or masked tokens has no effect. Of block tables, only the entries
// of tokens that a row of the item sees are read.
#pragma once

#include "attention_layout.h"
#include "kernels.h"
#include "math.inl"

namespace gqa {
namespace {

constexpr int kChunk = 16;                // tokens of one K vector
constexpr int kTileChunks = kTile / kChunk;
constexpr float kLowest = -3.402823466e38f;  // finite: the difference of two of them is 0

// Blocks of registers: up to kFewRows rows by kFewColumns vectors, or up to kMaxRows by kManyColumns.
#if defined(__AVX512F__)
constexpr int kFewRows = 6, kFewColumns = 4, kMaxRows = 12, kManyColumns = 2;
#elif defined(__AVX2__)
constexpr int kFewRows = 3, kFewColumns = 2, kMaxRows = 6, kManyColumns = 1;
#else
constexpr int kFewRows = 2, kFewColumns = 2, kMaxRows = 6, kManyColumns = 1;
#endif

constexpr int columns_at_once(int rows) { return rows <= kFewRows ? kFewColumns : kManyColumns; }

GQA_INLINE int smaller(int a, int b) { return a < b ? a : b; }
GQA_INLINE int larger(int a, int b) { return a > b ? a : b; }

// f.operator()<n>() for n = value, 1 <= value <= N.
template <int N, class F>
GQA_INLINE void with_constant(int value, F f) {
  if constexpr (N == 1) {
    f.template operator()<1>();
  } else {
    if (value == N) {
      f.template operator()<N>();
    } else {
      with_constant<N - 1>(value, f);
    }
  }
}

// f.operator()<R, C>(first) over columns [begin, end), in groups of nearly the same size.
template <class F>
GQA_INLINE void over_columns(int rows, int begin, int end, F f) {
  with_constant<kMaxRows>(rows, [&]<int R>() {
    constexpr int kMost = columns_at_once(R);
    while (begin < end) {
      const int left = end - begin, groups = (left + kMost - 1) / kMost, now = (left + groups - 1) / groups;
      with_constant<kMost>(now, [&]<int C>() { f.template operator()<R, C>(begin); });
      begin += now;
    }
  });
}

// One tile of K and V of one KV head, chunk by chunk of 16 tokens, as it lies in the cache or, widened, in
// scratch.
struct Tile {
  const uint8_t* k[kTileChunks];
  const uint8_t* v[kTileChunks];
  const float* k_scale[kTileChunks];
  const float* v_scale[kTileChunks];
};

// State of the rows, [rows] each: of this split, of the splits before it, and what a tile does to the row.
struct RowState {
  float *max, *sum;
  float *merged_max, *merged_sum;
  float* factor;        // what the values so far are multiplied with
  int32_t *begin, *end; // visible positions
};

struct Task {
  const AttentionParams& p;
  const KVLayer& cache;
  const int32_t* blocks = nullptr; // of the request
  int kv_head = 0, group = 0, head_dim = 0, dim = 0;
  int rows = 0, row_blocks = 0;
  int begin = 0, end = 0;          // positions that at least one row sees
  float *q = nullptr, *scores = nullptr, *values = nullptr, *merged = nullptr, *wide_k = nullptr, *wide_v = nullptr;
  RowState state = {};

  int first_row(int block) const { return int(int64_t(rows) * block / row_blocks); }
  int first_chunk() const { return begin / kChunk; }
  int last_chunk() const { return (end - 1) / kChunk; }
};

// --- micro-kernels ---

template <int R, int C>
GQA_INLINE void multiply_add(const float* a, int stride, const f32x16 (&x)[C], f32x16 (&acc)[R][C]) {
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) {
    const f32x16 scalar = set1(a[r * stride]);
#pragma GCC unroll 4
    for (int c = 0; c < C; c++) acc[r][c] = fma(scalar, x[c], acc[r][c]);
  }
}

// scores[r][16 c + lane] of R rows and C chunks; q is [dims][R]. The same places of `next` are fetched.
template <KVFormat F, int R, int C>
__attribute__((noinline)) void score(const float* q, const uint8_t* const* k, const uint8_t* const* next, int dims,
                                     float* scores) {
  constexpr int kStep = F == KVFormat::BF16 ? 2 : 1, kBytes = F == KVFormat::I8 ? 16 : 64;
  f32x16 acc[R][C], x[C];
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
    for (int c = 0; c < C; c++) acc[r][c] = zero();
  }
  size_t at = 0;
#pragma GCC unroll 2
  for (int d = 0; d < dims; d += kStep, at += kBytes, q += kStep * R) {
#pragma GCC unroll 4
    for (int c = 0; c < C; c++) {
      if (F != KVFormat::I8 || at % 64 == 0) __builtin_prefetch(next[c] + at);
    }
    if constexpr (F == KVFormat::BF16) {
      i32x16 pairs[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; c++) x[c] = bf16_low(pairs[c] = iload(k[c] + at));
      multiply_add<R, C>(q, 1, x, acc);
#pragma GCC unroll 4
      for (int c = 0; c < C; c++) x[c] = bf16_high(pairs[c]);
      multiply_add<R, C>(q + R, 1, x, acc);
    } else {
#pragma GCC unroll 4
      for (int c = 0; c < C; c++) {
        x[c] = F == KVFormat::F32 ? load((const float*)(k[c] + at)) : load_i8((const int8_t*)(k[c] + at));
      }
      multiply_add<R, C>(q, 1, x, acc);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
    for (int c = 0; c < C; c++) store(scores + r * kTile + c * kChunk, acc[r][c]);
  }
}

// What of V add_values() adds: tokens [begin, end) of a tile, from vector `column` of each on.
struct ValueRange {
  const uint8_t* const* v;
  const uint8_t* const* next; // the same places are fetched
  int begin, end, column;
  size_t dim;
};

// acc[r][c] += p[r][t] * V[t][16 c + lane] for tokens [begin, end) of one chunk, whose V starts at `v`.
template <KVFormat F, int R, int C>
GQA_INLINE void add_chunk(const float* p, const uint8_t* v, const uint8_t* next, int begin, int end, size_t dim,
                          f32x16 (&acc)[R][C]) {
  constexpr int kBytes = F == KVFormat::I8 ? 16 : 64;
  const size_t stride = dim / 16 * kBytes;  // of a token, or of two in bfloat16
  f32x16 x[C];
  if constexpr (F == KVFormat::BF16) {
    for (int t = begin; t < end;) {
      const size_t at = size_t(t / 2) * stride;
      i32x16 pairs[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; c++) pairs[c] = iload(v + at + c * kBytes);
#pragma GCC unroll 4
      for (int c = 0; c < C; c++) __builtin_prefetch(next + at + c * kBytes);
      if (t % 2 == 0) {
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) x[c] = bf16_low(pairs[c]);
        multiply_add<R, C>(p + t, kTile, x, acc);
        if (++t == end) break;
      }
#pragma GCC unroll 4
      for (int c = 0; c < C; c++) x[c] = bf16_high(pairs[c]);
      multiply_add<R, C>(p + t, kTile, x, acc);
      t++;
    }
  } else {
    for (int t = begin; t < end; t++) {
      const size_t at = size_t(t) * stride;
#pragma GCC unroll 4
      for (int c = 0; c < C; c++) {
        const uint8_t* from = v + at + c * kBytes;
        x[c] = F == KVFormat::F32 ? load((const float*)from) : load_i8((const int8_t*)from);
        if (c * kBytes % 64 == 0) __builtin_prefetch(next + at + c * kBytes);
      }
      multiply_add<R, C>(p + t, kTile, x, acc);
    }
  }
}

// values[r][16 c + lane] = values * factor[r] + sum over t of p[r][t] * V[t], for R rows and C vectors.
template <KVFormat F, int R, int C>
__attribute__((noinline)) void add_values(const float* p, const ValueRange& range, const float* factor, float* values) {
  constexpr int kBytes = F == KVFormat::I8 ? 16 : 64;
  const size_t dim = range.dim, skip = size_t(range.column) * kBytes;
  f32x16 acc[R][C];
  float* row = values;
#pragma GCC unroll 12
  for (int r = 0; r < R; r++, row += dim) {
    const f32x16 scalar = set1(factor[r]);
#pragma GCC unroll 4
    for (int c = 0; c < C; c++) acc[r][c] = load(row + c * 16) * scalar;
  }
  for (int t = range.begin; t < range.end; t = t / kChunk * kChunk + kChunk) {
    const int chunk = t / kChunk, first = chunk * kChunk;
    const uint8_t *v = range.v[chunk] + skip, *next = range.next[chunk] + skip;
    if (t == first && range.end >= first + kChunk) {  // the same with a length that the compiler knows
      add_chunk<F, R, C>(p + first, v, next, 0, kChunk, dim, acc);
    } else {
      add_chunk<F, R, C>(p + first, v, next, t - first, smaller(range.end - first, kChunk), dim, acc);
    }
  }
  row = values;
#pragma GCC unroll 12
  for (int r = 0; r < R; r++, row += dim) {
#pragma GCC unroll 4
    for (int c = 0; c < C; c++) store(row + c * 16, acc[r][c]);
  }
}

// --- one tile ---

GQA_INLINE size_t element_size(KVFormat f) { return f == KVFormat::F32 ? 4 : f == KVFormat::BF16 ? 2 : 1; }

// Where tile `index` lies. Chunks that no row sees stand for their nearest neighbour.
Tile locate(const Task& task, int index) {
  const KVLayer& c = task.cache;
  Tile tile = {};
  for (int i = 0; i < kTileChunks; i++) {
    const int chunk = smaller(larger(index * kTileChunks + i, task.first_chunk()), task.last_chunk());
    const int position = chunk * kChunk, offset = position % c.block_size;
    const size_t head = size_t(task.blocks[position / c.block_size]) * c.num_kv_heads + task.kv_head;
    const size_t at = head * c.head_bytes() + size_t(offset) * c.dim * element_size(c.format);
    tile.k[i] = c.k + at;
    tile.v[i] = c.v + at;
    if (c.format == KVFormat::I8) {
      tile.k_scale[i] = c.k_scale + head * c.block_size + offset;
      tile.v_scale[i] = c.v_scale + head * c.block_size + offset;
    }
  }
  return tile;
}

// The part of a row's or of all rows' visible positions that lies in a tile, from the tile's start.
GQA_INLINE int in_tile(int position, int tile) { return smaller(larger(position - tile * kTile, 0), kTile); }

// K and V of chunks [begin, end) in float32, for F32's kernels.
template <KVFormat F>
Tile widen(const Task& task, const Tile& from, const Tile& next, int begin, int end) {
  constexpr int kStep = F == KVFormat::BF16 ? 2 : 1, kBytes = F == KVFormat::I8 ? 16 : 64;
  const size_t dim = size_t(task.dim);
  Tile wide = from;
  for (int i = begin; i < end; i++) {
    float* k = task.wide_k + i * kChunk * dim;
    float* v = task.wide_v + i * kChunk * dim;
    wide.k[i] = (const uint8_t*)k;
    wide.v[i] = (const uint8_t*)v;
    const size_t columns = dim / 16;
    for (size_t row = 0, j = 0; row < kChunk; row += kStep) {
      for (size_t column = 0; column < columns; column++, j++) {
        const uint8_t *from_k = from.k[i] + j * kBytes, *from_v = from.v[i] + j * kBytes;
        if (kBytes == 64 || j % 4 == 0) {
          __builtin_prefetch(next.k[i] + j * kBytes);
          __builtin_prefetch(next.v[i] + j * kBytes);
        }
        if constexpr (F == KVFormat::BF16) {
          const i32x16 two_k = iload(from_k), two_v = iload(from_v);
          store(k + j * 32, bf16_low(two_k));
          store(k + j * 32 + 16, bf16_high(two_k));
          store(v + row * dim + column * 16, bf16_low(two_v));
          store(v + (row + 1) * dim + column * 16, bf16_high(two_v));
        } else {
          store(k + j * 16, load_i8((const int8_t*)from_k));
          store(v + j * 16, load_i8((const int8_t*)from_v));
        }
      }
    }
  }
  return wide;
}

template <KVFormat F>
void compute_scores(const Task& task, const Tile& tile, const Tile& next, int index) {
  for (int b = 0; b < task.row_blocks; b++) {
    const int first = task.first_row(b), rows = task.first_row(b + 1) - first;
    const int begin = in_tile(task.state.begin[first], index), end = in_tile(task.state.end[first + rows - 1], index);
    if (begin >= end) continue;
    const float* q = task.q + size_t(first) * task.head_dim;
    float* scores = task.scores + size_t(first) * kTile;
    const Tile& fetch = b == 0 ? next : tile;
    over_columns(rows, begin / kChunk, (end + kChunk - 1) / kChunk, [&]<int R, int C>(int c) {
      score<F, R, C>(q, tile.k + c, fetch.k + c, task.head_dim, scores + c * kChunk);
    });
  }
}

// The softmax is taken to base 2: score * score_factor is the exponent.
GQA_INLINE float score_factor(const AttentionParams& p) {
  return (p.soft_cap > 0.0f ? p.soft_cap : p.scale) * 1.44269504f;
}

// What score_factor leaves to do of one row's scores, in place: int8 scales, soft cap, -inf for tokens outside
// [begin, end). Returns their maximum.
GQA_INLINE float finish_scores(const Task& task, const f32x16* k_scale, float* scores, int begin, int end) {
  const float cap = task.p.soft_cap;
  const bool masked = begin > 0 || end < kTile;
  f32x16 s[kTileChunks];
  for (int i = 0; i < kTileChunks; i++) s[i] = load(scores + i * kChunk);
  if (k_scale || cap > 0.0f || masked) {
    for (int i = 0; i < kTileChunks; i++) {
      if (k_scale) s[i] = s[i] * k_scale[i];
      if (cap > 0.0f) s[i] = tanh(s[i] * set1(task.p.scale / cap));
      if (masked) {
        const i32x16 token = iadd(iota(), iset1(i * kChunk));
        s[i] = select(iless(token, iset1(end)), s[i], set1(-kInfinity));
        s[i] = select(iless(token, iset1(begin)), set1(-kInfinity), s[i]);
      }
      store(scores + i * kChunk, s[i]);
    }
  }
  return maximum(max(max(s[0], s[1]), max(s[2], s[3])));
}

// scores -> p = 2^(exponent - running maximum), in place, and each row's maximum, sum and factor. With int8, p is
// then multiplied with the scale of V.
void update_softmax(const Task& task, const Tile& tile, int index) {
  const RowState& state = task.state;
  const bool scaled = task.cache.format == KVFormat::I8;
  const f32x16 to_exponent = set1(score_factor(task.p));
  f32x16 k_scale[kTileChunks], v_scale[kTileChunks];
  for (int i = 0; i < kTileChunks; i++) {
    k_scale[i] = scaled ? load(tile.k_scale[i]) : zero();
    v_scale[i] = scaled ? load(tile.v_scale[i]) : zero();
  }
  for (int r = 0; r < task.rows; r++) {
    const int begin = in_tile(state.begin[r], index), end = in_tile(state.end[r], index);
    state.factor[r] = -kInfinity;
    if (begin >= end) continue;
    state.factor[r] = finish_scores(task, scaled ? k_scale : nullptr, task.scores + size_t(r) * kTile, begin, end);
  }
  for (int r = 0; r < task.rows; r += 16) {
    const f32x16 before = load(state.max + r), now = max(before, load(state.factor + r) * to_exponent);
    store(state.factor + r, exp2_softmax(before - now));
    store(state.max + r, now);
  }
  for (int r = 0; r < task.rows; r++) {
    if (in_tile(state.begin[r], index) >= in_tile(state.end[r], index)) continue;
    float* scores = task.scores + size_t(r) * kTile;
    const f32x16 offset = set1(-state.max[r]);
    f32x16 p[kTileChunks];
    for (int i = 0; i < kTileChunks; i++) {
      p[i] = exp2_softmax(fma(load(scores + i * kChunk), to_exponent, offset));
      store(scores + i * kChunk, scaled ? p[i] * v_scale[i] : p[i]);
    }
    state.sum[r] = __builtin_fmaf(state.sum[r], state.factor[r], sum((p[0] + p[1]) + (p[2] + p[3])));
  }
}

// values = values * factor + p V over tokens [begin, end) of the tile, for rows [first, first + rows).
template <KVFormat F>
void add_tokens(const Task& task, const Tile& tile, const Tile& fetch, int first, int rows, int begin, int end) {
  if (begin >= end) return;
  float* factor = task.state.factor + first;
  over_columns(rows, 0, task.dim / 16, [&]<int R, int C>(int c) {
    const ValueRange range = {tile.v, fetch.v, begin, end, c, size_t(task.dim)};
    add_values<F, R, C>(task.scores + size_t(first) * kTile, range, factor,
                        task.values + size_t(first) * task.dim + c * 16);
  });
  for (int r = 0; r < rows; r++) factor[r] = 1.0f;
}

// Rows see different tokens in a tile that the diagonal or the window's edge crosses: what all rows of a block
// see is added together, the rest row by row before and after it, so that each row adds its own tokens in order.
template <KVFormat F>
void compute_values(const Task& task, const Tile& tile, const Tile& next, int index) {
  const RowState& state = task.state;
  auto begin_of = [&](int r) { return in_tile(state.begin[r], index); };
  auto end_of = [&](int r) { return in_tile(state.end[r], index); };
  for (int b = 0; b < task.row_blocks; b++) {
    const int first = task.first_row(b), last = task.first_row(b + 1) - 1;
    int begin = begin_of(last), end = end_of(first);
    const bool ragged = begin_of(first) < begin || end < end_of(last);
    if (begin >= end) begin = end = begin_of(last);
    for (int r = first; ragged && r <= last; r++) {
      add_tokens<F>(task, tile, tile, r, 1, begin_of(r), smaller(begin, end_of(r)));
    }
    add_tokens<F>(task, tile, b == 0 ? next : tile, first, last - first + 1, begin, end);
    for (int r = first; ragged && r <= last; r++) {
      add_tokens<F>(task, tile, tile, r, 1, larger(end, begin_of(r)), end_of(r));
    }
  }
}

template <KVFormat F>
void compute_tile(const Task& task, const Tile& tile, const Tile& next, int index) {
  if constexpr (F != KVFormat::F32) {
    if (task.row_blocks > 2) {
      const int begin = in_tile(task.begin, index), end = in_tile(task.end, index);
      const Tile wide = widen<F>(task, tile, next, begin / kChunk, (end + kChunk - 1) / kChunk);
      compute_scores<KVFormat::F32>(task, wide, wide, index);
      update_softmax(task, wide, index);
      return compute_values<KVFormat::F32>(task, wide, wide, index);
    }
  }
  compute_scores<F>(task, tile, next, index);
  update_softmax(task, tile, index);
  compute_values<F>(task, tile, next, index);
}

// --- splits ---

// Two parts of a softmax become one: how to weigh what was merged so far and what is added.
struct Weights {
  f32x16 max, merged, added;
};

GQA_INLINE Weights weigh(f32x16 merged_max, f32x16 added_max) {
  const f32x16 now = max(merged_max, added_max);
  return {now, exp2_softmax(merged_max - now), exp2_softmax(added_max - now)};
}

GQA_INLINE f32x16 weighted(Weights w, f32x16 merged, f32x16 added) { return fma(added, w.added, merged * w.merged); }

void begin_split(const Task& task, size_t padded_rows) {
  for (size_t r = 0; r < padded_rows; r += 16) {
    store(task.state.max + r, set1(kLowest));
    store(task.state.sum + r, zero());
  }
  memset(task.values, 0, size_t(task.rows) * task.dim * sizeof(float));
}

// The split's result joins those of the splits before it. A row that saw nothing stays as it is.
void merge_split(const Task& task) {
  const RowState& state = task.state;
  for (int first = 0; first < task.rows; first += 16) {
    const f32x16 added = load(state.sum + first);
    const Weights w = weigh(load(state.merged_max + first), load(state.max + first));
    float merged_weight[16], added_weight[16];
    store(merged_weight, w.merged);
    store(added_weight, w.added);
    store(state.merged_sum + first, weighted(w, load(state.merged_sum + first), added));
    store(state.merged_max + first, w.max);
    for (int i = 0; i < smaller(16, task.rows - first); i++) {
      if (state.sum[first + i] == 0.0f) continue;
      const Weights row = {w.max, set1(merged_weight[i]), set1(added_weight[i])};
      float* merged = task.merged + size_t(first + i) * task.dim;
      const float* values = task.values + size_t(first + i) * task.dim;
      for (int d = 0; d < task.dim; d += 16) store(merged + d, weighted(row, load(merged + d), load(values + d)));
    }
  }
}

void store_partials(const Task& task, const AttentionItem& item, int split, float* partials) {
  const PartialLayout layout = partial_layout(task.p);
  const int group = task.group;
  for (int t = 0; t < item.count; t++) {
    const size_t number = size_t(item.partial) + size_t(t) * item.partial_stride + (split - item.split_begin);
    float* partial = partials + number * layout.floats();
    const size_t row = size_t(t) * group;
    memcpy(partial, task.values + row * task.dim, size_t(group) * task.dim * sizeof(float));
    memcpy(partial + layout.maxima(), task.state.max + row, size_t(group) * sizeof(float));
    memcpy(partial + layout.sums(), task.state.sum + row, size_t(group) * sizeof(float));
  }
}

GQA_INLINE void store_row(f32x16 x, float* out, int d, int head_dim) {
  if (d + 16 <= head_dim) {
    store(out + d, x);
  } else {
    store_first(out + d, x, head_dim - d);
  }
}

void store_out(const Task& task, const AttentionItem& item, float* out) {
  for (int r = 0; r < task.rows; r++) {
    const size_t token = size_t(item.token) + r / task.group, head = size_t(item.kv_head) * task.group + r % task.group;
    float* to = out + (token * task.p.num_heads + head) * task.head_dim;
    const f32x16 total = set1(task.state.merged_sum[r]);
    for (int d = 0; d < task.head_dim; d += 16) {
      store_row(load(task.merged + size_t(r) * task.dim + d) / total, to, d, task.head_dim);
    }
  }
}

template <KVFormat F>
void compute_splits(const Task& task, const AttentionItem& item, size_t padded_rows, float* partials) {
  const int first = larger(task.begin / kTile, item.split_begin * (kSplit / kTile));
  const int last = smaller((task.end - 1) / kTile, item.split_end * (kSplit / kTile) - 1);
  Tile tile = locate(task, first);
  for (int split = item.split_begin; split < item.split_end; split++) {
    begin_split(task, padded_rows);
    const int begin = larger(first, split * (kSplit / kTile)), end = smaller(last, (split + 1) * (kSplit / kTile) - 1);
    for (int index = begin; index <= end; index++) {
      const Tile next = locate(task, smaller(index + 1, last));
      compute_tile<F>(task, tile, next, index);
      tile = next;
    }
    if (item.partial < 0) {
      merge_split(task);
    } else {
      store_partials(task, item, split, partials);
    }
  }
}

// --- items ---

// Scratch is cut into its parts, rows get their visible positions, and q is laid out block by block of rows.
GQA_INLINE void set_up(Task& task, const AttentionItem& item, int position, const float* q, float* scratch) {
  const ScratchLayout layout = scratch_layout(task.p);
  scratch += (64 - uintptr_t(scratch) % 64) % 64 / sizeof(float);
  task.q = scratch + layout.q();
  task.scores = scratch + layout.scores();
  task.values = scratch + layout.values();
  task.merged = scratch + layout.merged();
  task.wide_k = scratch + layout.k();
  task.wide_v = scratch + layout.v();
  const size_t n = layout.padded_rows();
  float* state = scratch + layout.state();
  memset(state, 0, ScratchLayout::kRowStates * n * sizeof(float));
  task.state = {state,         state + n,                state + 2 * n,           state + 3 * n,
                state + 4 * n, (int32_t*)(state + 5 * n), (int32_t*)(state + 6 * n)};
  memset(task.merged, 0, size_t(task.rows) * task.dim * sizeof(float));
  for (int b = 0; b < task.row_blocks; b++) {
    const int first = task.first_row(b), rows = task.first_row(b + 1) - first;
    float* to = task.q + size_t(first) * task.head_dim;
    for (int r = 0; r < rows; r++) {
      const int token = (first + r) / task.group;
      task.state.merged_max[first + r] = kLowest;
      task.state.begin[first + r] = first_visible(task.p, position + token);
      task.state.end[first + r] = position + token + 1;
      const size_t head = size_t(item.kv_head) * task.group + (first + r) % task.group;
      const float* from = q + (size_t(item.token + token) * task.p.num_heads + head) * task.head_dim;
      for (int d = 0; d < task.head_dim; d++) to[d * rows + r] = from[d];
    }
  }
}

void attend(const AttentionParams& p, const AttentionBatch& batch, const KVLayer& cache, const float* q,
            const AttentionItem& item, float* partials, float* out, float* scratch) {
  const int rows = item.count * p.group_size();
  const int end = batch.context_len[item.request];
  const int position = end - batch.query_start[item.request + 1] + item.token;  // of the item's first token
  Task task = {p, cache};
  task.blocks = batch.block_tables + size_t(item.request) * batch.max_blocks;
  task.kv_head = item.kv_head;
  task.group = p.group_size();
  task.head_dim = p.head_dim;
  task.dim = cache.dim;
  task.rows = rows;
  task.row_blocks = (rows + kMaxRows - 1) / kMaxRows;
  task.begin = first_visible(p, position);
  task.end = position + item.count;
  set_up(task, item, position, q, scratch);
  const size_t padded_rows = size_t(rows + 15) / 16 * 16;
  switch (cache.format) {
    case KVFormat::F32: compute_splits<KVFormat::F32>(task, item, padded_rows, partials); break;
    case KVFormat::BF16: compute_splits<KVFormat::BF16>(task, item, padded_rows, partials); break;
    case KVFormat::I8: compute_splits<KVFormat::I8>(task, item, padded_rows, partials); break;
  }
  if (item.partial < 0) store_out(task, item, out);
}

// Vectors of one head that merge() holds at a time.
constexpr int kMergeVectors = 8;

// Merges the splits of one head, dimensions [16 * column, 16 * (column + count)), by merge_split's operations.
GQA_INLINE void merge_columns(const float* partials, const PartialLayout& layout, int splits, int head, int column,
                              int count, int head_dim, float* out) {
  f32x16 merged_max = set1(kLowest), merged_sum = zero(), merged[kMergeVectors];
  for (int i = 0; i < count; i++) merged[i] = zero();
  for (int s = 0; s < splits; s++) {
    const float* partial = partials + s * layout.floats();
    const float split_sum = partial[layout.sums() + head];
    if (split_sum == 0.0f) continue;
    const Weights w = weigh(merged_max, set1(partial[layout.maxima() + head]));
    merged_max = w.max;
    merged_sum = weighted(w, merged_sum, set1(split_sum));
    const float* values = partial + head * layout.dim + column * 16;
    for (int i = 0; i < count; i++) merged[i] = weighted(w, merged[i], load(values + i * 16));
  }
  for (int i = 0; i < count; i++) store_row(merged[i] / merged_sum, out, (column + i) * 16, head_dim);
}

void merge(const AttentionParams& p, const AttentionBatch&, const AttentionMerge& merge, const float* partials,
           float* out) {
  const PartialLayout layout = partial_layout(p);
  const int columns = int(layout.dim / 16);
  partials += size_t(merge.first) * layout.floats();
  const size_t first_head = size_t(merge.token) * p.num_heads + size_t(merge.kv_head) * p.group_size();
  for (int head = 0; head < p.group_size(); head++) {
    float* to = out + (first_head + head) * p.head_dim;
    for (int column = 0; column < columns; column += kMergeVectors) {
      const int count = smaller(kMergeVectors, columns - column);
      merge_columns(partials, layout, merge.count, head, column, count, p.head_dim, to);
    }
  }
}

}  // namespace
}  // namespace gqa
