// Vectors of floats, as wide as the machine has them, and the types that tensors are stored in.
//
// Written with the compilers' vector extensions, so that one text serves every instruction set; only what they cannot say
// (a dot product of bfloat16 pairs, say) is written per set, with a portable form beside it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace ferrum {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define FERRUM_AVX512 1
constexpr int kLanes = 16;
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define FERRUM_AVX2 1
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

using F32 = float __attribute__((vector_size(kLanes * 4)));
using I32 = int32_t __attribute__((vector_size(kLanes * 4)));
using U32 = uint32_t __attribute__((vector_size(kLanes * 4)));
using U16 = uint16_t __attribute__((vector_size(kLanes * 2)));
using U8 = uint8_t __attribute__((vector_size(kLanes)));
// Two in each lane.
using I16Pairs = int16_t __attribute__((vector_size(kLanes * 4)));
using U16Pairs = uint16_t __attribute__((vector_size(kLanes * 4)));

template <class Vector, class Scalar>
inline Vector splat(Scalar value) {
  return Vector{} + value;
}

template <class To, class From>
inline To bits(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

// In all lanes. As it is told to the compilers, what comes next is done with the vector: with `splat` they do it before, which
// takes two more instructions where the value comes from memory.
inline U32 broadcast(uint32_t value) {
#if defined(FERRUM_AVX512)
  return bits<U32>(_mm512_set1_epi32(static_cast<int>(value)));
#elif defined(FERRUM_AVX2)
  return bits<U32>(_mm256_set1_epi32(static_cast<int>(value)));
#else
  return splat<U32>(value);
#endif
}

#if defined(__x86_64__)
// The sum of the products of a lane's two signed numbers of 16 bits.
inline I32 multiply_pairs(U32 a, U32 b) {
#if defined(FERRUM_AVX512)
  return bits<I32>(_mm512_madd_epi16(bits<__m512i>(a), bits<__m512i>(b)));
#elif defined(FERRUM_AVX2)
  return bits<I32>(_mm256_madd_epi16(bits<__m256i>(a), bits<__m256i>(b)));
#else
  return bits<I32>(_mm_madd_epi16(bits<__m128i>(a), bits<__m128i>(b)));
#endif
}
#endif

template <class Vector>
inline Vector load_raw(const void* from) {
  Vector result;
  std::memcpy(&result, from, sizeof(Vector));
  return result;
}

// The first `count` elements of a vector; the others are 0.
template <class Vector>
inline Vector load_raw(const void* from, int count) {
  Vector result{};
  std::memcpy(&result, from, count * (sizeof(Vector) / kLanes));
  return result;
}

// What the compilers make of __builtin_convertvector is up to sixteen times as long.
inline U32 widen(U16 x) {
#if defined(FERRUM_AVX512)
  return bits<U32>(_mm512_cvtepu16_epi32(bits<__m256i>(x)));
#elif defined(FERRUM_AVX2)
  return bits<U32>(_mm256_cvtepu16_epi32(bits<__m128i>(x)));
#else
  return __builtin_convertvector(x, U32);
#endif
}

inline U32 widen(U8 x) {
#if defined(FERRUM_AVX512)
  return bits<U32>(_mm512_cvtepu8_epi32(bits<__m128i>(x)));
#elif defined(FERRUM_AVX2)
  return bits<U32>(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bits<int64_t>(x))));
#else
  return __builtin_convertvector(__builtin_convertvector(x, U16), U32);
#endif
}

// The lower halves.
inline U16 narrow(U32 x) {
#if defined(FERRUM_AVX512)
  return bits<U16>(_mm512_cvtepi32_epi16(bits<__m512i>(x)));
#else
  return __builtin_convertvector(x, U16);
#endif
}

// The lowest bytes.
inline U8 narrow_to_bytes(U32 x) {
#if defined(FERRUM_AVX512)
  return bits<U8>(_mm512_cvtepi32_epi8(bits<__m512i>(x)));
#else
  return __builtin_convertvector(__builtin_convertvector(x, U16), U8);
#endif
}

inline F32 choose(I32 condition, F32 yes, F32 no) {
  return condition ? yes : no;
}

// a * b + c; rounded once where the machine can. (Left to themselves compilers would fuse some of our products and not others:
// we build with -ffp-contract=off.)
inline F32 multiply_add(F32 a, F32 b, F32 c) {
#if defined(FERRUM_AVX512)
  return bits<F32>(_mm512_fmadd_ps(bits<__m512>(a), bits<__m512>(b), bits<__m512>(c)));
#elif defined(FERRUM_AVX2)
  return bits<F32>(_mm256_fmadd_ps(bits<__m256>(a), bits<__m256>(b), bits<__m256>(c)));
#elif defined(__aarch64__)
  return bits<F32>(vfmaq_f32(bits<float32x4_t>(c), bits<float32x4_t>(a), bits<float32x4_t>(b)));
#else
  return a * b + c;
#endif
}

// b where either is NaN, as the instruction has it.
inline F32 max(F32 a, F32 b) {
#if defined(FERRUM_AVX512)
  return bits<F32>(_mm512_max_ps(bits<__m512>(a), bits<__m512>(b)));
#elif defined(FERRUM_AVX2)
  return bits<F32>(_mm256_max_ps(bits<__m256>(a), bits<__m256>(b)));
#else
  return choose(a > b, a, b);
#endif
}

inline F32 min(F32 a, F32 b) {
#if defined(FERRUM_AVX512)
  return bits<F32>(_mm512_min_ps(bits<__m512>(a), bits<__m512>(b)));
#elif defined(FERRUM_AVX2)
  return bits<F32>(_mm256_min_ps(bits<__m256>(a), bits<__m256>(b)));
#else
  return choose(a < b, a, b);
#endif
}

// Each lane with the one kWidth behind it.
template <int kWidth, class Combine, int... kAt>
inline F32 fold(F32 x, Combine combine, std::integer_sequence<int, kAt...>) {
  return combine(x, __builtin_shufflevector(x, x, ((kAt + kWidth) % kLanes)...));
}

// All lanes combined, in an order that depends on nothing but their number.
template <int kWidth = kLanes / 2, class Combine>
inline float reduce(F32 x, Combine combine) {
  x = fold<kWidth>(x, combine, std::make_integer_sequence<int, kLanes>{});
  if constexpr (kWidth > 1)
    return reduce<kWidth / 2>(x, combine);
  else
    return x[0];
}

inline float sum(F32 x) {
  return reduce(x, [](F32 a, F32 b) { return a + b; });
}

inline float highest(F32 x) {
  return reduce(x, [](F32 a, F32 b) { return max(a, b); });
}

// -- element types: how each is read as floats and written from them -------------------------------------------------------

struct Bf16 {
  uint16_t value;
};
struct F16 {
  uint16_t value;
};
struct Fp8 {  // e4m3fn: no infinity, one NaN
  uint8_t value;
};

inline F32 to_f32(U32 halves, Bf16) { return bits<F32>(halves << 16); }

inline U32 round_to_bf16(F32 x) {
  U32 raw = bits<U32>(x);
  U32 rounded = (raw + 0x7FFFu + ((raw >> 16) & 1u)) >> 16;
  I32 is_nan = x != x;
  return bits<U32>((bits<I32>(rounded) & ~is_nan) | (is_nan & 0x7FC0));
}

inline F32 to_f32(U16 halves, F16) {
#if defined(FERRUM_AVX512)
  return bits<F32>(_mm512_maskz_cvtph_ps(0xFFFF, bits<__m256i>(halves)));
#elif defined(FERRUM_AVX2)
  return bits<F32>(_mm256_cvtph_ps(bits<__m128i>(halves)));
#else
  // A half's magnitude, shifted to where a float has its own, is too small by 2^112, denormals included.
  const U32 wide = widen(halves);
  U32 sign = (wide & 0x8000u) << 16;
  U32 magnitude = (wide & 0x7FFFu) << 13;
  F32 value = bits<F32>(magnitude) * 0x1p112f;
  I32 is_special = bits<I32>(wide & 0x7C00u) == 0x7C00;
  value = choose(is_special, bits<F32>(magnitude | 0x7F800000u), value);
  return bits<F32>(bits<U32>(value) | sign);
#endif
}
inline F32 to_f32(U32 halves, F16) { return to_f32(narrow(halves), F16{}); }

inline U32 round_to_f16(F32 x) {
  U32 raw = bits<U32>(x);
  U32 sign = (raw >> 16) & 0x8000u;
  F32 magnitude = bits<F32>(raw & 0x7FFFFFFFu);
  // Normal halves: round to nearest even in the integers. Denormal ones: let an addition round.
  U32 normal = ((bits<U32>(magnitude) + 0x0FFFu + ((raw >> 13) & 1u)) >> 13) - (112u << 10);
  U32 denormal = bits<U32>(magnitude + 0.5f) - 0x3F000000u;
  U32 result = bits<U32>(choose(magnitude < 0x1p-14f, bits<F32>(denormal), bits<F32>(normal)));
  result = bits<U32>(choose(magnitude >= 65520.0f, bits<F32>(splat<U32>(0x7C00u)), bits<F32>(result)));
  result = bits<U32>(choose(x != x, bits<F32>(splat<U32>(0x7E00u)), bits<F32>(result)));
  return result | sign;
}

inline F32 to_f32(U32 bytes, Fp8) {
  U32 sign = (bytes & 0x80u) << 24;
  F32 value = bits<F32>((bytes & 0x7Fu) << 20) * 0x1p120f;
  I32 is_nan = bits<I32>(bytes & 0x7Fu) == 0x7F;
  value = choose(is_nan, splat<F32>(NAN), value);
  return bits<F32>(bits<U32>(value) | sign);
}

// What is too large becomes the largest, 448.
inline U32 round_to_fp8(F32 x) {
  U32 sign = (bits<U32>(x) >> 24) & 0x80u;
  F32 magnitude = min(bits<F32>(bits<U32>(x) & 0x7FFFFFFFu), splat<F32>(448.0f));
  U32 raw = bits<U32>(magnitude);
  U32 normal = ((raw + 0x7FFFFu + ((raw >> 20) & 1u)) >> 20) - (120u << 3);
  U32 denormal = bits<U32>(magnitude + 0x1p14f) - bits<U32>(splat<F32>(0x1p14f));
  U32 result = bits<U32>(choose(magnitude < 0x1p-6f, bits<F32>(denormal), bits<F32>(normal)));
  result = bits<U32>(choose(x != x, bits<F32>(splat<U32>(0x7Fu)), bits<F32>(result)));
  return result | sign;
}

inline F32 to_f32(U32 bytes, int8_t) { return __builtin_convertvector(bits<I32>(bytes << 24) >> 24, F32); }

// Pairs of bfloat16.
struct Bf16Pairs {
  U32 first, second;
};

#if defined(FERRUM_AVX512) && defined(__AVX512VBMI__)
// The halves of a bfloat16 by the magnitude in a byte.
template <class T>
struct alignas(64) Bf16Bytes {
  uint8_t low[128], high[128];

  constexpr Bf16Bytes() : low(), high() {
    for (int i = 0; i < 128; ++i) {
      float value = static_cast<float>(i);
      if constexpr (std::is_same_v<T, Fp8>) {
        value = static_cast<float>(i < 8 ? i : i % 8 + 8) / 512.0f;
        for (int power = 1; power < i / 8; ++power) value *= 2.0f;
      }
      const uint32_t raw = std::is_same_v<T, Fp8> && i == 127 ? 0x7FC00000u : __builtin_bit_cast(uint32_t, value);
      low[i] = static_cast<uint8_t>(raw >> 16);
      high[i] = static_cast<uint8_t>(raw >> 24);
    }
  }
};

template <class T>
inline constexpr Bf16Bytes<T> kBf16Bytes{};

// Number `at` of each result is that of byte kFrom(result, at).
template <int (*kFrom)(int, int), int kResult, int... kAt>
inline U32 zip_bytes(__m512i low, __m512i high, std::integer_sequence<int, kAt...>) {
  using Bytes = uint8_t __attribute__((vector_size(64)));
  return bits<U32>(
      __builtin_shufflevector(bits<Bytes>(low), bits<Bytes>(high), (kFrom(kResult, kAt / 2) + kAt % 2 * 64)...));
}

template <int (*kFrom)(int, int), class T>
inline Bf16Pairs bytes_to_bf16(__m512i bytes, T) {
  const auto& table = kBf16Bytes<T>;
  const auto index = std::is_same_v<T, Fp8> ? bytes : _mm512_abs_epi8(bytes);  // of which the highest bit is not looked at
  const auto find = [&](const uint8_t* from) {
    return _mm512_permutex2var_epi8(load_raw<__m512i>(from), index, load_raw<__m512i>(from + 64));
  };
  const auto sign = _mm512_and_si512(bytes, _mm512_set1_epi8(-128));
  const auto low = find(table.low), high = _mm512_or_si512(find(table.high), sign);
  const auto all = std::make_integer_sequence<int, 64>{};
  return {zip_bytes<kFrom, 0>(low, high, all), zip_bytes<kFrom, 1>(low, high, all)};
}

constexpr int byte_of_words(int result, int at) { return at / 2 * 4 + result * 2 + at % 2; }
constexpr int byte_of_rows(int result, int at) { return at / 2 + result * 16 + at % 2 * 32; }
#endif

// Bytes 0 and 1 of each lane, and bytes 2 and 3; T, int8_t or Fp8, says what they are.
template <class T>
inline Bf16Pairs words_to_bf16(U32 words, T) {
#if defined(FERRUM_AVX512) && defined(__AVX512VBMI__)
  return bytes_to_bf16<byte_of_words>(bits<__m512i>(words), T{});
#else
  const auto byte = [&](int shift) { return bits<U32>(to_f32((words >> shift) & 0xFFu, T{})) >> 16; };
  return {byte(0) | byte(8) << 16, byte(16) | byte(24) << 16};
#endif
}

// Each of the 2 * kLanes of `a` with that of `b`.
template <class T>
inline Bf16Pairs rows_to_bf16(const T* a, const T* b) {
#if defined(FERRUM_AVX512) && defined(__AVX512VBMI__)
  const auto both = _mm512_inserti64x4(_mm512_castsi256_si512(load_raw<__m256i>(a)), load_raw<__m256i>(b), 1);
  return bytes_to_bf16<byte_of_rows>(both, T{});
#else
  const auto lane = [](const T* from) { return bits<U32>(to_f32(widen(load_raw<U8>(from)), T{})); };
  return {lane(a) >> 16 | lane(b), lane(a + kLanes) >> 16 | lane(b + kLanes)};
#endif
}

inline F32 load(const float* from) { return load_raw<F32>(from); }
inline F32 load(const float* from, int count) { return load_raw<F32>(from, count); }
inline void store(float* to, F32 x, int count = kLanes) { std::memcpy(to, &x, count * sizeof(float)); }

inline U16 load_halves(const void* from, int count) {
  return count == kLanes ? load_raw<U16>(from) : load_raw<U16>(from, count);
}

inline void store_halves(void* to, U32 x, int count) {
  U16 raw = narrow(x);
  if (count == kLanes)
    std::memcpy(to, &raw, sizeof(raw));
  else
    std::memcpy(to, &raw, count * 2);
}

inline F32 load(const Bf16* from, int count = kLanes) { return to_f32(widen(load_halves(from, count)), Bf16{}); }

inline void store(Bf16* to, F32 x, int count = kLanes) {
#if defined(FERRUM_AVX512) && defined(__AVX512BF16__)
  if (count == kLanes) {
    auto raw = _mm512_cvtneps_pbh(bits<__m512>(x));
    std::memcpy(to, &raw, sizeof(raw));
    return;
  }
#endif
  store_halves(to, round_to_bf16(x), count);
}

inline F32 load(const F16* from, int count = kLanes) { return to_f32(load_halves(from, count), F16{}); }

inline void store(F16* to, F32 x, int count = kLanes) {
#if defined(FERRUM_AVX512)
  if (count == kLanes) {
    auto raw = _mm512_maskz_cvtps_ph(0xFFFF, bits<__m512>(x), _MM_FROUND_TO_NEAREST_INT);
    std::memcpy(to, &raw, sizeof(raw));
    return;
  }
#elif defined(FERRUM_AVX2)
  if (count == kLanes) {
    auto raw = _mm256_cvtps_ph(bits<__m256>(x), _MM_FROUND_TO_NEAREST_INT);
    std::memcpy(to, &raw, sizeof(raw));
    return;
  }
#endif
  store_halves(to, round_to_f16(x), count);
}

inline F32 load(const Fp8* from, int count = kLanes) {
  U8 raw = count == kLanes ? load_raw<U8>(from) : load_raw<U8>(from, count);
  return to_f32(widen(raw), Fp8{});
}

inline void store(Fp8* to, F32 x, int count = kLanes) {
  U8 raw = narrow_to_bytes(round_to_fp8(x));
  std::memcpy(to, &raw, count);
}

inline F32 load(const int8_t* from, int count = kLanes) {
  U8 raw = count == kLanes ? load_raw<U8>(from) : load_raw<U8>(from, count);
  return to_f32(widen(raw), int8_t{});
}

// Rounds to the nearest, halves to even: adding 1.5 * 2^23 leaves no bits behind the point.
inline I32 round_to_int(F32 x) { return bits<I32>(x + 0x1.8p23f) - 0x4B400000; }

inline void store(int8_t* to, F32 x, int count = kLanes) {
  U8 raw = narrow_to_bytes(bits<U32>(round_to_int(x)));
  std::memcpy(to, &raw, count);
}

// One value, rounded as a vector of them would be.
template <class T>
inline float round_to(float x) {
  T stored[kLanes];
  store(stored, splat<F32>(x));
  return load(stored)[0];
}

// -- functions -------------------------------------------------------------------------------------------------------------

// e^x within two units in the last place; 0 below -87.
inline F32 exp(F32 x) {
  F32 bounded = min(max(x, splat<F32>(-87.0f)), splat<F32>(88.0f));
  I32 power = round_to_int(bounded * 1.44269504f);
  F32 whole = __builtin_convertvector(power, F32);
  F32 rest = bounded - whole * 0.693359375f + whole * 2.12194440e-4f;
  F32 y = splat<F32>(1.9875691500e-4f);
  for (float coefficient : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    y = multiply_add(y, rest, splat<F32>(coefficient));
  y = multiply_add(y, rest * rest, rest + 1.0f);
  F32 result = y * bits<F32>((power + 127) << 23);
  result = choose(x < -87.0f, F32{}, result);
  return choose(x == x, result, x);
}

// 2^x for x up to 127, within two units in the last place; below -126 what it is there, which no sum will feel.
inline F32 exp2(F32 x) {
  const F32 bounded = max(splat<F32>(-126.0f), x);
  const F32 shifted = bounded + 0x1.8p23f;  // the nearest whole number in the lowest bits
  const F32 rest = bounded - (shifted - 0x1.8p23f);
  F32 y = splat<F32>(1.5345811e-4f);
  for (float coefficient : {1.3399931e-3f, 9.618489e-3f, 5.5503286e-2f, 2.4022646e-1f, 6.931472e-1f, 1.0f})
    y = multiply_add(y, rest, splat<F32>(coefficient));
  return y * bits<F32>((bits<I32>(shifted) + 127) << 23);
}

inline F32 tanh(F32 x) {
  F32 magnitude = bits<F32>(bits<U32>(x) & 0x7FFFFFFFu);
  F32 power = exp(min(magnitude, splat<F32>(20.0f)) * -2.0f);
  F32 large = (1.0f - power) / (1.0f + power);
  F32 square = x * x;  // near 0 the difference above has no digits left
  F32 small = magnitude - magnitude * square * (1.0f / 3.0f) + magnitude * square * square * (2.0f / 15.0f);
  F32 result = choose(magnitude < 0.06f, small, large);
  result = bits<F32>(bits<U32>(result) | (bits<U32>(x) & 0x80000000u));
  return choose(x == x, result, x);
}

// -- loops -----------------------------------------------------------------------------------------------------------------

// Calls `body(at, count)` for every vector of `size` elements; `count` is less than kLanes for the last only.
template <class Body>
inline void for_vectors(int64_t size, Body body) {
  int64_t at = 0;
  for (; at + kLanes <= size; at += kLanes) body(at, kLanes);
  if (at < size) body(at, static_cast<int>(size - at));
}

}  // namespace ferrum
