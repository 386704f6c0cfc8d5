// The multiplication that everything is made of: some rows of x by two vectors of a panel. A panel is [granules][kPanel], a
// granule being four bytes along the inner dimension; rows of x have one or two words for each. An output has one accumulator,
// from the first granule to the last, so it is the same in a tile of any height.
#pragma once

#include <utility>

#include "simd.h"

namespace ferrum {

inline constexpr int kPanel = 32;                   // outputs
inline constexpr int kVectors = 2;                  // of a panel at a time
inline constexpr int kColumns = kVectors * kLanes;  // that is, so many outputs

// -- what granules add to an accumulator -----------------------------------------------------------------------------------

// Granules of weights are taken apart into `kParts` factors, each to be multiplied by one of x, the same in all lanes. What x
// has for a granule are `kXWords` words of four bytes: the granule, or where its halves had to be widened, both as floats.

struct DotFloat32 {
  using Accumulator = F32;
  static constexpr int kParts = 1, kXWords = 1;
  static F32 of_x(const uint32_t* x, int) { return bits<F32>(broadcast(*x)); }
  static F32 of_weight(U32 granules, int) { return bits<F32>(granules); }
  static F32 add(F32 sum, F32 x, F32 weight) { return multiply_add(x, weight, sum); }
};

struct DotFloat16 {
  using Accumulator = F32;
  using Half = F16;
  static constexpr int kParts = 2, kXWords = 2;
  static F32 of_x(const uint32_t* x, int part) { return bits<F32>(broadcast(x[part])); }
  static F32 of_weight(U32 granules, int part) { return to_f32(part == 0 ? granules & 0xFFFFu : granules >> 16, F16{}); }
  static F32 add(F32 sum, F32 x, F32 weight) { return multiply_add(x, weight, sum); }
};

struct DotBfloat16 {
  using Accumulator = F32;
  using Half = Bf16;
#if defined(FERRUM_AVX512) && defined(__AVX512BF16__)
  static constexpr int kParts = 1, kXWords = 1;
  static __m512bh of_x(const uint32_t* x, int) { return bits<__m512bh>(broadcast(*x)); }
  static __m512bh of_weight(U32 granules, int) { return bits<__m512bh>(granules); }
  static F32 add(F32 sum, __m512bh x, __m512bh weight) { return bits<F32>(_mm512_dpbf16_ps(bits<__m512>(sum), x, weight)); }
#else
  static constexpr int kParts = 2, kXWords = 2;
  static F32 of_x(const uint32_t* x, int part) { return bits<F32>(broadcast(x[part])); }
  static F32 of_weight(U32 granules, int part) { return bits<F32>(part == 0 ? granules << 16 : granules & 0xFFFF0000u); }
  static F32 add(F32 sum, F32 x, F32 weight) { return multiply_add(x, weight, sum); }
#endif
};

// Bytes of x are unsigned (the value plus 128), those of the weights signed, as vpdpbusd has them.
struct DotInt8 {
  using Accumulator = I32;
  static constexpr int kXWords = 1;
#if defined(FERRUM_AVX512) && defined(__AVX512VNNI__)
  static constexpr int kParts = 1;
  static __m512i of_x(const uint32_t* x, int) { return bits<__m512i>(broadcast(*x)); }
  static __m512i of_weight(U32 granules, int) { return bits<__m512i>(granules); }
  static I32 add(I32 sum, __m512i x, __m512i weight) { return bits<I32>(_mm512_dpbusd_epi32(bits<__m512i>(sum), x, weight)); }
#elif defined(FERRUM_AVX2) && defined(__AVXVNNI__)
  static constexpr int kParts = 1;
  static __m256i of_x(const uint32_t* x, int) { return bits<__m256i>(broadcast(*x)); }
  static __m256i of_weight(U32 granules, int) { return bits<__m256i>(granules); }
  static I32 add(I32 sum, __m256i x, __m256i weight) { return bits<I32>(_mm256_dpbusd_avx_epi32(bits<__m256i>(sum), x, weight)); }
#elif defined(__x86_64__)
  // Bytes as pairs of 16 bits: the even ones, then the odd ones.
  static constexpr int kParts = 2;
  static U32 of_x(const uint32_t* x, int part) {
    const U32 granule = broadcast(*x);
    return part == 0 ? granule & 0x00FF00FFu : bits<U32>(bits<U16Pairs>(granule) >> 8);
  }
  static U32 of_weight(U32 granules, int part) {
    const auto pairs = bits<I16Pairs>(granules);
    return bits<U32>((part == 0 ? pairs << 8 : pairs) >> 8);
  }
  static I32 add(I32 sum, U32 x, U32 weight) { return sum + multiply_pairs(x, weight); }
#else
  static constexpr int kParts = 4;
  static I32 of_x(const uint32_t* x, int part) { return bits<I32>(broadcast(*x) >> (8 * part) & 0xFFu); }
  static I32 of_weight(U32 granules, int part) { return bits<I32>(granules << (24 - 8 * part)) >> 24; }
  static I32 add(I32 sum, I32 x, I32 weight) { return sum + x * weight; }
#endif
};

// Rows of a tile, as many as the registers allow: each has an accumulator for every vector, and beside these are the weights'
// factors, one of x, and where there are parts what it takes to tell them apart.
#if defined(FERRUM_AVX512) || !defined(__x86_64__)
inline constexpr int kRegisters = 32;
#else
inline constexpr int kRegisters = 16;
#endif
template <class Dot>
inline constexpr int kMaxRows = (kRegisters - kVectors * Dot::kParts - (Dot::kParts > Dot::kXWords ? 3 : 1)) / kVectors;

// To each of `kRows` rows of sums the products of its granule, at `x(row)`, with those of the weights.
template <class Dot, int kRows, int kWide, class X>
inline void add_granules(typename Dot::Accumulator (&sums)[kRows][kWide], X x, const U32 (&granules)[kWide]) {
  decltype(Dot::of_weight(granules[0], 0)) weights[Dot::kParts][kWide];
  for (int part = 0; part < Dot::kParts; ++part)
    for (int v = 0; v < kWide; ++v) weights[part][v] = Dot::of_weight(granules[v], part);
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
    for (int part = 0; part < Dot::kParts; ++part) {
      const auto factor = Dot::of_x(x(row), part);
#pragma GCC unroll 2
      for (int v = 0; v < kWide; ++v) sums[row][v] = Dot::add(sums[row][v], factor, weights[part][v]);
    }
  }
}

// -- a tile: some rows by some columns of a panel --------------------------------------------------------------------------

// Memory to fetch while computing: `lines` cache lines for every kStride granules.
struct Ahead {
  const char* from;
  int lines;
};
inline constexpr int kStride = 16;

template <class Dot, int kRows>
void tile(const uint32_t* x, int64_t x_stride, const uint32_t* weight, int64_t granules, Ahead ahead,
          typename Dot::Accumulator (&sums)[kMaxRows<Dot>][kVectors]) {
  typename Dot::Accumulator local[kRows][kVectors]{};
  for (int64_t begin = 0; begin < granules; begin += kStride) {
    for (int line = 0; line < ahead.lines; ++line) __builtin_prefetch(ahead.from + line * 64, 0, 2);
    ahead.from += ahead.lines * 64;
    const int64_t end = begin + kStride < granules ? begin + kStride : granules;
    for (int64_t k = begin; k < end; ++k) {
      U32 w[kVectors];
      for (int v = 0; v < kVectors; ++v) w[v] = load_raw<U32>(weight + k * kPanel + v * kLanes);
      add_granules<Dot>(local, [&](int row) { return x + row * x_stride + k * Dot::kXWords; }, w);
    }
  }
  for (int row = 0; row < kRows; ++row)
    for (int v = 0; v < kVectors; ++v) sums[row][v] = local[row][v];
}

template <class Dot>
using Tile = void (*)(const uint32_t* x, int64_t x_stride, const uint32_t* weight, int64_t granules, Ahead,
                      typename Dot::Accumulator (&)[kMaxRows<Dot>][kVectors]);

template <class Dot, int... kRows>
Tile<Dot> tile_of(int rows, std::integer_sequence<int, kRows...>) {
  static constexpr Tile<Dot> tiles[] = {tile<Dot, kRows + 1>...};
  return tiles[rows - 1];
}

}  // namespace ferrum

#include "amx.h"

namespace ferrum {

// For 1 to kMaxRows<Dot> rows.
template <class Dot>
Tile<Dot> tile_of(int rows) {
#if defined(FERRUM_AMX)
  if constexpr (kHasAmx<Dot>) {
    if (amx_is_allowed()) return amx_tile_of<Dot>(rows, std::make_integer_sequence<int, kMaxRows<Dot>>{});
  }
#endif
  return tile_of<Dot>(rows, std::make_integer_sequence<int, kMaxRows<Dot>>{});
}

}  // namespace ferrum
