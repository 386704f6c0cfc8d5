// Linear layers. Both factors are made of granules of four bytes along the inner dimension: two bfloat16, four int8, a float,
// or two halves. Weights lie in panels of 32 outputs, [panels][granules][32], packed once, at load; rows of x are brought into
// granules before each multiplication (kPrepare), with a stride that does not make them fall on each other in the cache.
//
// Each output is summed up by one accumulator, granule by granule. So it depends neither on the batch nor on the thread.
#pragma once

#include "program.h"
#include "tile.h"

namespace ferrum {

inline constexpr int64_t kLinearRows = 20 * kMaxRows<DotFloat32>;

// What the granules hold, as the Python side numbers them.
enum class Kind : int64_t { kFloat32, kBfloat16, kFloat16, kInt8 };

inline int64_t per_granule(Kind kind) { return kind == Kind::kFloat32 ? 1 : kind == Kind::kInt8 ? 4 : 2; }

struct PrepareArguments {
  const void* x;
  int64_t stride;  // of x, in elements
  int64_t width;   // of a row of x
  uint32_t* out;
  int64_t out_stride;  // in granules
  float* scales;       // [rows], for int8
  Kind kind;
};

struct LinearArguments {
  void* out;
  int64_t stride;  // of out, in elements
  int64_t width;   // of a row of out
  const uint32_t* x;
  int64_t x_stride;  // in granules
  const uint32_t* weight;
  int64_t granules;      // of a row of x
  const float* bias;      // [panels * 32], or null
  const float* x_scales;  // [rows], for int8
  const float* scales;    // [panels * 32], for int8
  const int32_t* offsets;  // [panels * 32]: what the 128 added to each byte of x comes to, for int8
  Kind kind;
};

// A part of what `rows` rows from `first_row` on make, `type` being that of out: for each kLinearRows of them, or fewer, there are
// so many chunks across the width.
int64_t linear_chunks_across(const LinearArguments& a);
void linear_chunk(Type type, const LinearArguments& a, int64_t first_row, int64_t rows, int64_t chunk);

// The weights [rows, width] of `type` as panels; for int8 they are scaled by row, and the scales and offsets written.
void pack(Type type, const void* weight, int64_t rows, int64_t width, Kind kind, uint32_t* out, float* scales, int32_t* offsets);

}  // namespace ferrum
