// AMX as Intel's manual defines it, but for flushing what is denormal, in plain C++: put before everything else (-include) it
// takes the place of the instructions, and says that the processor has them and the system allows them.
#pragma once

#include <immintrin.h>
#include <sys/syscall.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#define __AMX_TILE__ 1
#define __AMX_BF16__ 1
#define __AMX_INT8__ 1
// A call that always succeeds instead of the request for permission.
#undef SYS_arch_prctl
#define SYS_arch_prctl SYS_sched_yield

namespace emulated {

struct Config {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(Config) == 64);

inline thread_local Config config{};
inline thread_local uint8_t tiles[8][16][64];

// What the processor answers with an exception.
inline void need(bool condition) {
  if (!condition) std::abort();
}

inline void load_config(const void* from) {
  std::memcpy(&config, from, sizeof(config));
  need(config.palette == 1 && config.start_row == 0);
  for (int tile = 0; tile < 8; ++tile) need(config.bytes[tile] <= 64 && config.rows[tile] <= 16);
  std::memset(tiles, 0, sizeof(tiles));
}

inline void release() { config = {}; }

inline void zero(int tile) {
  need(config.rows[tile] > 0);
  std::memset(tiles[tile], 0, sizeof(tiles[tile]));
}

inline void load(int tile, const void* from, int64_t stride) {
  zero(tile);
  for (int row = 0; row < config.rows[tile]; ++row)
    std::memcpy(tiles[tile][row], static_cast<const char*>(from) + row * stride, config.bytes[tile]);
}

inline void store(int tile, void* to, int64_t stride) {
  need(config.rows[tile] > 0);
  for (int row = 0; row < config.rows[tile]; ++row)
    std::memcpy(static_cast<char*>(to) + row * stride, tiles[tile][row], config.bytes[tile]);
}

inline float wide(const uint8_t* bf16) {
  const uint32_t raw = (bf16[0] | bf16[1] << 8) << 16;
  float value;
  std::memcpy(&value, &raw, 4);
  return value;
}

// sum(m, n, row k of x's tile, of the weights'): a 32-bit word of the sums' tile.
template <class Word, class Sum>
void multiply(int sums, int x, int weight, Sum sum) {
  need(config.rows[sums] == config.rows[x] && config.bytes[sums] == config.bytes[weight]);
  need(config.bytes[x] == 4 * config.rows[weight] && sums != x && sums != weight && x != weight);
  for (int m = 0; m < config.rows[sums]; ++m) {
    for (int n = 0; n < config.bytes[sums] / 4; ++n) {
      Word before;
      std::memcpy(&before, &tiles[sums][m][4 * n], 4);
      const Word after = before + sum(tiles[x][m], n, config.rows[weight]);
      std::memcpy(&tiles[sums][m][4 * n], &after, 4);
    }
  }
}

inline void multiply_bf16(int sums, int x, int weight) {
  multiply<float>(sums, x, weight, [&](const uint8_t* row, int n, int count) {
    float even = 0, odd = 0;
    for (int k = 0; k < count; ++k) {
      even = std::fma(wide(row + 4 * k), wide(&tiles[weight][k][4 * n]), even);
      odd = std::fma(wide(row + 4 * k + 2), wide(&tiles[weight][k][4 * n + 2]), odd);
    }
    return even + odd;
  });
}

inline void multiply_int8(int sums, int x, int weight) {
  multiply<int32_t>(sums, x, weight, [&](const uint8_t* row, int n, int count) {
    int32_t total = 0;
    for (int k = 0; k < 4 * count; ++k) total += row[k] * static_cast<int8_t>(tiles[weight][k / 4][4 * n + k % 4]);
    return total;
  });
}

}  // namespace emulated

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#undef _tile_dpbusd
#define _tile_loadconfig emulated::load_config
#define _tile_release emulated::release
#define _tile_zero emulated::zero
#define _tile_loadd emulated::load
#define _tile_stored emulated::store
#define _tile_dpbf16ps emulated::multiply_bf16
#define _tile_dpbusd emulated::multiply_int8
