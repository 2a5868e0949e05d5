// Sixteen lanes, on every instruction set: GCC's vector types, which the compiler cuts to the registers that there are.
// Only what the language cannot say (fused multiply-add, dot products, float16) is written for each set.
//
// Compiled with -ffp-contract=off: a product and a sum are one rounding where fma() says so and two elsewhere, so a
// row's bits do not depend on which loop the compiler met it in.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

#define PW_INLINE static inline __attribute__((always_inline))

namespace pw {

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef uint8_t u8x16 __attribute__((vector_size(16)));
typedef int8_t i8x16 __attribute__((vector_size(16)));

PW_INLINE f32x16 splat(float x) {
#if defined(__AVX512F__)
  return (f32x16)_mm512_set1_ps(x);  // the sum below is not dropped, for the sake of −0
#else
  return f32x16{} + x;
#endif
}
PW_INLINE i32x16 splat(int32_t x) { return i32x16{} + x; }
PW_INLINE u32x16 splat(uint32_t x) { return u32x16{} + x; }
template <class V>
PW_INLINE V load_as(const void *p) { V v; __builtin_memcpy(&v, p, sizeof v); return v; }
PW_INLINE f32x16 load(const float *p) { return load_as<f32x16>(p); }
PW_INLINE void store(float *p, f32x16 v) { __builtin_memcpy(p, &v, sizeof v); }
template <class V>
PW_INLINE V max(V a, V b) { return a > b ? a : b; }
template <class V>
PW_INLINE V min(V a, V b) { return a < b ? a : b; }

// Comparisons (−1 in the lanes where they hold), choices by them, and what is made of both. GCC cuts sums and products
// to the registers that there are, but these to single lanes: here they are cut by hand.
#if defined(__AVX512F__)
#define PW_REGISTER 64
#elif defined(__AVX2__)
#define PW_REGISTER 32
#else
#define PW_REGISTER 16
#endif
typedef float f32part __attribute__((vector_size(PW_REGISTER)));
typedef int32_t i32part __attribute__((vector_size(PW_REGISTER)));
constexpr int PARTS = 64 / PW_REGISTER;
union f32parts { f32x16 v; f32part part[PARTS]; };
union i32parts { i32x16 v; i32part part[PARTS]; };

#define PW_COMPARISON(name, op)                                                \
  PW_INLINE i32x16 name(f32x16 a, f32x16 b) {                                  \
    const f32parts x{a}, y{b};                                                 \
    i32parts r;                                                                \
    for (int i = 0; i < PARTS; i++) r.part[i] = x.part[i] op y.part[i];        \
    return r.v;                                                                \
  }                                                                            \
  PW_INLINE i32x16 name(i32x16 a, i32x16 b) {                                  \
    const i32parts x{a}, y{b};                                                 \
    i32parts r;                                                                \
    for (int i = 0; i < PARTS; i++) r.part[i] = x.part[i] op y.part[i];        \
    return r.v;                                                                \
  }
PW_COMPARISON(greater, >)
PW_COMPARISON(at_least, >=)
PW_COMPARISON(equal, ==)
#undef PW_COMPARISON
PW_INLINE i32x16 less(f32x16 a, f32x16 b) { return greater(b, a); }
PW_INLINE i32x16 less(i32x16 a, i32x16 b) { return greater(b, a); }

// Lane by lane `a` where the mask is −1, `b` where it is 0.
PW_INLINE f32x16 choose(i32x16 mask, f32x16 a, f32x16 b) {
  const i32parts m{mask};
  const f32parts x{a}, y{b};
  f32parts r;
  for (int i = 0; i < PARTS; i++) r.part[i] = m.part[i] ? x.part[i] : y.part[i];
  return r.v;
}
PW_INLINE f32x16 max(f32x16 a, f32x16 b) {
  const f32parts x{a}, y{b};
  f32parts r;
  for (int i = 0; i < PARTS; i++) r.part[i] = x.part[i] > y.part[i] ? x.part[i] : y.part[i];
  return r.v;
}
PW_INLINE f32x16 min(f32x16 a, f32x16 b) {
  const f32parts x{a}, y{b};
  f32parts r;
  for (int i = 0; i < PARTS; i++) r.part[i] = x.part[i] < y.part[i] ? x.part[i] : y.part[i];
  return r.v;
}
PW_INLINE i32x16 max(i32x16 a, i32x16 b) {
  const i32parts x{a}, y{b};
  i32parts r;
  for (int i = 0; i < PARTS; i++) r.part[i] = x.part[i] > y.part[i] ? x.part[i] : y.part[i];
  return r.v;
}
// Of max and min, as x86 has them: where one of two is NaN, the second is the answer. What may be NaN comes second.
PW_INLINE f32x16 abs(f32x16 a) { return (f32x16)((u32x16)a & 0x7FFFFFFFu); }

// a · b + c, rounded once where the set can.
PW_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
#if defined(__AVX512F__)
  return (f32x16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  union { f32x16 v; __m256 h[2]; } x{a}, y{b}, z{c};
  z.h[0] = _mm256_fmadd_ps(x.h[0], y.h[0], z.h[0]);
  z.h[1] = _mm256_fmadd_ps(x.h[1], y.h[1], z.h[1]);
  return z.v;
#else
  return a * b + c;
#endif
}

// v with the lanes i and i ^ STEP in each other's place.
template <int STEP>
PW_INLINE f32x16 exchanged(f32x16 v) {
  static_assert(STEP == 1 || STEP == 2 || STEP == 4 || STEP == 8, "a power of two below 16");
#if defined(__AVX512F__)
  const __m512 x = (__m512)v;  // masked: without, GCC 12 warns of what the intrinsics leave undefined
  if (STEP < 4) return (f32x16)_mm512_maskz_permute_ps(0xFFFF, x, STEP == 1 ? 0xB1 : 0x4E);
  return (f32x16)_mm512_maskz_shuffle_f32x4(0xFFFF, x, x, STEP == 4 ? 0xB1 : 0x4E);
#elif defined(__AVX2__)
  union { f32x16 v; __m256 h[2]; } x{v}, y;
  for (int i = 0; i < 2; i++) {
    if (STEP == 8) y.h[i] = x.h[1 - i];
    else if (STEP == 4) y.h[i] = _mm256_permute2f128_ps(x.h[i], x.h[i], 1);
    else y.h[i] = _mm256_permute_ps(x.h[i], STEP == 1 ? 0xB1 : 0x4E);
  }
  return y.v;
#elif defined(__SSE2__)
  union { f32x16 v; __m128 h[4]; } x{v}, y;
  for (int i = 0; i < 4; i++)
    y.h[i] = STEP < 4 ? _mm_shuffle_ps(x.h[i], x.h[i], STEP == 1 ? 0xB1 : 0x4E) : x.h[i ^ STEP / 4];
  return y.v;
#else
  f32x16 y;
  for (int i = 0; i < 16; i++) y[i] = v[i ^ STEP];
  return y;
#endif
}

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

// To the nearest, ties to even. Nobody rounds a NaN here; what is below every normal number may become zero.
PW_INLINE u16x16 to_bf16(f32x16 v) {
#if defined(__AVX512BF16__)
  return (u16x16)_mm512_cvtneps_pbh((__m512)v);
#else
  const u32x16 b = (u32x16)v;
  return __builtin_convertvector((b + 0x7FFFu + ((b >> 16) & 1u)) >> 16, u16x16);
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

// acc[i] += w[i][0] · a[0] + w[i][1] · a[1]: 16 columns of bfloat16 pairs times one pair, which every lane of `a` holds.
PW_INLINE f32x16 dot_bf16(f32x16 acc, u32x16 w, u32x16 a) {
#if defined(__AVX512BF16__)
  return (f32x16)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)a);
#else
  acc = fma((f32x16)(w << 16), (f32x16)(a << 16), acc);
  return fma((f32x16)(w & 0xFFFF0000u), (f32x16)(a & 0xFFFF0000u), acc);
#endif
}

// acc[i] += Σ w[i][0..3] · a[0..3]: 16 columns of four unsigned bytes times four signed ones, which every lane holds.
PW_INLINE i32x16 dot_u8s8(i32x16 acc, u32x16 w, u32x16 a) {
#if defined(__AVX512VNNI__)
  // In assembler, for GCC 12 copies an accumulator that the intrinsic takes.
  __m512i c = (__m512i)acc;
  asm("vpdpbusd %2, %1, %0" : "+v"(c) : "v"((__m512i)w), "v"((__m512i)a));
  return (i32x16)c;
#elif defined(__AVX2__)
  union { u32x16 v; __m256i h[2]; } x{w}, y{a};
  union { i32x16 v; __m256i h[2]; } z{acc};
  for (int i = 0; i < 2; i++) {  // as 16-bit pairs: bytes 0 and 2, bytes 1 and 3, so that nothing saturates
    __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(y.h[i], 8), 8), odd = _mm256_srai_epi16(y.h[i], 8);
    z.h[i] = _mm256_add_epi32(z.h[i], _mm256_madd_epi16(_mm256_and_si256(x.h[i], _mm256_set1_epi16(0xFF)), even));
    z.h[i] = _mm256_add_epi32(z.h[i], _mm256_madd_epi16(_mm256_srli_epi16(x.h[i], 8), odd));
  }
  return z.v;
#else
  for (int i = 0; i < 4; i++) {
    i32x16 wi = (i32x16)((w >> (8 * i)) & 0xFFu), ai = ((i32x16)(a << (24 - 8 * i))) >> 24;
    acc += wi * ai;
  }
  return acc;
#endif
}

PW_INLINE f32x16 to_float(i32x16 v) { return __builtin_convertvector(v, f32x16); }
PW_INLINE i32x16 to_int(f32x16 v) { return __builtin_convertvector(v, i32x16); }  // toward zero
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
