#include "linear.h"

#include <algorithm>
#include <vector>

#include "tile.h"

namespace ferrum {
namespace {

constexpr int64_t kChunkBytes = 256 << 10;  // of weights

F32 finish(const LinearArguments&, F32 sum, int64_t, int64_t) { return sum; }

F32 finish(const LinearArguments& a, I32 sum, int64_t row, int64_t column) {
  sum -= load_raw<I32>(a.offsets + column);
  return __builtin_convertvector(sum, F32) * (load(a.scales + column) * a.x_scales[row]);
}

// Rows of x as a Dot has them.
struct Words {
  const uint32_t* words;
  int64_t stride;
};

// In place, or widened for this thread: that is little beside a chunk's products, and saves it in each of them.
template <class Dot>
Words words_of(const LinearArguments& a, int64_t first_row, int64_t rows) {
  const uint32_t* from = a.x + first_row * a.x_stride;
  if constexpr (Dot::kXWords == 1) {
    return {from, a.x_stride};
  } else {
    thread_local std::vector<float> wide;
    const int64_t width = 2 * a.granules, stride = (ceil_div(width, 16) | 1) * 16;  // an odd number of cache lines
    wide.resize(std::max<size_t>(wide.size(), rows * stride));
    for (int64_t row = 0; row < rows; ++row) {
      const auto* halves = reinterpret_cast<const typename Dot::Half*>(from + row * a.x_stride);
      for_vectors(width, [&](int64_t at, int count) {
        store(wide.data() + row * stride + at, load(halves + at, count), count);
      });
    }
    return {reinterpret_cast<const uint32_t*>(wide.data()), stride};
  }
}

template <class Dot, class T>
void panel(const LinearArguments& a, const Words& x, int64_t rows, int64_t first_row, int64_t index) {
  const auto* weight = a.weight + index * a.granules * kPanel;
  const auto* next = reinterpret_cast<const char*>(weight + a.granules * kPanel);
  const int64_t passes = ceil_div(rows, kMaxRows<Dot>) * (kPanel / kColumns);
  // The next panel comes into the second-level cache, evenly over all the passes over this one.
  const int64_t blocks = ceil_div(a.granules, kStride);
  const auto lines = static_cast<int>(ceil_div(2 * kStride, passes));
  int64_t pass = 0;
  for (int64_t row = 0, tiles = ceil_div(rows, kMaxRows<Dot>); tiles > 0; --tiles) {
    const int height = static_cast<int>(ceil_div(rows - row, tiles));  // tiles of like height
    const auto compute = tile_of<Dot>(height);
    for (int part = 0; part < kPanel; part += kColumns, ++pass) {
      const int64_t column = index * kPanel + part;
      if (column >= a.width) break;
      typename Dot::Accumulator sums[kMaxRows<Dot>][kVectors];
      compute(x.words + row * x.stride, x.stride, weight + part, a.granules,
              {next + pass * blocks * lines * 64, pass * blocks * lines < 2 * a.granules ? lines : 0}, sums);
      for (int r = 0; r < height; ++r) {
        auto* out = static_cast<T*>(a.out) + (first_row + row + r) * a.stride;
        for (int v = 0; v < kVectors; ++v) {
          const int64_t at = column + v * kLanes;
          const auto count = static_cast<int>(std::min<int64_t>(kLanes, a.width - at));
          if (count <= 0) break;
          F32 value = finish(a, sums[r][v], first_row + row + r, at);
          if (a.bias) value += load(a.bias + at);
          store(out + at, value, count);
        }
      }
    }
    row += height;
  }
}

int64_t panels_per_chunk(const LinearArguments& a) { return std::max<int64_t>(1, kChunkBytes / (a.granules * kPanel * 4)); }

// Of `rows` rows from `first_row` on.
template <class Dot, class T>
void chunk_of(const LinearArguments& a, int64_t first_row, int64_t rows, int64_t chunk) {
  const int64_t panels = ceil_div(a.width, kPanel), step = panels_per_chunk(a), across = linear_chunks_across(a);
  const int64_t skipped = chunk / across * kLinearRows, first = chunk % across * step;
  rows = std::min(kLinearRows, rows - skipped);
  first_row += skipped;
  const Words x = words_of<Dot>(a, first_row, rows);
  for (int64_t index = first; index < std::min(first + step, panels); ++index) panel<Dot, T>(a, x, rows, first_row, index);
}

template <class T>
void chunk_of(const LinearArguments& a, int64_t first_row, int64_t rows, int64_t chunk) {
  switch (a.kind) {
    case Kind::kFloat32: return chunk_of<DotFloat32, T>(a, first_row, rows, chunk);
    case Kind::kBfloat16: return chunk_of<DotBfloat16, T>(a, first_row, rows, chunk);
    case Kind::kFloat16: return chunk_of<DotFloat16, T>(a, first_row, rows, chunk);
    case Kind::kInt8: return chunk_of<DotInt8, T>(a, first_row, rows, chunk);
  }
}

int64_t linear_count(const Instruction& i, const Sizes& sizes) {
  return linear_chunks_across(i.as<LinearArguments>()) * ceil_div(sizes(i.rows), kLinearRows);
}

void linear_run(const Instruction& i, const Sizes& sizes, int64_t chunk) {
  linear_chunk(i.type, i.as<LinearArguments>(), 0, sizes(i.rows), chunk);
}

// -- rows of x as granules -------------------------------------------------------------------------------------------------

constexpr int64_t kRowsPerPrepare = 16;

template <class T>
float largest(const T* x, int64_t width) {
  F32 most{};
  for_vectors(width, [&](int64_t at, int count) {
    F32 value = load(x + at, count);
    most = max(most, bits<F32>(bits<U32>(value) & 0x7FFFFFFFu));
  });
  return highest(most);
}

// Rounded to -127 … 127 by a scale of the row's own, a vector at a time. A row that holds no number keeps none: its scale is NaN.
// Where the scale's inverse would be infinite the row is as good as 0.
template <class T, class Write>
float quantize(const T* x, int64_t width, Write write) {
  float scale = largest(x, width) / 127.0f;
  const float inverse = scale >= 0x1p-126f ? 1.0f / scale : 0.0f;
  F32 unsound{};
  for_vectors(width, [&](int64_t at, int count) {
    F32 value = load(x + at, count);
    unsound += value - value;  // not 0 for what is no number
    write(at, round_to_int(min(max(value * inverse, splat<F32>(-127.0f)), splat<F32>(127.0f))), count);
  });
  return sum(unsound) == 0.0f ? scale : NAN;
}

int64_t prepare_count(const Instruction& i, const Sizes& sizes) { return ceil_div(sizes(i.rows), kRowsPerPrepare); }

template <class T>
void prepare_row(const PrepareArguments& a, int64_t row) {
  const T* x = static_cast<const T*>(a.x) + row * a.stride;
  uint32_t* out = a.out + row * a.out_stride;
  if (a.kind == Kind::kInt8) {
    out[a.width / 4] = 0;
    auto* bytes = reinterpret_cast<uint8_t*>(out);
    a.scales[row] = quantize(x, a.width, [&](int64_t at, I32 values, int count) {
      const auto moved = __builtin_convertvector(values + 128, U8);
      std::memcpy(bytes + at, &moved, count);
    });
    // A byte that is no part of the row meets a weight of 0.
    return;
  }
  if (a.width % per_granule(a.kind)) out[a.width / 2] = 0;
  std::memcpy(out, x, a.width * sizeof(T));
}

void prepare_run(const Instruction& i, const Sizes& sizes, int64_t chunk) {
  const auto& a = i.as<PrepareArguments>();
  const int64_t end = std::min((chunk + 1) * kRowsPerPrepare, sizes(i.rows));
  for (int64_t row = chunk * kRowsPerPrepare; row < end; ++row) {
    switch (i.type) {
      case Type::kFloat32: prepare_row<float>(a, row); break;
      case Type::kBfloat16: prepare_row<Bf16>(a, row); break;
      default: prepare_row<F16>(a, row);
    }
  }
}

// -- weights as panels -----------------------------------------------------------------------------------------------------

template <class T>
void pack_of(const T* weight, int64_t rows, int64_t width, Kind kind, uint32_t* out, float* scales, int32_t* offsets) {
  const int64_t each = per_granule(kind), granules = ceil_div(width, each), size = 4 / each;
  for (int64_t row = 0; row < rows; ++row) {
    const T* x = weight + row * width;
    auto* column = reinterpret_cast<uint8_t*>(out + row / kPanel * granules * kPanel + row % kPanel);
    const auto at = [&](int64_t k) { return column + k / each * kPanel * 4 + k % each * size; };
    if (kind == Kind::kInt8) {
      int64_t total = 0;
      scales[row] = quantize(x, width, [&](int64_t first, I32 values, int count) {
        for (int i = 0; i < count; ++i) {
          *at(first + i) = static_cast<uint8_t>(values[i]);
          total += values[i];
        }
      });
      offsets[row] = static_cast<int32_t>(total * 128);
    } else {
      for (int64_t k = 0; k < width; ++k) std::memcpy(at(k), x + k, sizeof(T));
    }
  }
}

}  // namespace

int64_t linear_chunks_across(const LinearArguments& a) { return ceil_div(ceil_div(a.width, kPanel), panels_per_chunk(a)); }

void linear_chunk(Type type, const LinearArguments& a, int64_t first_row, int64_t rows, int64_t chunk) {
  switch (type) {
    case Type::kFloat32: return chunk_of<float>(a, first_row, rows, chunk);
    case Type::kBfloat16: return chunk_of<Bf16>(a, first_row, rows, chunk);
    default: return chunk_of<F16>(a, first_row, rows, chunk);
  }
}

void pack(Type type, const void* weight, int64_t rows, int64_t width, Kind kind, uint32_t* out, float* scales, int32_t* offsets) {
  switch (type) {
    case Type::kFloat32: return pack_of(static_cast<const float*>(weight), rows, width, kind, out, scales, offsets);
    case Type::kBfloat16: return pack_of(static_cast<const Bf16*>(weight), rows, width, kind, out, scales, offsets);
    default: return pack_of(static_cast<const F16*>(weight), rows, width, kind, out, scales, offsets);
  }
}

const Kernel kPrepareKernel{prepare_count, prepare_run};
const Kernel kLinearKernel{linear_count, linear_run};

}  // namespace ferrum
