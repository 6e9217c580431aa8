// One logical vector of 16 lanes on every instruction set, so that each kernel is written once.
//
//     AVX-512   one zmm          AVX2   two ymm          NEON   four q registers
//
// Owns lane arithmetic. Every operation here gives the same bits on every instruction set: multiply-add is
// always fused, horizontal sums always halve (lane i + lane i+8, then i+4, i+2, i+1), and integer dot products
// are exact. Compile with -ffp-contract=off: what is fused is written as fma().
//
// Included only by kernels.cpp, which is compiled once per instruction set. Everything sits in an anonymous
// namespace, and this file and the kernels use no standard library templates: an out-of-line copy of one could
// be kept by the linker for code that must run on older CPUs.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#else
#error "kernels.cpp needs AVX2, AVX-512 or aarch64 flags"
#endif

#define GQA_INLINE inline __attribute__((always_inline))

namespace gqa {
namespace {

// clang-format off
#if defined(__AVX512F__)

struct f32x16 { __m512 v; };
struct i32x16 { __m512i v; };
struct mask16 { __mmask16 v; };

GQA_INLINE f32x16 zero()                                   { return {_mm512_setzero_ps()}; }
GQA_INLINE f32x16 set1(float x)                            { return {_mm512_set1_ps(x)}; }
GQA_INLINE f32x16 load(const float* p)                     { return {_mm512_loadu_ps(p)}; }
GQA_INLINE void store(float* p, f32x16 a)                  { _mm512_storeu_ps(p, a.v); }
GQA_INLINE f32x16 operator+(f32x16 a, f32x16 b)            { return {_mm512_add_ps(a.v, b.v)}; }
GQA_INLINE f32x16 operator-(f32x16 a, f32x16 b)            { return {_mm512_sub_ps(a.v, b.v)}; }
GQA_INLINE f32x16 operator*(f32x16 a, f32x16 b)            { return {_mm512_mul_ps(a.v, b.v)}; }
GQA_INLINE f32x16 operator/(f32x16 a, f32x16 b)            { return {_mm512_div_ps(a.v, b.v)}; }
GQA_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c)        { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
GQA_INLINE f32x16 max(f32x16 a, f32x16 b)                  { return {_mm512_max_ps(a.v, b.v)}; }
GQA_INLINE f32x16 min(f32x16 a, f32x16 b)                  { return {_mm512_min_ps(a.v, b.v)}; }
GQA_INLINE f32x16 abs(f32x16 a)                            { return {_mm512_abs_ps(a.v)}; }
GQA_INLINE mask16 less(f32x16 a, f32x16 b)                 { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
GQA_INLINE f32x16 select(mask16 m, f32x16 yes, f32x16 no)  { return {_mm512_mask_blend_ps(m.v, no.v, yes.v)}; }
GQA_INLINE uint32_t bits(mask16 m)   /* one per lane */    { return m.v; }
GQA_INLINE i32x16 to_int(f32x16 a)   /* nearest, ties to even */ { return {_mm512_cvtps_epi32(a.v)}; }
GQA_INLINE f32x16 to_float(i32x16 a)                       { return {_mm512_cvtepi32_ps(a.v)}; }
GQA_INLINE i32x16 as_int(f32x16 a)                         { return {_mm512_castps_si512(a.v)}; }
GQA_INLINE f32x16 as_float(i32x16 a)                       { return {_mm512_castsi512_ps(a.v)}; }
GQA_INLINE i32x16 izero()                                  { return {_mm512_setzero_si512()}; }
GQA_INLINE i32x16 iset1(int32_t x)                         { return {_mm512_set1_epi32(x)}; }
GQA_INLINE i32x16 iload(const void* p)   /* 64 bytes */    { return {_mm512_loadu_si512(p)}; }
GQA_INLINE void istore(void* p, i32x16 a)                  { _mm512_storeu_si512(p, a.v); }
GQA_INLINE i32x16 iadd(i32x16 a, i32x16 b)                 { return {_mm512_add_epi32(a.v, b.v)}; }
GQA_INLINE i32x16 isub(i32x16 a, i32x16 b)                 { return {_mm512_sub_epi32(a.v, b.v)}; }
GQA_INLINE i32x16 iand(i32x16 a, i32x16 b)                 { return {_mm512_and_si512(a.v, b.v)}; }
GQA_INLINE i32x16 ior(i32x16 a, i32x16 b)                  { return {_mm512_or_si512(a.v, b.v)}; }
template <int N> GQA_INLINE i32x16 shift_left(i32x16 a)    { return {_mm512_slli_epi32(a.v, N)}; }
template <int N> GQA_INLINE i32x16 shift_right(i32x16 a)   /* logical */ { return {_mm512_srli_epi32(a.v, N)}; }
GQA_INLINE i32x16 shift_right_by(i32x16 a, int n)          { return {_mm512_srl_epi32(a.v, _mm_cvtsi32_si128(n))}; }
GQA_INLINE i32x16 iota()                                   { return {_mm512_setr_epi32(0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15)}; }
GQA_INLINE mask16 iless(i32x16 a, i32x16 b)                { return {_mm512_cmplt_epi32_mask(a.v, b.v)}; }
GQA_INLINE f32x16 load_bf16(const uint16_t* p)  { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16))}; }
GQA_INLINE f32x16 load_f16(const uint16_t* p)   { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
GQA_INLINE f32x16 load_i8(const int8_t* p)      { return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))}; }
// acc[i] += sum over j < 4 of u8 w[4i+j] * s8 x[4i+j], exact in 32 bits.
#if defined(__AVX512VNNI__)
GQA_INLINE i32x16 dot4(i32x16 acc, i32x16 w, i32x16 x)     { return {_mm512_dpbusd_epi32(acc.v, w.v, x.v)}; }
#endif
GQA_INLINE float sum(f32x16 a) {
  __m256 h = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
}
GQA_INLINE float maximum(f32x16 a)                         { return _mm512_reduce_max_ps(a.v); }
GQA_INLINE f32x16 load_first(const float* p, int n)        { return {_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p)}; }
GQA_INLINE void store_first(float* p, f32x16 a, int n)     { _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), a.v); }
// 16 lanes narrowed to bytes (they must fit).
GQA_INLINE void store_i8(int8_t* p, i32x16 a)              { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(a.v)); }

#elif defined(__AVX2__)

struct f32x16 { __m256 a, b; };
struct i32x16 { __m256i a, b; };
struct mask16 { __m256 a, b; };

GQA_INLINE f32x16 zero()                                   { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
GQA_INLINE f32x16 set1(float x)                            { __m256 v = _mm256_set1_ps(x); return {v, v}; }
GQA_INLINE f32x16 load(const float* p)                     { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
GQA_INLINE void store(float* p, f32x16 x)                  { _mm256_storeu_ps(p, x.a); _mm256_storeu_ps(p + 8, x.b); }
GQA_INLINE f32x16 operator+(f32x16 x, f32x16 y)            { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
GQA_INLINE f32x16 operator-(f32x16 x, f32x16 y)            { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
GQA_INLINE f32x16 operator*(f32x16 x, f32x16 y)            { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
GQA_INLINE f32x16 operator/(f32x16 x, f32x16 y)            { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
GQA_INLINE f32x16 fma(f32x16 x, f32x16 y, f32x16 z)        { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
GQA_INLINE f32x16 max(f32x16 x, f32x16 y)                  { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
GQA_INLINE f32x16 min(f32x16 x, f32x16 y)                  { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
GQA_INLINE f32x16 abs(f32x16 x) { __m256 s = _mm256_set1_ps(-0.0f); return {_mm256_andnot_ps(s, x.a), _mm256_andnot_ps(s, x.b)}; }
GQA_INLINE mask16 less(f32x16 x, f32x16 y)                 { return {_mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ)}; }
GQA_INLINE f32x16 select(mask16 m, f32x16 yes, f32x16 no)  { return {_mm256_blendv_ps(no.a, yes.a, m.a), _mm256_blendv_ps(no.b, yes.b, m.b)}; }
GQA_INLINE uint32_t bits(mask16 m)                         { return uint32_t(_mm256_movemask_ps(m.a)) | uint32_t(_mm256_movemask_ps(m.b)) << 8; }
GQA_INLINE i32x16 to_int(f32x16 x)                         { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
GQA_INLINE f32x16 to_float(i32x16 x)                       { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
GQA_INLINE i32x16 as_int(f32x16 x)                         { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
GQA_INLINE f32x16 as_float(i32x16 x)                       { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
GQA_INLINE i32x16 izero()                                  { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
GQA_INLINE i32x16 iset1(int32_t x)                         { __m256i v = _mm256_set1_epi32(x); return {v, v}; }
GQA_INLINE i32x16 iload(const void* p)                     { return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)}; }
GQA_INLINE void istore(void* p, i32x16 x)                  { _mm256_storeu_si256((__m256i*)p, x.a); _mm256_storeu_si256((__m256i*)p + 1, x.b); }
GQA_INLINE i32x16 iadd(i32x16 x, i32x16 y)                 { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
GQA_INLINE i32x16 isub(i32x16 x, i32x16 y)                 { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
GQA_INLINE i32x16 iand(i32x16 x, i32x16 y)                 { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
GQA_INLINE i32x16 ior(i32x16 x, i32x16 y)                  { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
template <int N> GQA_INLINE i32x16 shift_left(i32x16 x)    { return {_mm256_slli_epi32(x.a, N), _mm256_slli_epi32(x.b, N)}; }
template <int N> GQA_INLINE i32x16 shift_right(i32x16 x)   { return {_mm256_srli_epi32(x.a, N), _mm256_srli_epi32(x.b, N)}; }
GQA_INLINE i32x16 shift_right_by(i32x16 x, int n)          { __m128i s = _mm_cvtsi32_si128(n); return {_mm256_srl_epi32(x.a, s), _mm256_srl_epi32(x.b, s)}; }
GQA_INLINE i32x16 iota()                                   { return {_mm256_setr_epi32(0,1,2,3,4,5,6,7), _mm256_setr_epi32(8,9,10,11,12,13,14,15)}; }
GQA_INLINE mask16 iless(i32x16 x, i32x16 y)                { return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(y.a, x.a)), _mm256_castsi256_ps(_mm256_cmpgt_epi32(y.b, x.b))}; }
GQA_INLINE __m256 bf16x8(const uint16_t* p)     { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16)); }
GQA_INLINE f32x16 load_bf16(const uint16_t* p)             { return {bf16x8(p), bf16x8(p + 8)}; }
GQA_INLINE f32x16 load_f16(const uint16_t* p)              { return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p + 1))}; }
GQA_INLINE __m256 i8x8(const int8_t* p)                    { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))); }
GQA_INLINE f32x16 load_i8(const int8_t* p)                 { return {i8x8(p), i8x8(p + 8)}; }
// u8 * s8 in 16 bits would saturate, so both are widened first: pairs are multiplied and added in 32 bits.
GQA_INLINE __m256i dot4x8(__m256i acc, __m256i w, __m256i x) {
  const __m256i low = _mm256_set1_epi16(0x00ff);
  __m256i w_even = _mm256_and_si256(w, low), w_odd = _mm256_srli_epi16(w, 8);
  __m256i x_even = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), x_odd = _mm256_srai_epi16(x, 8);
  acc = _mm256_add_epi32(acc, _mm256_madd_epi16(w_even, x_even));
  return _mm256_add_epi32(acc, _mm256_madd_epi16(w_odd, x_odd));
}
GQA_INLINE i32x16 dot4(i32x16 acc, i32x16 w, i32x16 x)     { return {dot4x8(acc.a, w.a, x.a), dot4x8(acc.b, w.b, x.b)}; }
GQA_INLINE float sum(f32x16 x) {
  __m256 h = _mm256_add_ps(x.a, x.b);
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
}
GQA_INLINE float maximum(f32x16 x) {
  __m256 h = _mm256_max_ps(x.a, x.b);
  __m128 q = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(q, _mm_shuffle_ps(q, q, 1)));
}
GQA_INLINE __m256i first8(int n)  { return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0,1,2,3,4,5,6,7)); }
GQA_INLINE f32x16 load_first(const float* p, int n)        { return {_mm256_maskload_ps(p, first8(n)), _mm256_maskload_ps(p + 8, first8(n - 8))}; }
GQA_INLINE void store_first(float* p, f32x16 x, int n)     { _mm256_maskstore_ps(p, first8(n), x.a); _mm256_maskstore_ps(p + 8, first8(n - 8), x.b); }
GQA_INLINE void store_i8(int8_t* p, i32x16 x) {
  __m256i w = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
  _mm_storeu_si128((__m128i*)p, _mm_packs_epi16(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1)));
}

#else  // aarch64 with dot product

struct f32x16 { float32x4_t v[4]; };
struct i32x16 { int32x4_t v[4]; };
struct mask16 { uint32x4_t v[4]; };
#define GQA_EACH(T, expression) T r; for (int i = 0; i < 4; i++) r.v[i] = (expression); return r

GQA_INLINE f32x16 zero()                                   { GQA_EACH(f32x16, vdupq_n_f32(0)); }
GQA_INLINE f32x16 set1(float x)                            { GQA_EACH(f32x16, vdupq_n_f32(x)); }
GQA_INLINE f32x16 load(const float* p)                     { GQA_EACH(f32x16, vld1q_f32(p + 4 * i)); }
GQA_INLINE void store(float* p, f32x16 a)                  { for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, a.v[i]); }
GQA_INLINE f32x16 operator+(f32x16 a, f32x16 b)            { GQA_EACH(f32x16, vaddq_f32(a.v[i], b.v[i])); }
GQA_INLINE f32x16 operator-(f32x16 a, f32x16 b)            { GQA_EACH(f32x16, vsubq_f32(a.v[i], b.v[i])); }
GQA_INLINE f32x16 operator*(f32x16 a, f32x16 b)            { GQA_EACH(f32x16, vmulq_f32(a.v[i], b.v[i])); }
GQA_INLINE f32x16 operator/(f32x16 a, f32x16 b)            { GQA_EACH(f32x16, vdivq_f32(a.v[i], b.v[i])); }
GQA_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c)        { GQA_EACH(f32x16, vfmaq_f32(c.v[i], a.v[i], b.v[i])); }
// As x86 does, the second operand where one is not a number; both are equal where neither is.
GQA_INLINE f32x16 max(f32x16 a, f32x16 b)                  { GQA_EACH(f32x16, vbslq_f32(vcgtq_f32(a.v[i], b.v[i]), a.v[i], b.v[i])); }
GQA_INLINE f32x16 min(f32x16 a, f32x16 b)                  { GQA_EACH(f32x16, vbslq_f32(vcltq_f32(a.v[i], b.v[i]), a.v[i], b.v[i])); }
GQA_INLINE f32x16 abs(f32x16 a)                            { GQA_EACH(f32x16, vabsq_f32(a.v[i])); }
GQA_INLINE mask16 less(f32x16 a, f32x16 b)                 { GQA_EACH(mask16, vcltq_f32(a.v[i], b.v[i])); }
GQA_INLINE f32x16 select(mask16 m, f32x16 yes, f32x16 no)  { GQA_EACH(f32x16, vbslq_f32(m.v[i], yes.v[i], no.v[i])); }
GQA_INLINE uint32_t bits(mask16 m) {
  static const uint32_t weights[4] = {1, 2, 4, 8};
  const uint32x4_t lanes = vld1q_u32(weights);
  uint32_t all = 0;
  for (int i = 0; i < 4; i++) all |= vaddvq_u32(vandq_u32(m.v[i], lanes)) << (4 * i);
  return all;
}
GQA_INLINE i32x16 to_int(f32x16 a)                         { GQA_EACH(i32x16, vcvtnq_s32_f32(a.v[i])); }
GQA_INLINE f32x16 to_float(i32x16 a)                       { GQA_EACH(f32x16, vcvtq_f32_s32(a.v[i])); }
GQA_INLINE i32x16 as_int(f32x16 a)                         { GQA_EACH(i32x16, vreinterpretq_s32_f32(a.v[i])); }
GQA_INLINE f32x16 as_float(i32x16 a)                       { GQA_EACH(f32x16, vreinterpretq_f32_s32(a.v[i])); }
GQA_INLINE i32x16 izero()                                  { GQA_EACH(i32x16, vdupq_n_s32(0)); }
GQA_INLINE i32x16 iset1(int32_t x)                         { GQA_EACH(i32x16, vdupq_n_s32(x)); }
GQA_INLINE i32x16 iload(const void* p)                     { GQA_EACH(i32x16, vreinterpretq_s32_u8(vld1q_u8((const uint8_t*)p + 16 * i))); }
GQA_INLINE void istore(void* p, i32x16 a)                  { for (int i = 0; i < 4; i++) vst1q_u8((uint8_t*)p + 16 * i, vreinterpretq_u8_s32(a.v[i])); }
GQA_INLINE i32x16 iadd(i32x16 a, i32x16 b)                 { GQA_EACH(i32x16, vaddq_s32(a.v[i], b.v[i])); }
GQA_INLINE i32x16 isub(i32x16 a, i32x16 b)                 { GQA_EACH(i32x16, vsubq_s32(a.v[i], b.v[i])); }
GQA_INLINE i32x16 iand(i32x16 a, i32x16 b)                 { GQA_EACH(i32x16, vandq_s32(a.v[i], b.v[i])); }
GQA_INLINE i32x16 ior(i32x16 a, i32x16 b)                  { GQA_EACH(i32x16, vorrq_s32(a.v[i], b.v[i])); }
template <int N> GQA_INLINE i32x16 shift_left(i32x16 a)    { GQA_EACH(i32x16, vshlq_n_s32(a.v[i], N)); }
template <int N> GQA_INLINE i32x16 shift_right(i32x16 a)   { GQA_EACH(i32x16, vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(a.v[i]), N))); }
GQA_INLINE i32x16 shift_right_by(i32x16 a, int n)          { GQA_EACH(i32x16, vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(a.v[i]), vdupq_n_s32(-n)))); }
GQA_INLINE i32x16 iota()                                   { static const int32_t n[16] = {0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15}; return iload(n); }
GQA_INLINE mask16 iless(i32x16 a, i32x16 b)                { GQA_EACH(mask16, vcltq_s32(a.v[i], b.v[i])); }
GQA_INLINE f32x16 load_bf16(const uint16_t* p)             { GQA_EACH(f32x16, vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16))); }
GQA_INLINE f32x16 load_f16(const uint16_t* p)              { GQA_EACH(f32x16, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i)))); }
GQA_INLINE f32x16 load_i8(const int8_t* p) {
  int8x16_t b = vld1q_s8(p);
  int16x8_t low = vmovl_s8(vget_low_s8(b)), high = vmovl_s8(vget_high_s8(b));
  return {{vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(low))),
           vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(high)))}};
}
// sdot is signed by signed: (w - 128) * x + 128 * sum(x).
GQA_INLINE i32x16 dot4(i32x16 acc, i32x16 w, i32x16 x) {
  const int8x16_t flip = vdupq_n_s8(-128), ones = vdupq_n_s8(1);
  for (int i = 0; i < 4; i++) {
    int8x16_t s = veorq_s8(vreinterpretq_s8_s32(w.v[i]), flip), t = vreinterpretq_s8_s32(x.v[i]);
    int32x4_t total = vdotq_s32(vdupq_n_s32(0), ones, t);
    acc.v[i] = vaddq_s32(vdotq_s32(acc.v[i], s, t), vshlq_n_s32(total, 7));
  }
  return acc;
}
GQA_INLINE float sum(f32x16 a) {
  float32x4_t q = vaddq_f32(vaddq_f32(a.v[0], a.v[2]), vaddq_f32(a.v[1], a.v[3]));
  float32x2_t d = vadd_f32(vget_low_f32(q), vget_high_f32(q));
  return vget_lane_f32(d, 0) + vget_lane_f32(d, 1);
}
GQA_INLINE float maximum(f32x16 a)                         { return vmaxvq_f32(vmaxq_f32(vmaxq_f32(a.v[0], a.v[1]), vmaxq_f32(a.v[2], a.v[3]))); }
GQA_INLINE f32x16 load_first(const float* p, int n)        { float t[16] = {}; for (int i = 0; i < n && i < 16; i++) t[i] = p[i]; return load(t); }
GQA_INLINE void store_first(float* p, f32x16 a, int n)     { float t[16]; store(t, a); for (int i = 0; i < n && i < 16; i++) p[i] = t[i]; }
GQA_INLINE void store_i8(int8_t* p, i32x16 a) {
  int16x8_t low = vcombine_s16(vmovn_s32(a.v[0]), vmovn_s32(a.v[1])), high = vcombine_s16(vmovn_s32(a.v[2]), vmovn_s32(a.v[3]));
  vst1q_s8(p, vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
}
#undef GQA_EACH

#endif
// clang-format on

// Two bf16 per 32-bit lane: the value in the low half, the value in the high half.
GQA_INLINE f32x16 bf16_low(i32x16 pairs) { return as_float(shift_left<16>(pairs)); }
GQA_INLINE f32x16 bf16_high(i32x16 pairs) { return as_float(iand(pairs, iset1(int32_t(0xffff0000u)))); }

// float32 -> bfloat16, nearest, ties to even; a NaN stays a NaN.
GQA_INLINE uint16_t to_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t((bits >> 16) | 0x40);
  return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

}  // namespace
}  // namespace gqa
