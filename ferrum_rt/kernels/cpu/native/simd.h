// Vectors of floats, as wide as the machine has them, and the types that tensors are stored in.
//
// Written with the compilers' vector extensions, so that one text serves every instruction set; only what they cannot say
// (a dot product of bfloat16 pairs, say) is written per set, with a portable form beside it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

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
using I8 = int8_t __attribute__((vector_size(kLanes)));
using U8 = uint8_t __attribute__((vector_size(kLanes)));

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

inline F32 max(F32 a, F32 b) { return choose(a > b, a, b); }
inline F32 min(F32 a, F32 b) { return choose(a < b, a, b); }

// In an order that depends on nothing but the number of lanes.
inline float sum(F32 x) {
  float values[kLanes];
  std::memcpy(values, &x, sizeof(x));
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) values[i] += values[i + width];
  return values[0];
}

inline float highest(F32 x) {
  float result = x[0];
  for (int i = 1; i < kLanes; ++i) result = x[i] > result ? x[i] : result;
  return result;
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

// A half's magnitude, shifted to where a float has its own, is too small by 2^112, denormals included.
inline F32 to_f32(U32 halves, F16) {
  U32 sign = (halves & 0x8000u) << 16;
  U32 magnitude = (halves & 0x7FFFu) << 13;
  F32 value = bits<F32>(magnitude) * 0x1p112f;
  I32 is_special = bits<I32>(halves & 0x7C00u) == 0x7C00;
  value = choose(is_special, bits<F32>(magnitude | 0x7F800000u), value);
  return bits<F32>(bits<U32>(value) | sign);
}

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

inline F32 load(const float* from) { return load_raw<F32>(from); }
inline F32 load(const float* from, int count) { return load_raw<F32>(from, count); }
inline void store(float* to, F32 x, int count = kLanes) { std::memcpy(to, &x, count * sizeof(float)); }

template <class T>
inline F32 load_halves(const T* from, int count) {
  U16 raw = count == kLanes ? load_raw<U16>(from) : load_raw<U16>(from, count);
  return to_f32(__builtin_convertvector(raw, U32), T{});
}

inline void store_halves(void* to, U32 x, int count) {
  U16 raw = __builtin_convertvector(x, U16);
  if (count == kLanes)
    std::memcpy(to, &raw, sizeof(raw));
  else
    std::memcpy(to, &raw, count * 2);
}

inline F32 load(const Bf16* from, int count = kLanes) { return load_halves(from, count); }

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

inline F32 load(const F16* from, int count = kLanes) {
#if defined(FERRUM_AVX512)
  if (count == kLanes) return bits<F32>(_mm512_maskz_cvtph_ps(0xFFFF, load_raw<__m256i>(from)));
#elif defined(FERRUM_AVX2)
  if (count == kLanes) return bits<F32>(_mm256_cvtph_ps(load_raw<__m128i>(from)));
#endif
  return load_halves(from, count);
}

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
  return to_f32(__builtin_convertvector(raw, U32), Fp8{});
}

inline void store(Fp8* to, F32 x, int count = kLanes) {
  U8 raw = __builtin_convertvector(round_to_fp8(x), U8);
  std::memcpy(to, &raw, count);
}

inline F32 load(const int8_t* from, int count = kLanes) {
  I8 raw = count == kLanes ? load_raw<I8>(from) : load_raw<I8>(from, count);
  return __builtin_convertvector(__builtin_convertvector(raw, I32), F32);
}

// Rounds to the nearest, halves to even: adding 1.5 * 2^23 leaves no bits behind the point.
inline I32 round_to_int(F32 x) { return bits<I32>(x + 0x1.8p23f) - 0x4B400000; }

inline void store(int8_t* to, F32 x, int count = kLanes) {
  I8 raw = __builtin_convertvector(round_to_int(x), I8);
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
  F32 y = rest * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * rest + 8.3334519073e-3f;
  y = y * rest + 4.1665795894e-2f;
  y = y * rest + 1.6666665459e-1f;
  y = y * rest + 5.0000001201e-1f;
  y = y * rest * rest + rest + 1.0f;
  F32 result = y * bits<F32>((power + 127) << 23);
  result = choose(x < -87.0f, F32{}, result);
  return choose(x == x, result, x);
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
