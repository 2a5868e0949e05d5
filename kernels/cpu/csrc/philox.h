// Counter-based noise, as kernels/philox.py fixes it: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy
// as 1, 2, 3", SC 2011). The noise of a token is a function of (seed, position, vocabulary index) and of nothing else:
//
//   key      seed mod 2³², seed div 2³²
//   counter  index div 4, position, 0, 0     one call serves four neighbouring indices: word index mod 4
//   uniform  ((word >> 9) + 0.5) · 2⁻²³
//   gumbel   −log(−log(uniform)), each logarithm rounded to float32
#pragma once
#include <cmath>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "vec.h"

namespace pw {

typedef uint64_t u64x8 __attribute__((vector_size(64)));
typedef uint32_t u32x8 __attribute__((vector_size(32)));

constexpr float MAX_GUMBEL = 16.6357f;  // that of the greatest uniform, 1 − 2⁻²⁴, is 16.63553

typedef uint64_t u64part __attribute__((vector_size(PW_REGISTER)));
union u64parts { u64x8 v; u64part part[PARTS]; };

PW_INLINE u64x8 splat64(uint64_t x) { return u64x8{} + x; }

// Product of the low halves, 64 bits of it. What is in the high halves does not matter.
PW_INLINE u64part mul_low(u64part a, uint32_t m) {
#if defined(__AVX512F__)
  // The masked form, for GCC 12 warns of what the plain one leaves undefined.
  return (u64part)_mm512_maskz_mul_epu32(0xFF, (__m512i)a, _mm512_set1_epi64(m));
#elif defined(__AVX2__)
  return (u64part)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(m));
#elif defined(__SSE2__)
  return (u64part)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(m));
#else
  return (a & 0xFFFFFFFFu) * uint64_t(m);
#endif
}

// Eight calls, in place: the low halves of c[0…3] are their counters, and then their words.
PW_INLINE void philox(u64x8 c[4], uint64_t seed) {
  u64parts in[4] = {{c[0]}, {c[1]}, {c[2]}, {c[3]}};
  for (int j = 0; j < PARTS; j++) {
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    u64part d0 = in[0].part[j], d1 = in[1].part[j], d2 = in[2].part[j], d3 = in[3].part[j];
    for (int i = 0; i < 10; i++) {
      const u64part p0 = mul_low(d0, 0xD2511F53u), p1 = mul_low(d2, 0xCD9E8D57u);
      d0 = (p1 >> 32) ^ d1 ^ uint64_t(k0);
      d2 = (p0 >> 32) ^ d3 ^ uint64_t(k1);
      d1 = p1;
      d3 = p0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    in[0].part[j] = d0, in[1].part[j] = d1, in[2].part[j] = d2, in[3].part[j] = d3;
  }
  for (int i = 0; i < 4; i++) c[i] = in[i].v;
}

struct Stream {  // one draw's noise
  uint64_t seed;
  uint32_t position;
};

// Words of 32 neighbouring tokens, the first of which is a multiple of 4.
PW_INLINE void words_of_run(const Stream &s, int32_t first, u32x16 out[2]) {
  // The order of calls that leaves 4 · 4 neighbours in each half once pairs of words are interleaved.
  const u64x8 order = {0, 4, 1, 5, 2, 6, 3, 7};
  u64x8 c[4] = {order + uint64_t(first >> 2), splat64(s.position), {}, {}};
  philox(c, s.seed);
  const u64x8 low = splat64(0xFFFFFFFFu), a = (c[0] & low) | (c[1] << 32), b = (c[2] & low) | (c[3] << 32);
  const u64x8 even = __builtin_shuffle(a, b, u64x8{0, 8, 2, 10, 4, 12, 6, 14});
  const u64x8 odd = __builtin_shuffle(a, b, u64x8{1, 9, 3, 11, 5, 13, 7, 15});
  out[0] = load_as<u32x16>(&even);
  out[1] = load_as<u32x16>(&odd);
}

// Words of any sixteen tokens.
PW_INLINE u32x16 words_of(const Stream &s, const int32_t *ids) {
  union { u32x16 v; u32x8 h[2]; } out;
  for (int i = 0; i < 2; i++) {
    const u64x8 id = __builtin_convertvector(load_as<u32x8>(ids + 8 * i), u64x8);
    u64x8 c[4] = {id >> 2, splat64(s.position), {}, {}};
    philox(c, s.seed);
    const u64x8 second = -(id >> 1 & 1), odd = -(id & 1);  // masks: words 2 and 3, words 1 and 3
    const u64x8 low = c[0] ^ ((c[0] ^ c[1]) & odd), high = c[2] ^ ((c[2] ^ c[3]) & odd);
    out.h[i] = __builtin_convertvector(low ^ ((low ^ high) & second), u32x8);
  }
  return out.v;
}

// Logarithms in double, so that these are the same bits on every instruction set.
PW_INLINE float gumbel(uint32_t word) {
  const float uniform = (float(word >> 9) + 0.5f) * 0x1p-23f;
  return float(-::log(double(float(-::log(double(uniform))))));
}

// No less than gumbel(word), and by 0.06 more at the most where that is large: −log(−log u) ≤ −log(1 − u), whose
// logarithm is bounded by the chord that a float's own bits draw between two powers of two.
PW_INLINE f32x16 gumbel_bound(u32x16 word) {
  const f32x16 rest = to_float((i32x16)(~word >> 9)) + 0.5f;  // (1 − u) · 2²³
  return fma(to_float((i32x16)rest), splat(-0x1.62e43p-24f), splat(103.97208f + 1e-4f));  // ln 2 · (150 − bits · 2⁻²³)
}

}  // namespace pw
