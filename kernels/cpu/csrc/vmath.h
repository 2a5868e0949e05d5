// What activations and soft caps are made of, sixteen lanes at a time.
#pragma once
#include "abi.h"
#include "vec.h"

namespace pw {

// tanh x to 3 ulp, NaN of NaN: a soft cap is to hide nothing. Near zero a polynomial (1 − 2 / (e^2x + 1) would cancel), Cephes' coefficients.
PW_INLINE f32x16 tanh(f32x16 x) {
  f32x16 a = min(splat(10.0f), abs(x));
  f32x16 far = 1.0f - 2.0f / (exp(a + a) + 1.0f);
  f32x16 z = a * a;
  f32x16 p = splat(-5.70498872745e-3f);
  p = fma(p, z, splat(2.06390887954e-2f));
  p = fma(p, z, splat(-5.37397155531e-2f));
  p = fma(p, z, splat(1.33314422036e-1f));
  p = fma(p, z, splat(-3.33332819422e-1f));
  f32x16 near = fma(p * z, a, a);
  f32x16 y = choose(less(a, splat(0.625f)), near, far);
  return (f32x16)((u32x16)y | ((u32x16)x & 0x80000000u));
}

// erf x to about 2e-7: x · P(x²) below 1; elsewhere 1 − t·Q(t)·e^(−x²) with t = 1 / (1 + x / 2), as in Numerical
// Recipes' erfcc (relative error of erfc 1.2e-7).
PW_INLINE f32x16 erf(f32x16 x) {
  f32x16 a = min(splat(6.0f), abs(x)), z = a * a;
  f32x16 n = splat(7.853861353153693e-5f);
  n = fma(n, z, splat(-8.010193625184903e-4f));
  n = fma(n, z, splat(5.188327685732524e-3f));
  n = fma(n, z, splat(-2.685381193529856e-2f));
  n = fma(n, z, splat(1.128358514861418e-1f));
  n = fma(n, z, splat(-3.761262582423300e-1f));
  n = fma(n, z, splat(1.128379165726710f));
  f32x16 near = n * a;
  f32x16 t = 1.0f / fma(a, splat(0.5f), splat(1.0f));
  f32x16 q = splat(0.17087277f);
  q = fma(q, t, splat(-0.82215223f));
  q = fma(q, t, splat(1.48851587f));
  q = fma(q, t, splat(-1.13520398f));
  q = fma(q, t, splat(0.27886807f));
  q = fma(q, t, splat(-0.18628806f));
  q = fma(q, t, splat(0.09678418f));
  q = fma(q, t, splat(0.37409196f));
  q = fma(q, t, splat(1.00002368f));
  q = fma(q, t, splat(-1.26551223f));
  f32x16 far = 1.0f - t * exp(q - z);
  f32x16 y = choose(less(a, splat(1.0f)), near, far);
  return (f32x16)((u32x16)y | ((u32x16)x & 0x80000000u));
}

// x / (1 + e^−x) to 4e-7, for less than exp() takes: nothing is to be infinite, so that 2^n is an addition to exponents.
PW_INLINE f32x16 silu(f32x16 x) {
  const f32x16 magic = splat(12582912.0f), log2e = splat(-1.44269504f);  // 1.5 · 2^23: rounds, and leaves n in the low bits
  const f32x16 inside = min(max(x, splat(-87.0f)), splat(87.0f));
  const f32x16 r = fma(inside, log2e, magic), f = fma(inside, log2e, magic - r);
  f32x16 p = splat(1.326472732e-3f);  // 2^f on [−½, ½], as exp_below has it
  p = fma(p, f, splat(9.671512991e-3f));
  p = fma(p, f, splat(5.550733581e-2f));
  p = fma(p, f, splat(2.4022242427e-1f));
  p = fma(p, f, splat(6.9314700365e-1f));
  p = fma(p, f, splat(1.0f));
  const f32x16 e = (f32x16)((u32x16)p + ((u32x16)r << 23));
  return x / (1.0f + e);
}

// A PW_SILU, PW_GELU or PW_GELU_TANH of x.
PW_INLINE f32x16 activate(int32_t activation, f32x16 x) {
  if (activation == PW_SILU) return silu(x);
  if (activation == PW_GELU) return 0.5f * x * (1.0f + erf(x * 0.70710678f));
  return 0.5f * x * (1.0f + tanh(0.79788456f * fma(x * x * x, splat(0.044715f), x)));
}

// A logit, held softly within ± cap.
PW_INLINE f32x16 softcap(f32x16 x, float cap) { return cap * tanh(x / cap); }

}  // namespace pw
