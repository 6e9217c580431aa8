// The loops of peaks.h for one instruction set; GQA_PEAK_LOOPS names the function that returns them.
#include "peaks.h"
#include "simd.h"

namespace gqa {
namespace {

#if defined(__AVX512F__)
constexpr int kChains = 12; // two units, four cycles each, need at least 8
#else
constexpr int kChains = 6;  // logical vectors: 12 of AVX2's 16 registers, 24 of NEON's 32
#endif
constexpr int kLanes = 16;

uint32_t read(const void* data, size_t bytes) {
  const char* p = static_cast<const char*>(data);
  i32x16 sums[4] = {izero(), izero(), izero(), izero()};
  for (size_t i = 0; i < bytes; i += 512)
    for (int j = 0; j < 8; j++) sums[j % 4] = iadd(sums[j % 4], iload(p + i + 64 * j));
  int32_t lanes[kLanes];
  istore(lanes, iadd(iadd(sums[0], sums[1]), iadd(sums[2], sums[3])));
  uint32_t total = 0;
  for (int32_t lane : lanes) total += uint32_t(lane);
  return total;
}

float fma_loop(int64_t rounds) {
  f32x16 chains[kChains];
  for (int j = 0; j < kChains; j++) chains[j] = set1(float(j));
  const f32x16 factor = set1(0.999f), term = set1(0.001f);
  for (int64_t i = 0; i < rounds; i++)
    for (int j = 0; j < kChains; j++) chains[j] = fma(chains[j], factor, term);
  f32x16 total = zero();
  for (int j = 0; j < kChains; j++) total = total + chains[j];
  return sum(total);
}

// One round of each chain multiplies 4 bytes per lane, or with AVX2, which has no such instruction, two times 2
// widened ones.
#if defined(__AVX512F__)
GQA_INLINE i32x16 multiply_add(i32x16 acc, i32x16 w, i32x16 x) { return dot4(acc, w, x); }
#elif defined(__AVX2__)
GQA_INLINE __m256i multiply_add8(__m256i acc, __m256i w, __m256i x) {
  for (int half = 0; half < 2; half++) {
    asm volatile("" : "+x"(w)); // or the product would be computed once
    acc = _mm256_add_epi32(acc, _mm256_madd_epi16(w, x));
  }
  return acc;
}
GQA_INLINE i32x16 multiply_add(i32x16 acc, i32x16 w, i32x16 x) {
  return {multiply_add8(acc.a, w.a, x.a), multiply_add8(acc.b, w.b, x.b)};
}
#else
GQA_INLINE i32x16 multiply_add(i32x16 acc, i32x16 w, i32x16 x) {
  for (int i = 0; i < 4; i++)
    acc.v[i] = vdotq_s32(acc.v[i], vreinterpretq_s8_s32(w.v[i]), vreinterpretq_s8_s32(x.v[i]));
  return acc;
}
#endif

#if defined(__AMX_INT8__)
// Four tiles of 16 rows, 16 outputs and 64 inputs (bfloat16: 32); what they hold does not matter for their speed.
constexpr int64_t kInt8Ops = 4 * 2 * 16 * 16 * 64, kBf16Ops = kInt8Ops / 2;

template <bool kInt8> int32_t tile_loop(int64_t rounds) {
  alignas(64) uint8_t config[64] = {1};
  for (int i = 0; i < 6; i++) config[16 + 2 * i] = 64, config[48 + i] = 16;
  alignas(64) int32_t data[256];
  for (int i = 0; i < 256; i++) data[i] = i;
  asm volatile("" : : : "memory");  // the intrinsics do not say what they read
  _tile_loadconfig(config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, data, 64);
  _tile_loadd(5, data, 64);
  for (int64_t i = 0; i < rounds; i++) {
    if constexpr (kInt8) {
      _tile_dpbsud(0, 4, 5);
      _tile_dpbsud(1, 4, 5);
      _tile_dpbsud(2, 4, 5);
      _tile_dpbsud(3, 4, 5);
    } else {
      _tile_dpbf16ps(0, 4, 5);
      _tile_dpbf16ps(1, 4, 5);
      _tile_dpbf16ps(2, 4, 5);
      _tile_dpbf16ps(3, 4, 5);
    }
  }
  _tile_stored(0, data, 64);
  int32_t result = data[0];
  for (int i = 1; i < 4; i++) result ^= data[i];
  _tile_release();
  return result;
}

constexpr auto int8_loop = &tile_loop<true>, bf16_loop = &tile_loop<false>;
#else
constexpr int64_t kInt8Ops = 2 * kChains * kLanes * 4, kBf16Ops = 0;
constexpr int32_t (*bf16_loop)(int64_t rounds) = nullptr;

int32_t int8_loop(int64_t rounds) {
  i32x16 chains[kChains];
  for (int j = 0; j < kChains; j++) chains[j] = iset1(j);
  const i32x16 w = iset1(0x01020304), x = iset1(0x04030201);
  for (int64_t i = 0; i < rounds; i++)
    for (int j = 0; j < kChains; j++) chains[j] = multiply_add(chains[j], w, x);
  i32x16 total = izero();
  for (int j = 0; j < kChains; j++) total = iadd(total, chains[j]);
  int32_t lanes[kLanes];
  istore(lanes, total);
  uint32_t result = 0;
  for (int32_t lane : lanes) result += uint32_t(lane);
  return int32_t(result);
}
#endif

const PeakLoops kLoops = {2 * kChains * kLanes, kInt8Ops, kBf16Ops, read, fma_loop, int8_loop, bf16_loop};

}  // namespace

const PeakLoops& GQA_PEAK_LOOPS() { return kLoops; }

}  // namespace gqa
