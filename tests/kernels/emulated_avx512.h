// What the kernels use of AVX-512, without BF16, VNNI and VBMI, as Intel's manual defines it, in plain C++ and AVX2: put before
// everything else (-include) it takes the place of the instructions, and says that the processor has them.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512CD__ 1
#define __AVX512DQ__ 1
#define __AVX512VL__ 1

namespace emulated {

template <class To, class From>
inline To bits(const From& value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

template <class T, int kSize>
struct Lanes {
  T at[kSize];
};
using Floats = Lanes<float, 16>;
using Words = Lanes<int32_t, 16>;

// Each lane of `Result` from those of the others.
template <class Result, class To, int kSize, class Function, class... From>
inline Result each(Function function, const From&... from) {
  Lanes<To, kSize> result;
  for (int i = 0; i < kSize; ++i) result.at[i] = function(from.at[i]...);
  return bits<Result>(result);
}

inline __m512 fmadd(__m512 a, __m512 b, __m512 c) {
  return each<__m512, float, 16>([](float x, float y, float z) { return std::fma(x, y, z); }, bits<Floats>(a), bits<Floats>(b),
                                 bits<Floats>(c));
}

// The second where either is no number.
inline __m512 max(__m512 a, __m512 b) {
  return each<__m512, float, 16>([](float x, float y) { return x > y ? x : y; }, bits<Floats>(a), bits<Floats>(b));
}

inline __m512 min(__m512 a, __m512 b) {
  return each<__m512, float, 16>([](float x, float y) { return x < y ? x : y; }, bits<Floats>(a), bits<Floats>(b));
}

inline __m512i broadcast(int32_t value) {
  return each<__m512i, int32_t, 16>([&](int32_t) { return value; }, Words{});
}

inline __m512i multiply_pairs(__m512i a, __m512i b) {
  using Pairs = Lanes<int16_t[2], 16>;
  const auto x = bits<Pairs>(a), y = bits<Pairs>(b);
  Words result;
  for (int i = 0; i < 16; ++i) result.at[i] = x.at[i][0] * y.at[i][0] + x.at[i][1] * y.at[i][1];
  return bits<__m512i>(result);
}

template <class Result, class To, class From, class Vector>
inline Result convert(Vector x) {
  return each<Result, To, 16>([](From value) { return static_cast<To>(value); }, bits<Lanes<From, 16>>(x));
}

// By those of half the size.
inline __m512 from_halves(__m256i x) {
  const auto halves = bits<Lanes<__m128i, 2>>(x);
  return bits<__m512>(Lanes<__m256, 2>{{_mm256_cvtph_ps(halves.at[0]), _mm256_cvtph_ps(halves.at[1])}});
}

inline __m256i to_halves(__m512 x) {
  const auto parts = bits<Lanes<__m256, 2>>(x);
  return bits<__m256i>(Lanes<__m128i, 2>{{_mm256_cvtps_ph(parts.at[0], _MM_FROUND_TO_NEAREST_INT),
                                          _mm256_cvtps_ph(parts.at[1], _MM_FROUND_TO_NEAREST_INT)}});
}

}  // namespace emulated

#define _mm512_fmadd_ps emulated::fmadd
#define _mm512_max_ps emulated::max
#define _mm512_min_ps emulated::min
#define _mm512_set1_epi32 emulated::broadcast
#define _mm512_madd_epi16 emulated::multiply_pairs
#define _mm512_cvtepu16_epi32 emulated::convert<__m512i, int32_t, uint16_t>
#define _mm512_cvtepu8_epi32 emulated::convert<__m512i, int32_t, uint8_t>
#define _mm512_cvtepi32_epi16 emulated::convert<__m256i, uint16_t, uint32_t>
#define _mm512_cvtepi32_epi8 emulated::convert<__m128i, uint8_t, uint32_t>
#define _mm512_maskz_cvtph_ps(mask, x) emulated::from_halves(x)
#define _mm512_maskz_cvtps_ph(mask, x, rounding) emulated::to_halves(x)
