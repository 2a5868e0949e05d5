// Sixteen lanes, whatever a register holds: GCC's vector types of one register, and where that is less, pairs of halves.
// GCC's own vectors of 64 bytes would lie in memory where registers are shorter, and each step would load and store them.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

#define PW_INLINE static inline __attribute__((always_inline))
#if defined(__AVX512F__)
#define PW_REGISTER 64
#elif defined(__AVX2__)
#define PW_REGISTER 32
#else
#define PW_REGISTER 16
#endif

namespace pw {

typedef float f32part __attribute__((vector_size(PW_REGISTER)));
typedef int32_t i32part __attribute__((vector_size(PW_REGISTER)));
typedef uint32_t u32part __attribute__((vector_size(PW_REGISTER)));
constexpr int PARTS = 64 / PW_REGISTER;

typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef int8_t i8x16 __attribute__((vector_size(16)));

template <class V>
PW_INLINE void take(V &v, const void *p) { __builtin_memcpy(&v, p, sizeof v); }
template <class V>
PW_INLINE void put(void *p, V v) { __builtin_memcpy(p, &v, sizeof v); }

#if defined(__AVX512F__)
template <class V>
struct Lanes { typedef V Type; };
#else

// Everything is inlined, or each file's own: the linker finds nothing that it could merge between instruction sets.
template <class V>
struct Halves {
  V low, high;
  template <class W>
  __attribute__((always_inline)) explicit operator Halves<W>() const { return {(W)low, (W)high}; }  // the same bits
  __attribute__((always_inline)) auto operator[](int i) const {
    constexpr int half = sizeof(V) / 4;
    return i < half ? low[i] : high[i - half];
  }
};

#define PW_OPERATOR(op)                                                                                             \
  template <class V>                                                                                                \
  PW_INLINE Halves<V> operator op(Halves<V> a, Halves<V> b) { return {a.low op b.low, a.high op b.high}; }          \
  template <class V, class S>                                                                                       \
  PW_INLINE Halves<V> operator op(Halves<V> a, S b) { return {a.low op b, a.high op b}; }                           \
  template <class V, class S>                                                                                       \
  PW_INLINE Halves<V> operator op(S a, Halves<V> b) { return {a op b.low, a op b.high}; }                           \
  template <class V, class B>                                                                                       \
  PW_INLINE Halves<V> &operator op##=(Halves<V> &a, B b) { return a = a op b; }
PW_OPERATOR(+)
PW_OPERATOR(-)
PW_OPERATOR(*)
PW_OPERATOR(/)
PW_OPERATOR(&)
PW_OPERATOR(|)
PW_OPERATOR(<<)
PW_OPERATOR(>>)
#undef PW_OPERATOR
template <class V>
PW_INLINE Halves<V> operator~(Halves<V> a) { return {~a.low, ~a.high}; }

// In registers, for memcpy would copy a pair by way of memory.
template <class V>
PW_INLINE void take(Halves<V> &v, const void *p) { take(v.low, p), take(v.high, (const char *)p + sizeof(V)); }
template <class V>
PW_INLINE void put(void *p, Halves<V> v) { put(p, v.low), put((char *)p + sizeof(V), v.high); }

#if defined(__AVX2__)
template <class V>
struct Lanes { typedef Halves<V> Type; };
#else
template <class V>
struct Lanes { typedef Halves<Halves<V>> Type; };
#endif
#endif

template <class V>
PW_INLINE V load_as(const void *p) { V v; take(v, p); return v; }

typedef Lanes<f32part>::Type f32x16;
typedef Lanes<i32part>::Type i32x16;
typedef Lanes<u32part>::Type u32x16;

PW_INLINE f32part splat_part(float x) {
#if defined(__AVX512F__)
  return (f32part)_mm512_set1_ps(x);  // the sum below is not dropped, for the sake of −0
#elif defined(__AVX2__)
  return (f32part)_mm256_set1_ps(x);
#elif defined(__SSE2__)
  return (f32part)_mm_set1_ps(x);
#else
  return f32part{} + x;
#endif
}
PW_INLINE i32part splat_part(int32_t x) { return i32part{} + x; }
PW_INLINE u32part splat_part(uint32_t x) { return u32part{} + x; }

// One register in all places.
#if defined(__AVX512F__)
template <class V>
PW_INLINE V everywhere(V v) { return v; }
#elif defined(__AVX2__)
template <class V>
PW_INLINE Halves<V> everywhere(V v) { return {v, v}; }
#else
template <class V>
PW_INLINE Halves<Halves<V>> everywhere(V v) { return {{v, v}, {v, v}}; }
#endif
PW_INLINE f32x16 splat(float x) { return everywhere(splat_part(x)); }
PW_INLINE i32x16 splat(int32_t x) { return everywhere(splat_part(x)); }
PW_INLINE u32x16 splat(uint32_t x) { return everywhere(splat_part(x)); }

// What is said of one register, said of pairs: name(a), name(a, b), name(a, b, c).
#if defined(__AVX512F__)
#define PW_BY_HALVES(name)
#else
#define PW_BY_HALVES(name)                                             \
  template <class V, class... W>                                       \
  PW_INLINE auto name(Halves<V> a, Halves<W>... b) {                   \
    const auto low = name(a.low, b.low...);                            \
    return Halves<decltype(name(a.low, b.low...))>{low, name(a.high, b.high...)}; \
  }
#endif

PW_INLINE i32x16 lane_numbers() {
  static constexpr int32_t numbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load_as<i32x16>(numbers);
}

}  // namespace pw
