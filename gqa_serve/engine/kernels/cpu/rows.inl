// The rest of a step, one row at a time: norms, additions, activations, rotation and the write to the cache.
//
// Owns the order in which a row is reduced: 16 partial sums, lane i over elements i, i + 16, ..., then the tree of
// sum(). Knows nothing of batches or threads. Cache layouts are in formats.h.
//
// Invariant: rotate_and_write touches the bytes of its own token and no others, padding included, so that
// adjacent tokens can be written by different threads.
#pragma once

#include "kernels.h"
#include "math.inl"

namespace gqa {
namespace {

// Calls f(first, lanes) for each 16 of n elements; only the last call may have fewer than 16 lanes.
template <class F>
GQA_INLINE void each(int n, F f) {
  int i = 0;
  for (; i + 16 <= n; i += 16) f(i, 16);
  if (i < n) f(i, n - i);
}

GQA_INLINE f32x16 load_lanes(const float* p, int lanes) { return lanes == 16 ? load(p) : load_first(p, lanes); }

GQA_INLINE void store_lanes(float* p, f32x16 x, int lanes) {
  if (lanes == 16) {
    store(p, x);
  } else {
    store_first(p, x, lanes);
  }
}

// 1 / sqrt(mean(x^2) + eps)
GQA_INLINE float inverse_rms(const float* x, int n, float eps) {
  f32x16 squares = zero();
  each(n, [&](int i, int lanes) {
    f32x16 v = load_lanes(x + i, lanes);
    squares = fma(v, v, squares);
  });
  return 1.0f / __builtin_sqrtf(sum(squares) / float(n) + eps);
}

GQA_INLINE void scale_by(const float* x, float inverse, const float* weight, float* out, int n) {
  each(n, [&](int i, int lanes) {
    f32x16 v = load_lanes(x + i, lanes) * set1(inverse) * load_lanes(weight + i, lanes);
    store_lanes(out + i, v, lanes);
  });
}

void rms_norm(const float* x, const float* weight, float* out, int n, float eps) {
  scale_by(x, inverse_rms(x, n, eps), weight, out, n);
}

void add(const float* x, float* residual, int n, float scale) {
  each(n, [&](int i, int lanes) {
    f32x16 v = fma(load_lanes(x + i, lanes), set1(scale), load_lanes(residual + i, lanes));
    store_lanes(residual + i, v, lanes);
  });
}

template <Activation kind>
GQA_INLINE void gated_by(const float* gate, const float* up, float* out, int n) {
  each(n, [&](int i, int lanes) {
    f32x16 g = load_lanes(gate + i, lanes);
    f32x16 a = kind == Activation::Silu ? silu(g) : kind == Activation::Gelu ? gelu(g) : gelu_tanh(g);
    store_lanes(out + i, a * load_lanes(up + i, lanes), lanes);
  });
}

void gated(const float* gate, const float* up, float* out, int n, Activation activation) {
  switch (activation) {
    case Activation::Silu: return gated_by<Activation::Silu>(gate, up, out, n);
    case Activation::Gelu: return gated_by<Activation::Gelu>(gate, up, out, n);
    case Activation::GeluTanh: return gated_by<Activation::GeluTanh>(gate, up, out, n);
  }
}

void scale(float* x, int n, float scale) {
  each(n, [&](int i, int lanes) { store_lanes(x + i, load_lanes(x + i, lanes) * set1(scale), lanes); });
}

void scale_and_cap(float* x, int n, float factor, float cap) {
  if (!(cap > 0.0f)) return scale(x, n, factor);
  const float before = factor / cap;
  each(n, [&](int i, int lanes) {
    store_lanes(x + i, tanh(load_lanes(x + i, lanes) * set1(before)) * set1(cap), lanes);
  });
}

int argmax(const float* x, int n) {
  f32x16 best = set1(-kInfinity), best_index = zero(), not_finite = zero();
  i32x16 index = iota();
  each(n, [&](int i, int lanes) {
    f32x16 v = load_lanes(x + i, lanes);
    not_finite = not_finite + (v - v);  // 0, or NaN from then on
    if (lanes < 16) v = select(iless(iota(), iset1(lanes)), v, set1(-kInfinity));
    mask16 better = less(best, v);
    best = select(better, v, best);
    best_index = select(better, as_float(index), best_index);
    index = iadd(index, iset1(16));
  });
  if (!(sum(not_finite) == 0.0f)) return -1;
  float values[16];
  int32_t indices[16];
  store(values, best);
  istore(indices, as_int(best_index));
  int winner = 0;
  for (int i = 1; i < 16; i++) {
    bool wins = values[i] > values[winner] || (values[i] == values[winner] && indices[i] < indices[winner]);
    if (wins) winner = i;
  }
  return n > 0 ? indices[winner] : -1;
}

// One head, in place: x1' = x1 cos - x2 sin, x2' = x2 cos + x1 sin for the halves of the first 2 * half dimensions.
GQA_INLINE void rotate(float* x, const float* cos, const float* sin, int half) {
  each(half, [&](int i, int lanes) {
    f32x16 c = load_lanes(cos + i, lanes), s = load_lanes(sin + i, lanes);
    f32x16 x1 = load_lanes(x + i, lanes), x2 = load_lanes(x + half + i, lanes);
    store_lanes(x + i, fma(x1, c, x2 * (zero() - s)), lanes);
    store_lanes(x + half + i, fma(x2, c, x1 * s), lanes);
  });
}

// One head of q or k: normed, rotated, into `out`. `inverse`: 1/rms of the whole projection, for QKNorm::Full.
GQA_INLINE void norm_and_rotate(const HeadParams& p, const float* x, const float* norm, int head, float inverse,
                                const float* cos, const float* sin, float* out) {
  switch (p.qk_norm) {
    case QKNorm::None: memcpy(out, x, size_t(p.head_dim) * sizeof(float)); break;
    case QKNorm::Head: scale_by(x, inverse_rms(x, p.head_dim, p.eps), norm, out, p.head_dim); break;
    case QKNorm::Full: scale_by(x, inverse, norm + size_t(head) * p.head_dim, out, p.head_dim); break;
  }
  rotate(out, cos, sin, p.rotary_dim / 2);
}

// Symmetric 8 bits: x = scale * q with |q| <= 127. Returns the scale; NaN where a value is not finite, so that
// what reads the token shows it. Heads too small for a normal scale are zero.
GQA_INLINE float quantize_head(const float* x, int n, int8_t* q) {
  f32x16 largest = zero(), not_finite = zero();
  each(n, [&](int i, int lanes) {
    f32x16 v = load_lanes(x + i, lanes);
    largest = max(largest, abs(v));
    not_finite = not_finite + (v - v);
  });
  const bool finite = sum(not_finite) == 0.0f;
  const float amax = maximum(largest);
  if (!finite || amax < 1e-34f) {
    memset(q, 0, size_t(n));
    return finite ? 0.0f : __builtin_nanf("");
  }
  const float scale = amax / 127.0f;
  each(n, [&](int i, int lanes) {
    f32x16 v = load_lanes(x + i, lanes) / set1(scale);
    int8_t bytes[16];
    store_i8(bytes, to_int(max(min(v, set1(127.0f)), set1(-127.0f))));
    memcpy(q + i, bytes, size_t(lanes));
  });
  return scale;
}

float row_max(const float* x, int n) {
  f32x16 best = set1(-kInfinity);
  for (int i = 0; i < n; i += 16) {
    f32x16 v = n - i >= 16 ? load(x + i) : select(iless(iota(), iset1(n - i)), load_first(x + i, n - i), best);
    best = max(v, best);
  }
  return maximum(best);
}

void exponentials(const float* x, int n, float best, float temperature, float floor, float* out, float* sums) {
  for (int block = 0; block < n; block += kSumBlock) {
    f32x16 total = zero();
    for (int i = block; i < block + kSumBlock && i < n; i += 16) {
      const int left = n - i;
      f32x16 v = left >= 16 ? load(x + i) : load_first(x + i, left);
      f32x16 e = exp((v - set1(best)) / set1(temperature));
      e = select(less(v, set1(floor)), zero(), e);
      if (left >= 16) {
        store(out + i, e);
      } else {
        e = select(iless(iota(), iset1(left)), e, zero());
        store_first(out + i, e, left);
      }
      total = total + e;
    }
    sums[block / kSumBlock] = sum(total);
  }
}

// Where a token's KV head lies in the cache.
struct TokenPlace {
  size_t head;  // block * num_kv_heads + KV head
  int offset;   // of the token in its block
};

GQA_INLINE void write_f32(const KVLayer& c, TokenPlace at, const float* k, const float* v) {
  const size_t base = at.head * c.head_bytes();
  float* to_k = (float*)(c.k + base) + size_t(at.offset / 16) * c.dim * 16 + at.offset % 16;
  for (int d = 0; d < c.head_dim; d++) to_k[size_t(d) * 16] = k[d];
  memcpy((float*)(c.v + base) + size_t(at.offset) * c.dim, v, size_t(c.head_dim) * sizeof(float));
}

GQA_INLINE void write_bf16(const KVLayer& c, TokenPlace at, const float* k, const float* v) {
  const size_t base = at.head * c.head_bytes();
  uint16_t* to_k = (uint16_t*)(c.k + base) + size_t(at.offset / 16) * c.dim * 16 + at.offset % 16 * 2;
  for (int d = 0; d < c.head_dim; d++) to_k[size_t(d / 2) * 32 + d % 2] = to_bf16(k[d]);
  uint16_t* to_v = (uint16_t*)(c.v + base) + size_t(at.offset / 2) * c.dim * 2 + at.offset % 2;
  for (int d = 0; d < c.head_dim; d++) to_v[size_t(d) * 2] = to_bf16(v[d]);
}

// `bytes`: room for head_dim of them.
GQA_INLINE void write_i8(const KVLayer& c, TokenPlace at, const float* k, const float* v, int8_t* bytes) {
  const size_t base = at.head * c.head_bytes(), token = at.head * c.block_size + at.offset;
  c.k_scale[token] = quantize_head(k, c.head_dim, bytes);
  int8_t* to_k = (int8_t*)(c.k + base) + size_t(at.offset / 16) * c.dim * 16 + at.offset % 16;
  for (int d = 0; d < c.head_dim; d++) to_k[size_t(d) * 16] = bytes[d];
  c.v_scale[token] = quantize_head(v, c.head_dim, (int8_t*)(c.v + base) + size_t(at.offset) * c.dim);
}

void rotate_and_write(const HeadParams& p, const float* qkv, const float* cos, const float* sin, float* q_out,
                      const KVLayer& cache, int64_t slot) {
  const int q_size = p.num_heads * p.head_dim, kv_size = p.num_kv_heads * p.head_dim;
  const float *k_in = qkv + q_size, *v_in = k_in + kv_size;
  const bool full = p.qk_norm == QKNorm::Full;
  const float q_inverse = full ? inverse_rms(qkv, q_size, p.eps) : 1.0f;
  const float k_inverse = full ? inverse_rms(k_in, kv_size, p.eps) : 1.0f;
  for (int h = 0; h < p.num_heads; h++) {
    const size_t at = size_t(h) * p.head_dim;
    norm_and_rotate(p, qkv + at, p.q_norm, h, q_inverse, cos, sin, q_out + at);
  }
  float* k = (float*)__builtin_alloca(size_t(p.head_dim) * sizeof(float));
  int8_t* bytes = (int8_t*)__builtin_alloca(size_t(p.head_dim));
  for (int h = 0; h < p.num_kv_heads; h++) {
    const float* v = v_in + size_t(h) * p.head_dim;
    norm_and_rotate(p, k_in + size_t(h) * p.head_dim, p.k_norm, h, k_inverse, cos, sin, k);
    const TokenPlace at = {size_t(slot / cache.block_size) * cache.num_kv_heads + h, int(slot % cache.block_size)};
    switch (cache.format) {
      case KVFormat::F32: write_f32(cache, at, k, v); break;
      case KVFormat::BF16: write_bf16(cache, at, k, v); break;
      case KVFormat::I8: write_i8(cache, at, k, v, bytes); break;
    }
  }
}

}  // namespace
}  // namespace gqa
