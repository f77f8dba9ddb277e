// Vectors of one instruction set: loads, stores, conversions and sums, in the type that is computed in.
//
// T is the type in memory, A = Compute<T> the type of the arithmetic: float for float and the 16-bit types, else double.
#pragma once

#include <concepts>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "half.h"
#include "kernels.h"

// Everything in this file has internal linkage: the same names are compiled once per instruction set.
namespace {

#if defined(__AVX512F__)
constexpr int BYTES = 64;
#elif defined(__AVX2__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif

template <class T> struct Compute { using type = float; };
template <> struct Compute<double> { using type = double; };

template <class A> struct VectorOf;
template <> struct VectorOf<float> {
  typedef float type __attribute__((vector_size(BYTES)));
  typedef int32_t bits __attribute__((vector_size(BYTES)));
};
template <> struct VectorOf<double> {
  typedef double type __attribute__((vector_size(BYTES)));
  typedef int64_t bits __attribute__((vector_size(BYTES)));
};
template <class A> using V = typename VectorOf<A>::type;
template <class A> constexpr int W = BYTES / sizeof(A);

template <class A> inline V<A> splat(A value) { return value - V<A>{}; }

// ---- memory -------------------------------------------------------------------------------------------------------

typedef uint16_t Half16 __attribute__((vector_size(BYTES / 2)));
typedef uint32_t Word32 __attribute__((vector_size(BYTES)));

template <std::floating_point T> inline V<T> widen(const T* from) {
  V<T> v;
  std::memcpy(&v, from, BYTES);
  return v;
}
template <std::floating_point T> inline void narrow(T* to, V<T> v) { std::memcpy(to, &v, BYTES); }
inline Half16 rounded(V<float> v) {  // to bfloat16: to nearest, ties to even; NaN stays NaN
  Word32 wide;
  std::memcpy(&wide, &v, BYTES);
  const Word32 nearest = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
  return __builtin_convertvector(v == v ? nearest : (wide >> 16) | 0x40, Half16);
}

#if defined(__AVX512F__)
inline V<float> from_bits(BFloat16, __m256i bits) { return (V<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16); }
inline V<float> from_bits(Float16, __m256i bits) { return (V<float>)_mm512_cvtph_ps(bits); }
inline __m256i to_bits(Float16, V<float> v) { return _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT); }
#if defined(__AVX512BF16__)
inline __m256i to_bits(BFloat16, V<float> v) { return (__m256i)_mm512_cvtneps_pbh((__m512)v); }  // denormals become 0
#else
inline __m256i to_bits(BFloat16, V<float> v) { return (__m256i)rounded(v); }
#endif
template <class T> concept Half = sizeof(T) == 2;
template <Half T> inline V<float> widen(const T* from) {
  return from_bits(T{}, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
template <Half T> inline void narrow(T* to, V<float> v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), to_bits(T{}, v));
}
#else
inline V<float> widen(const BFloat16* from) {
  Half16 bits;
  std::memcpy(&bits, from, BYTES / 2);
  const Word32 wide = __builtin_convertvector(bits, Word32) << 16;
  V<float> v;
  std::memcpy(&v, &wide, BYTES);
  return v;
}
inline void narrow(BFloat16* to, V<float> v) {
  const Half16 bits = rounded(v);
  std::memcpy(to, &bits, BYTES / 2);
}
#if defined(__AVX2__)
inline V<float> widen(const Float16* from) {
  return (V<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline void narrow(Float16* to, V<float> v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#else
inline V<float> widen(const Float16* from) {
  V<float> v;
  for (int i = 0; i < W<float>; ++i) v[i] = from_half(from[i].bits);
  return v;
}
inline void narrow(Float16* to, V<float> v) {
  for (int i = 0; i < W<float>; ++i) to[i].bits = to_half(v[i]);
}
#endif
#endif

// Past the caches, to an address that is a multiple of what the vector takes there: for results larger than them.
template <class T, class A> inline void stream(T* to, A v) {
#if defined(__AVX2__)
  alignas(VECTOR) T values[BYTES / sizeof(v[0])];
  narrow(values, v);
#if defined(__AVX512F__)
  if constexpr (sizeof(values) == 64) return _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_load_si512(values));
#endif
  if constexpr (sizeof(values) == 32)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), _mm256_load_si256(reinterpret_cast<const __m256i*>(values)));
  else _mm_stream_si128(reinterpret_cast<__m128i*>(to), _mm_load_si128(reinterpret_cast<const __m128i*>(values)));
#else
  narrow(to, v);
#endif
}
inline void fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// The first n of a vector's places; `beyond` has the others.
#if defined(__AVX512F__)
template <class T> constexpr bool masked = sizeof(T) < 8;
#else
template <class T> constexpr bool masked = false;
#endif
template <class A> inline V<A> joined(int n, V<A> first, V<A> beyond) {
  typename VectorOf<A>::bits place;
  for (int i = 0; i < W<A>; ++i) place[i] = i;
  return place < n ? first : beyond;
}
template <class T> inline V<typename Compute<T>::type> widen(const T* from, int n, V<typename Compute<T>::type> beyond)
  requires(!masked<T>)
{
  T buffer[W<typename Compute<T>::type>] = {};
  std::memcpy(buffer, from, n * sizeof(T));
  return joined<typename Compute<T>::type>(n, widen(buffer), beyond);
}
template <class T> inline void narrow(T* to, V<typename Compute<T>::type> v, int n)
  requires(!masked<T>)
{
  T buffer[W<typename Compute<T>::type>];
  narrow(buffer, v);
  std::memcpy(to, buffer, n * sizeof(T));
}
#if defined(__AVX512F__)
inline __mmask16 first(int n) { return __mmask16((1u << n) - 1); }
inline V<float> widen(const float* from, int n, V<float> beyond) {
  return (V<float>)_mm512_mask_loadu_ps((__m512)beyond, first(n), from);
}
inline void narrow(float* to, V<float> v, int n) { _mm512_mask_storeu_ps(to, first(n), (__m512)v); }
template <Half T> inline V<float> widen(const T* from, int n, V<float> beyond) {
  return (V<float>)_mm512_mask_mov_ps((__m512)beyond, first(n), (__m512)from_bits(T{}, _mm256_maskz_loadu_epi16(first(n), from)));
}
template <Half T> inline void narrow(T* to, V<float> v, int n) { _mm256_mask_storeu_epi16(to, first(n), to_bits(T{}, v)); }
#endif

// ---- sums in double -------------------------------------------------------------------------------------------------

// The sum of A's in double, lane by lane.
template <class A> struct Sum;
template <> struct Sum<double> {
  V<double> lanes{};
  void add(V<double> v) { lanes += v; }
  void add_product(V<double> a, V<double> b) { lanes += a * b; }
};
template <> struct Sum<float> {
  V<double> low{}, high{};
#if defined(__AVX512F__)
  static V<double> wide_low(V<float> v) { return (V<double>)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)v)); }
  static V<double> wide_high(V<float> v) { return (V<double>)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)v, 1)); }
#elif defined(__AVX2__)
  static V<double> wide_low(V<float> v) { return (V<double>)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)v)); }
  static V<double> wide_high(V<float> v) { return (V<double>)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v, 1)); }
#else
  typedef float Part __attribute__((vector_size(BYTES / 2)));
  static V<double> wide_low(V<float> v) { return __builtin_convertvector(Part{v[0], v[1]}, V<double>); }
  static V<double> wide_high(V<float> v) { return __builtin_convertvector(Part{v[2], v[3]}, V<double>); }
#endif
  void add(V<float> v) { low += wide_low(v), high += wide_high(v); }
  void add_product(V<float> a, V<float> b) {
    low += wide_low(a) * wide_low(b);
    high += wide_high(a) * wide_high(b);
  }
};
// sum += x - mean, square += (x - mean)^2: in double from the start, for a mean that is far from zero.
inline void add_centered(Sum<double>& sum, Sum<double>& square, V<double> x, V<double> mean) {
  sum.add(x - mean);
  square.add_product(x - mean, x - mean);
}
inline void add_centered(Sum<float>& sum, Sum<float>& square, V<float> x, V<float> mean) {
  const V<double> low = Sum<float>::wide_low(x) - Sum<float>::wide_low(mean);
  const V<double> high = Sum<float>::wide_high(x) - Sum<float>::wide_high(mean);
  sum.low += low, sum.high += high;
  square.low += low * low, square.high += high * high;
}
inline V<double> folded(const Sum<double>& sum) { return sum.lanes; }
inline V<double> folded(const Sum<float>& sum) { return sum.low + sum.high; }

}  // namespace
