// Transcendental functions of 16 lanes, built from simd.h alone: the same bits on every instruction set.
//
// Owns exp, tanh, the activations. Knows nothing of rows or layouts. Coefficients are minimax fits (weighted for
// relative error, rounded to float32) made for this file; errors below are the largest over the stated range.
//
// Invariant: a lane's result depends on that lane alone, so a tail of a row equals its middle. NaN stays NaN.
#pragma once

#include "simd.h"

namespace gqa {
namespace {

constexpr float kInfinity = __builtin_inff();

// exp(r) * 2^n for |r| <= ln2/2 and a result in the normal range: the polynomial is scaled in its exponent bits.
GQA_INLINE f32x16 exp_reduced(f32x16 x) {
  i32x16 n = to_int(x * set1(1.44269504f));
  f32x16 whole = to_float(n);
  f32x16 r = fma(whole, set1(-0.693145752f), x);  // ln2 in two parts: n * the first is exact
  r = fma(whole, set1(-1.42860677e-6f), r);
  f32x16 p = set1(0.0013814465f);
  p = fma(p, r, set1(0.008368781f));
  p = fma(p, r, set1(0.041668393f));
  p = fma(p, r, set1(0.1666652f));
  p = fma(p, r, set1(0.49999994f));
  p = fma(p, r, set1(1.0f));
  p = fma(p, r, set1(1.0f));
  return as_float(iadd(as_int(p), shift_left<23>(n)));
}

// e^x for x <= 0, within 1 ulp; 0 below the smallest normal float.
GQA_INLINE f32x16 exp_nonpositive(f32x16 x) { return select(less(x, set1(-87.3f)), zero(), exp_reduced(x)); }

// e^x within 1 ulp; 0 below the smallest normal float, infinity above the largest.
GQA_INLINE f32x16 exp(f32x16 x) {
  return select(less(set1(88.72283f), x), set1(kInfinity), exp_nonpositive(x));
}

// 2^x for x <= 0 or nearly so, within 2 ulp; 2^-126 for all below, which a softmax does not tell from 0 (its sum
// is at least 1). Exactly 1 for x = 0: a maximum that stays must leave everything as it is.
GQA_INLINE f32x16 exp2_softmax(f32x16 x) {
  x = max(set1(-126.0f), x);
  const i32x16 n = to_int(x);
  const f32x16 r = x - to_float(n);
  f32x16 p = set1(0.0013264588f);
  p = fma(p, r, set1(0.009671619f));
  p = fma(p, r, set1(0.05550735f));
  p = fma(p, r, set1(0.24022241f));
  p = fma(p, r, set1(0.693147f));
  p = fma(p, r, set1(1.0f));
  return as_float(iadd(as_int(p), shift_left<23>(n)));
}

// tanh x within 2 ulp. Near 0 the formula by exp would cancel.
GQA_INLINE f32x16 tanh(f32x16 x) {
  f32x16 a = abs(x);
  f32x16 large = set1(1.0f) - set1(2.0f) / (exp(a + a) + set1(1.0f));
  f32x16 z = x * x;
  f32x16 p = set1(-0.0057049906f);
  p = fma(p, z, set1(0.02063909f));
  p = fma(p, z, set1(-0.053739715f));
  p = fma(p, z, set1(0.13331442f));
  p = fma(p, z, set1(-0.3333328f));
  f32x16 small = fma(p * z, x, x);
  i32x16 sign = iand(as_int(x), iset1(int32_t(0x80000000u)));
  return select(less(a, set1(0.625f)), small, as_float(ior(as_int(large), sign)));
}

// x / (1 + e^-x)
GQA_INLINE f32x16 silu(f32x16 x) { return x / (set1(1.0f) + exp(zero() - x)); }

// x/2 (1 + tanh(u)) = x / (1 + e^-2u) with u = sqrt(2/pi) (x + 0.044715 x^3), which does not cancel.
GQA_INLINE f32x16 gelu_tanh(f32x16 x) {
  f32x16 u = fma(x * x * x, set1(0.044715f), x) * set1(-1.59576912f);
  return x / (set1(1.0f) + exp(u));
}

// x Phi(x), Phi the normal distribution. With a = |x|, Phi(-a) = e^(-a^2/2) t P(t), t = 1 / (1 + a/4); the
// rounding error of a^2 is carried along, since e^ would magnify it.
GQA_INLINE f32x16 gelu(f32x16 x) {
  f32x16 a = min(set1(20.0f), abs(x));  // Phi(-20) is 0 in float32; NaN passes
  f32x16 square = a * a;
  f32x16 rest = fma(a, a, zero() - square);
  f32x16 t = set1(1.0f) / fma(a, set1(0.25f), set1(1.0f));
  f32x16 p = set1(0.016579753f);
  p = fma(p, t, set1(-0.062792696f));
  p = fma(p, t, set1(0.05165353f));
  p = fma(p, t, set1(0.028434394f));
  p = fma(p, t, set1(0.012712897f));
  p = fma(p, t, set1(0.086656414f));
  p = fma(p, t, set1(0.07199955f));
  p = fma(p, t, set1(0.0955157f));
  p = fma(p, t, set1(0.09949256f));
  p = fma(p, t, set1(0.0997479f));
  f32x16 e = exp_nonpositive(square * set1(-0.5f));
  e = fma(e * rest, set1(-0.5f), e);
  f32x16 below = e * t * p;  // Phi(-a)
  f32x16 negative = x * below;
  return select(less(x, zero()), negative, x - negative);
}

}  // namespace
}  // namespace gqa
