// What sixteen lanes compute, on every instruction set. Only what the language cannot say (fused multiply-add, dot
// products, float16) is written for each set, of one register of it.
//
// Compiled with -ffp-contract=off: a product and a sum are one rounding where fma() says so and two elsewhere, so a
// row's bits do not depend on which loop the compiler met it in.
#pragma once
#include "lanes.h"

namespace pw {

PW_INLINE f32x16 load(const float *p) { return load_as<f32x16>(p); }
PW_INLINE void store(float *p, f32x16 v) { put(p, v); }

// Comparisons (−1 in the lanes where they hold), and choices by them: lane by lane `a` where the mask is −1.
PW_INLINE i32part greater(f32part a, f32part b) { return a > b; }
PW_INLINE i32part greater(i32part a, i32part b) { return a > b; }
PW_INLINE i32part at_least(f32part a, f32part b) { return a >= b; }
PW_INLINE i32part at_least(i32part a, i32part b) { return a >= b; }
PW_INLINE i32part equal(f32part a, f32part b) { return a == b; }
PW_INLINE i32part equal(i32part a, i32part b) { return a == b; }
PW_INLINE f32part choose(i32part mask, f32part a, f32part b) { return mask ? a : b; }
PW_INLINE float max(float a, float b) { return a > b ? a : b; }
PW_INLINE int min(int a, int b) { return a < b ? a : b; }
PW_INLINE f32part max(f32part a, f32part b) { return a > b ? a : b; }
PW_INLINE f32part min(f32part a, f32part b) { return a < b ? a : b; }
PW_INLINE i32part max(i32part a, i32part b) { return a > b ? a : b; }
PW_BY_HALVES(greater)
PW_BY_HALVES(at_least)
PW_BY_HALVES(equal)
PW_BY_HALVES(choose)
PW_BY_HALVES(max)
PW_BY_HALVES(min)
PW_INLINE i32x16 less(f32x16 a, f32x16 b) { return greater(b, a); }
PW_INLINE i32x16 less(i32x16 a, i32x16 b) { return greater(b, a); }
// Of max and min, as x86 has them: where one of two is NaN, the second is the answer. What may be NaN comes second.
PW_INLINE f32x16 abs(f32x16 a) { return (f32x16)((u32x16)a & 0x7FFFFFFFu); }

// a · b + c, rounded once where the set can.
PW_INLINE f32part fma(f32part a, f32part b, f32part c) {
#if defined(__AVX512F__)
  return (f32part)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (f32part)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}
PW_BY_HALVES(fma)

// v with the lanes i and i ^ STEP in each other's place.
template <int STEP>
PW_INLINE f32part exchanged(f32part v) {
  static_assert(STEP == 1 || STEP == 2 || STEP == 4 || STEP == 8, "a power of two below 16");
#if defined(__AVX512F__)
  const __m512 x = (__m512)v;  // masked: without, GCC 12 warns of what the intrinsics leave undefined
  if (STEP < 4) return (f32x16)_mm512_maskz_permute_ps(0xFFFF, x, STEP == 1 ? 0xB1 : 0x4E);
  return (f32x16)_mm512_maskz_shuffle_f32x4(0xFFFF, x, x, STEP == 4 ? 0xB1 : 0x4E);
#elif defined(__AVX2__)
  if (STEP == 4) return (f32part)_mm256_permute2f128_ps((__m256)v, (__m256)v, 1);
  return (f32part)_mm256_permute_ps((__m256)v, STEP == 1 ? 0xB1 : 0x4E);
#elif defined(__SSE2__)
  return (f32part)_mm_shuffle_ps((__m128)v, (__m128)v, STEP == 1 ? 0xB1 : 0x4E);
#else
  f32part y;
  for (int i = 0; i < 4; i++) y[i] = v[i ^ STEP];
  return y;
#endif
}
#if !defined(__AVX512F__)
template <int STEP, class V>
PW_INLINE Halves<V> exchanged(Halves<V> v) {
  if constexpr (STEP * sizeof(float) == sizeof(V)) return {v.high, v.low};
  else return {exchanged<STEP>(v.low), exchanged<STEP>(v.high)};
}
#endif

// Sums and maxima of the lanes, always in the same order: halves, then halves of those.
#if defined(__AVX512F__)
#define PW_HALVES(name, op)                                                                                     \
  PW_INLINE float name(f32x16 v) {                                                                              \
    const __m256 low = _mm512_castps512_ps256((__m512)v), high = _mm512_maskz_extractf32x8_ps(255, (__m512)v, 1); \
    const __m256 x = _mm256_##op##_ps(low, high);                                                               \
    const __m128 y = _mm_##op##_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));                     \
    const __m128 z = _mm_##op##_ps(y, _mm_movehl_ps(y, y));                                                     \
    return _mm_cvtss_f32(_mm_##op##_ss(z, _mm_movehdup_ps(z)));                                                 \
  }
PW_HALVES(sum, add)
PW_HALVES(max_lane, max)
#undef PW_HALVES
#else
PW_INLINE float sum(f32x16 v) {
  v += exchanged<8>(v);
  v += exchanged<4>(v);
  v += exchanged<2>(v);
  return v[0] + v[1];
}
PW_INLINE float max_lane(f32x16 v) {
  v = max(v, exchanged<8>(v));
  v = max(v, exchanged<4>(v));
  v = max(v, exchanged<2>(v));
  return v[0] > v[1] ? v[0] : v[1];
}
#endif
// The greatest of lanes that are not negative, given and compared as bits: a NaN's are above all others.
PW_INLINE float max_bits(i32x16 v) {
  v = max(v, (i32x16)exchanged<8>((f32x16)v));
  v = max(v, (i32x16)exchanged<4>((f32x16)v));
  v = max(v, (i32x16)exchanged<2>((f32x16)v));
  v = max(v, (i32x16)exchanged<1>((f32x16)v));
  return ((f32x16)v)[0];
}
PW_INLINE int32_t sum(i32x16 v) {
  v += (i32x16)exchanged<8>((f32x16)v);
  v += (i32x16)exchanged<4>((f32x16)v);
  v += (i32x16)exchanged<2>((f32x16)v);
  return v[0] + v[1];
}

PW_INLINE f32part to_float(i32part v) { return __builtin_convertvector(v, f32part); }
PW_INLINE i32part to_int(f32part v) { return __builtin_convertvector(v, i32part); }  // toward zero
PW_BY_HALVES(to_float)
PW_BY_HALVES(to_int)

// Halves of 32 bits that have nothing in the upper one; and bytes of what lies within a byte.
PW_INLINE u16x16 to_shorts(u32x16 v) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return (u16x16)_mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)v.low, (__m256i)v.high), 0xD8);
#else
  typedef uint32_t wide __attribute__((vector_size(64)));
  return __builtin_convertvector(load_as<wide>(&v), u16x16);
#endif
}
PW_INLINE i8x16 to_bytes(i32x16 v) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i x = _mm256_permute4x64_epi64(_mm256_packs_epi32((__m256i)v.low, (__m256i)v.high), 0xD8);
  return (i8x16)_mm_packs_epi16(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
#else
  typedef int32_t wide __attribute__((vector_size(64)));
  return __builtin_convertvector(load_as<wide>(&v), i8x16);
#endif
}
PW_INLINE i32x16 to_ints(i8x16 v) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m128i x = (__m128i)v;
  return {(i32part)_mm256_cvtepi8_epi32(x), (i32part)_mm256_cvtepi8_epi32(_mm_unpackhi_epi64(x, x))};
#else
  typedef int32_t wide __attribute__((vector_size(64)));
  const wide w = __builtin_convertvector(v, wide);
  return load_as<i32x16>(&w);
#endif
}

// To the nearest, ties to even. Nobody rounds a NaN here; what is below every normal number may become zero.
PW_INLINE u16x16 to_bf16(f32x16 v) {
#if defined(__AVX512BF16__)
  return (u16x16)_mm512_cvtneps_pbh((__m512)v);
#else
  const u32x16 b = (u32x16)v;
  return to_shorts((b + 0x7FFFu + ((b >> 16) & 1u)) >> 16);
#endif
}
PW_INLINE void store_bf16(uint16_t *p, f32x16 v) {
  const u16x16 h = to_bf16(v);
  __builtin_memcpy(p, &h, sizeof h);
}
PW_INLINE void store_bf16(uint16_t *p, f32x16 a, f32x16 b) {
#if defined(__AVX512BF16__)
  const __m512bh h = _mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
  __builtin_memcpy(p, &h, sizeof h);
#else
  store_bf16(p, a);
  store_bf16(p + 16, b);
#endif
}
PW_INLINE float bf16_to_float(uint16_t h) {
  uint32_t b = uint32_t(h) << 16;
  float f;
  __builtin_memcpy(&f, &b, 4);
  return f;
}

// To the nearest, ties to even, for |v| < 2^22.
PW_INLINE f32x16 round(f32x16 v) {
#if defined(__AVX512F__)
  return (f32x16)_mm512_maskz_roundscale_ps(0xFFFF, (__m512)v, 8);
#else
  const f32x16 magic = splat(12582912.0f);  // 1.5 · 2^23
  return (v + magic) - magic;
#endif
}
PW_INLINE i32x16 nearest(f32x16 v) {  // likewise
#if defined(__AVX512F__)
  return (i32x16)_mm512_maskz_cvtps_epi32(0xFFFF, (__m512)v);
#else
  return to_int(round(v));
#endif
}

// e^x to 1 ulp or two; 0 below −87.3, infinite above 88.7, NaN of NaN. Coefficients: minimax on [−ln 2 / 2, ln 2 / 2].
PW_INLINE f32x16 exp(f32x16 x) {
  f32x16 clamped = min(splat(88.72f), max(splat(-88.0f), x));
  f32x16 n = round(clamped * splat(1.44269504f));
  f32x16 r = fma(n, splat(-0.693359375f), clamped);
  r = fma(n, splat(2.12194440e-4f), r);
  f32x16 p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r) + 1.0f;
  i32x16 e = to_int(n);
  i32x16 half = e >> 1;  // in two factors: 2^128 is no float
  f32x16 a = (f32x16)((half + 127) << 23), b = (f32x16)((e - half + 127) << 23);
  f32x16 y = p * a * b;
  y = choose(less(x, splat(-87.33f)), splat(0.0f), y);
  return choose(greater(x, splat(88.72283f)), splat(__builtin_inff()), y);
}

// 2^t of t ≤ 0, to 3e-6; 0 of −∞. A minimax polynomial of 2^f on [−½, ½] that is 1 at 0, then 2^n.
PW_INLINE f32x16 exp2_below(f32x16 t) {
#if defined(__AVX512F__)
  const f32x16 clamped = (f32x16)_mm512_maskz_max_ps(0xFFFF, _mm512_set1_ps(-300.0f), (__m512)t);  // NaN stays NaN
#else
  const f32x16 clamped = max(splat(-126.0f), t);
#endif
  const f32x16 n = round(clamped), f = clamped - n;
  f32x16 p = splat(9.585382389e-3f);
  p = fma(p, f, splat(5.590662826e-2f));
  p = fma(p, f, splat(2.402403817e-1f));
  p = fma(p, f, splat(6.931241843e-1f));
  p = fma(p, f, splat(1.0f));
#if defined(__AVX512F__)
  return (f32x16)_mm512_maskz_scalef_ps(0xFFFF, (__m512)p, (__m512)n);
#else
  p *= (f32x16)((to_int(n) + 127) << 23);
  return choose(less(t, splat(-126.0f)), splat(0.0f), p);
#endif
}

}  // namespace pw
