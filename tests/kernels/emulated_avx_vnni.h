// What the kernels use of AVX-VNNI, as Intel's manual defines it, in plain C++: put before everything else (-include) it takes
// the place of the instruction, and says that the processor has it.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define __AVXVNNI__ 1

namespace emulated {

// To each of eight sums the products of four bytes, unsigned by signed.
inline __m256i multiply_bytes(__m256i sums, __m256i x, __m256i weights) {
  int32_t result[8];
  uint8_t left[32];
  int8_t right[32];
  std::memcpy(result, &sums, 32);
  std::memcpy(left, &x, 32);
  std::memcpy(right, &weights, 32);
  for (int at = 0; at < 32; ++at) result[at / 4] += left[at] * right[at];
  std::memcpy(&sums, result, 32);
  return sums;
}

}  // namespace emulated

#define _mm256_dpbusd_avx_epi32 emulated::multiply_bytes
