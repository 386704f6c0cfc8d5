// The tile on machines with AMX, for bfloat16 and int8: 16 granules by 32 outputs of a panel are two of its tiles as they lie,
// and up to 16 rows of x another. A row of the product depends on its own row of x alone, so it is the same at any height.
//
// Part of tile.h.
#pragma once

#if defined(FERRUM_AVX512) && defined(__AVX512BF16__) && defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__linux__)
#define FERRUM_AMX 1

#include <sys/syscall.h>
#include <unistd.h>

namespace ferrum {

inline constexpr int kTileGranules = 16;

template <class Dot>
inline constexpr bool kHasAmx = std::is_same_v<Dot, DotBfloat16> || std::is_same_v<Dot, DotInt8>;

// The system must be asked once, for all threads: a thread's state grows by 8 KiB with its tiles.
inline bool amx_is_allowed() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  static const bool is_allowed = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return is_allowed;
}

// As ldtilecfg reads it. Tiles 0 and 1 are sums, 2 is of x, 3 and 4 are of weights.
struct alignas(64) TileShapes {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];  // of a row
  uint8_t rows[16];
};

template <class Dot>
void multiply_tiles(const uint32_t* x, int64_t x_stride, const uint32_t* weight) {
  _tile_loadd(2, x, x_stride * 4);
  _tile_loadd(3, weight, kPanel * 4);
  _tile_loadd(4, weight + kLanes, kPanel * 4);
  if constexpr (std::is_same_v<Dot, DotBfloat16>) {
    _tile_dpbf16ps(0, 2, 3);
    _tile_dpbf16ps(1, 2, 4);
  } else {
    _tile_dpbusd(0, 2, 3);
    _tile_dpbusd(1, 2, 4);
  }
}

// As `tile` does it. The tiles are the thread's only from here to the end: nobody else need know of them.
template <class Dot, int kRows>
void amx_tile(const uint32_t* x, int64_t x_stride, const uint32_t* weight, int64_t granules, Ahead ahead,
              typename Dot::Accumulator (&sums)[kMaxRows<Dot>][kVectors]) {
  static_assert(kRows <= 16 && kColumns == kPanel && sizeof(sums[0][0]) == 64);
  static constexpr TileShapes shapes{1, 0, {}, {64, 64, 64, 64, 64}, {kRows, kRows, kRows, 16, 16}};
  _tile_loadconfig(&shapes);
  _tile_zero(0);
  _tile_zero(1);
  int64_t k = 0;
  for (; k + kTileGranules <= granules; k += kTileGranules) {
    for (int line = 0; line < kTileGranules * ahead.lines; ++line)
      __builtin_prefetch(ahead.from + (k * ahead.lines + line) * 64, 0, 2);
    multiply_tiles<Dot>(x + k, x_stride, weight + k * kPanel);
  }
  if (const int64_t left = granules - k) {
    uint32_t last_x[kRows * kTileGranules]{}, last_weight[kTileGranules * kPanel]{};
    for (int row = 0; row < kRows; ++row) std::memcpy(last_x + row * kTileGranules, x + row * x_stride + k, left * 4);
    std::memcpy(last_weight, weight + k * kPanel, left * kPanel * 4);
    asm volatile("" ::: "memory");  // the compiler does not know that loading a tile reads memory
    multiply_tiles<Dot>(last_x, kTileGranules, last_weight);
  }
  _tile_stored(0, &sums[0][0], sizeof(sums[0]));
  _tile_stored(1, &sums[0][1], sizeof(sums[0]));
  _tile_release();
}

template <class Dot, int... kRows>
Tile<Dot> amx_tile_of(int rows, std::integer_sequence<int, kRows...>) {
  static constexpr Tile<Dot> tiles[] = {amx_tile<Dot, kRows + 1>...};
  return tiles[rows - 1];
}

}  // namespace ferrum

#endif
