// The multiplication that everything is made of: some rows of x by two vectors of a panel. Rows of x are granules, four bytes
// along the inner dimension; a panel is [granules][kPanel] of them. An output has one accumulator, from the first granule to
// the last, so it is the same in a tile of any height.
#pragma once

#include <utility>

#include "simd.h"

namespace ferrum {

inline constexpr int kPanel = 32;  // outputs

#if defined(FERRUM_AVX512)
inline constexpr int kMaxRows = 14;  // 28 accumulators, 2 vectors of weights and one of x: 31 of 32 registers
#elif defined(FERRUM_AVX2)
inline constexpr int kMaxRows = 6;
#else
inline constexpr int kMaxRows = 6;
#endif
inline constexpr int kVectors = 2;                    // of a panel at a time
inline constexpr int kColumns = kVectors * kLanes;    // that is, so many outputs

// -- what a granule adds to an accumulator ---------------------------------------------------------------------------------

struct DotFloat32 {
  using Accumulator = F32;
  static F32 add(F32 sum, uint32_t x, U32 weight) { return multiply_add(bits<F32>(splat<U32>(x)), bits<F32>(weight), sum); }
};

struct DotBfloat16 {
  using Accumulator = F32;
  static F32 add(F32 sum, uint32_t x, U32 weight) {
#if defined(FERRUM_AVX512) && defined(__AVX512BF16__)
    return bits<F32>(_mm512_dpbf16_ps(bits<__m512>(sum), bits<__m512bh>(splat<U32>(x)), bits<__m512bh>(weight)));
#else
    sum = multiply_add(bits<F32>(splat<U32>(x << 16)), bits<F32>(weight << 16), sum);
    return multiply_add(bits<F32>(splat<U32>(x & 0xFFFF0000u)), bits<F32>(weight & 0xFFFF0000u), sum);
#endif
  }
};

struct DotFloat16 {
  using Accumulator = F32;
  static F32 add(F32 sum, uint32_t x, U32 weight) {
    U32 both = splat<U32>(x);
    sum = multiply_add(to_f32(both & 0xFFFFu, F16{}), to_f32(weight & 0xFFFFu, F16{}), sum);
    return multiply_add(to_f32(both >> 16, F16{}), to_f32(weight >> 16, F16{}), sum);
  }
};

// Bytes of x are unsigned (the value plus 128), those of the weights signed, as vpdpbusd has them.
struct DotInt8 {
  using Accumulator = I32;
  static I32 add(I32 sum, uint32_t x, U32 weight) {
#if defined(FERRUM_AVX512) && defined(__AVX512VNNI__)
    return bits<I32>(_mm512_dpbusd_epi32(bits<__m512i>(sum), bits<__m512i>(splat<U32>(x)), bits<__m512i>(weight)));
#elif defined(FERRUM_AVX2)
    // Bytes as pairs of 16 bits: the even ones, then the odd ones.
    __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(bits<__m256i>(weight), 8), 8);
    __m256i odd = _mm256_srai_epi16(bits<__m256i>(weight), 8);
    sum += bits<I32>(_mm256_madd_epi16(bits<__m256i>(splat<U32>(x & 0x00FF00FFu)), even));
    return sum + bits<I32>(_mm256_madd_epi16(bits<__m256i>(splat<U32>((x >> 8) & 0x00FF00FFu)), odd));
#else
    for (int byte = 0; byte < 4; ++byte) {
      I32 value = bits<I32>(weight << (24 - 8 * byte)) >> 24;
      sum += value * static_cast<int32_t>((x >> (8 * byte)) & 0xFFu);
    }
    return sum;
#endif
  }
};

// -- a tile: some rows by some columns of a panel --------------------------------------------------------------------------

// Memory to fetch while computing: `lines` cache lines for every kStride granules.
struct Ahead {
  const char* from;
  int lines;
};
inline constexpr int kStride = 16;

template <class Dot, int kRows>
void tile(const uint32_t* x, int64_t x_stride, const uint32_t* weight, int64_t granules, Ahead ahead,
          typename Dot::Accumulator (&sums)[kMaxRows][kVectors]) {
  typename Dot::Accumulator local[kRows][kVectors]{};
  for (int64_t begin = 0; begin < granules; begin += kStride) {
    for (int line = 0; line < ahead.lines; ++line) __builtin_prefetch(ahead.from + line * 64, 0, 2);
    ahead.from += ahead.lines * 64;
    const int64_t end = begin + kStride < granules ? begin + kStride : granules;
    for (int64_t k = begin; k < end; ++k) {
      U32 w[kVectors];
      for (int v = 0; v < kVectors; ++v) w[v] = load_raw<U32>(weight + k * kPanel + v * kLanes);
#pragma GCC unroll 16
      for (int row = 0; row < kRows; ++row) {
        const uint32_t value = x[row * x_stride + k];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) local[row][v] = Dot::add(local[row][v], value, w[v]);
      }
    }
  }
  for (int row = 0; row < kRows; ++row)
    for (int v = 0; v < kVectors; ++v) sums[row][v] = local[row][v];
}

template <class Dot>
using Tile = void (*)(const uint32_t* x, int64_t x_stride, const uint32_t* weight, int64_t granules, Ahead,
                      typename Dot::Accumulator (&)[kMaxRows][kVectors]);

template <class Dot, int... kRows>
Tile<Dot> tile_of(int rows, std::integer_sequence<int, kRows...>) {
  static constexpr Tile<Dot> tiles[] = {tile<Dot, kRows + 1>...};
  return tiles[rows - 1];
}

}  // namespace ferrum

#include "amx.h"

namespace ferrum {

// For 1 to kMaxRows rows.
template <class Dot>
Tile<Dot> tile_of(int rows) {
#if defined(FERRUM_AMX)
  if constexpr (kHasAmx<Dot>) {
    if (amx_is_allowed()) return amx_tile_of<Dot>(rows, std::make_integer_sequence<int, kMaxRows>{});
  }
#endif
  return tile_of<Dot>(rows, std::make_integer_sequence<int, kMaxRows>{});
}

}  // namespace ferrum
