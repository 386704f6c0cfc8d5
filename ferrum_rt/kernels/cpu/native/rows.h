// What is done to each row of a batch by itself: norms, rotations, activations, look-ups, the largest of a row of logits.
#pragma once

#include <algorithm>

#include "program.h"
#include "simd.h"

namespace ferrum {

// Strides are those of rows, in elements; within a row all elements are adjacent.

struct GatherArguments {
  void* out;
  int64_t stride;
  int64_t width;
  const void* x;
  int64_t x_stride;
  const int64_t* rows;  // of x
  double scale;         // rounded to the type before it multiplies
};

struct NormArguments {
  void* out;
  int64_t stride;
  int64_t width;
  const void* x;  // may be out
  int64_t x_stride;
  void* residual;  // x is added to it, and it is normed instead; or null
  int64_t residual_stride;
  const float* weight;
  double eps;
};

struct RopeArguments {
  void* qk;
  int64_t stride;
  int64_t head_stride;
  int64_t heads;
  int64_t dim;
  const float* weight;  // [heads, dim], or null
  int64_t weight_stride;
  double eps;
  const int64_t* positions;
  const float* cos_sin;  // half cosines, then half sines
  int64_t cos_sin_stride;
  int64_t half;  // of the dimensions that are rotated
};

enum class Activation : int64_t { kSilu, kGeluTanh };

struct GateArguments {
  void* out;
  int64_t stride;
  int64_t width;        // of out
  const void* gate_up;  // rows of twice the width
  int64_t gate_up_stride;
  Activation kind;
};

struct CapArguments {
  void* x;
  int64_t stride;
  int64_t width;
  double cap;
};

struct ArgmaxArguments {
  float* values;
  int64_t* ids;
  const void* logits;
  int64_t stride;
  int64_t width;
};

// Calls `body` with a value of the element type.
template <class Body>
void with_type(Type type, Body body) {
  switch (type) {
    case Type::kFloat32: return body(float{});
    case Type::kBfloat16: return body(Bf16{});
    default: return body(F16{});
  }
}

// So much, and not more than so many rows, is a chunk.
constexpr int64_t kChunkElements = 32 << 10;
constexpr int64_t kChunkRows = 16;

// A kernel that goes from row to row: Work::row<T>(arguments, row) does one, of Work::elements(arguments).
template <class Work>
struct ByRows {
  using Arguments = typename Work::Arguments;

  static int64_t step(const Arguments& a) {
    return std::clamp<int64_t>(kChunkElements / std::max<int64_t>(Work::elements(a), 1), 1, kChunkRows);
  }

  static int64_t count(const Instruction& i, const Sizes& sizes) {
    return ceil_div(sizes(i.rows), step(i.as<Arguments>()));
  }

  static void run(const Instruction& i, const Sizes& sizes, int64_t chunk) {
    const auto& a = i.as<Arguments>();
    const int64_t first = chunk * step(a), end = std::min(first + step(a), sizes(i.rows));
    with_type(i.type, [&](auto type) {
      for (int64_t row = first; row < end; ++row) Work::template row<decltype(type)>(a, row);
    });
  }
};

}  // namespace ferrum
