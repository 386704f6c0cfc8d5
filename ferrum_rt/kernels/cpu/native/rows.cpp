#include "rows.h"

namespace ferrum {
namespace {

struct Gather {
  using Arguments = GatherArguments;
  static int64_t elements(const Arguments& a) { return a.width; }

  template <class T>
  static void row(const Arguments& a, int64_t row) {
    auto* out = static_cast<T*>(a.out) + row * a.stride;
    const auto* x = static_cast<const T*>(a.x) + a.rows[row] * a.x_stride;
    if (a.scale == 1.0) {
      std::memcpy(out, x, a.width * sizeof(T));
      return;
    }
    const auto scale = round_to<T>(static_cast<float>(a.scale));
    for_vectors(a.width, [&](int64_t at, int count) { store(out + at, load(x + at, count) * scale, count); });
  }
};

// What a row is multiplied by to have a mean square of 1.
template <class T>
float norm_factor(const T* x, int64_t width, double eps) {
  F32 squares{};
  for_vectors(width, [&](int64_t at, int count) {
    const F32 value = load(x + at, count);
    squares = multiply_add(value, value, squares);
  });
  return 1.0f / std::sqrt(sum(squares) / static_cast<float>(width) + static_cast<float>(eps));
}

struct RmsNorm {
  using Arguments = NormArguments;
  static int64_t elements(const Arguments& a) { return a.width; }

  template <class T>
  static void row(const Arguments& a, int64_t row) {
    auto* out = static_cast<T*>(a.out) + row * a.stride;
    const auto* x = static_cast<const T*>(a.x) + row * a.x_stride;
    if (a.residual) {
      auto* residual = static_cast<T*>(a.residual) + row * a.residual_stride;
      for_vectors(a.width, [&](int64_t at, int count) {
        store(residual + at, load(residual + at, count) + load(x + at, count), count);
      });
      x = residual;
    }
    const float factor = norm_factor(x, a.width, a.eps);
    for_vectors(a.width, [&](int64_t at, int count) {
      store(out + at, load(x + at, count) * factor * load(a.weight + at, count), count);
    });
  }
};

struct QkNormRope {
  using Arguments = RopeArguments;
  static int64_t elements(const Arguments& a) { return a.heads * a.dim; }

  template <class T>
  static void row(const Arguments& a, int64_t row) {
    const float* cos_sin = a.cos_sin + a.positions[row] * a.cos_sin_stride;
    for (int64_t index = 0; index < a.heads; ++index) {
      auto* x = static_cast<T*>(a.qk) + row * a.stride + index * a.head_stride;
      if (a.weight)
        normed_head(a, x, cos_sin, a.weight + index * a.weight_stride);
      else
        turn(x, cos_sin, a.half, [](F32 value, int64_t, int) { return value; });
    }
  }

  template <class T>
  static void normed_head(const Arguments& a, T* x, const float* cos_sin, const float* weight) {
    const float factor = norm_factor(x, a.dim, a.eps);
    const auto norm = [&](F32 value, int64_t at, int count) { return value * factor * load(weight + at, count); };
    turn(x, cos_sin, a.half, norm);
    const int64_t rest = 2 * a.half;
    for_vectors(a.dim - rest, [&](int64_t at, int count) {
      store(x + rest + at, norm(load(x + rest + at, count), rest + at, count), count);
    });
  }

  template <class T, class Norm>
  static void turn(T* x, const float* cos_sin, int64_t half, Norm norm) {
    for_vectors(half, [&](int64_t at, int count) {
      const F32 cos = load(cos_sin + at, count), sin = load(cos_sin + half + at, count);
      const F32 first = norm(load(x + at, count), at, count);
      const F32 second = norm(load(x + half + at, count), half + at, count);
      store(x + at, first * cos - second * sin, count);
      store(x + half + at, second * cos + first * sin, count);
    });
  }
};

struct GatedActivation {
  using Arguments = GateArguments;
  static int64_t elements(const Arguments& a) { return a.width; }

  template <class T>
  static void row(const Arguments& a, int64_t row) {
    if (a.kind == Activation::kSilu)
      gated<T>(a, row, [](F32 x) { return x / (1.0f + exp(-x)); });
    else
      gated<T>(a, row, [](F32 x) { return 0.5f * x * (1.0f + tanh(0.79788456f * (x + 0.044715f * x * x * x))); });
  }

  template <class T, class Activate>
  static void gated(const Arguments& a, int64_t row, Activate activate) {
    auto* out = static_cast<T*>(a.out) + row * a.stride;
    const auto* gate = static_cast<const T*>(a.gate_up) + row * a.gate_up_stride;
    const T* up = gate + a.width;
    for_vectors(a.width, [&](int64_t at, int count) {
      store(out + at, activate(load(gate + at, count)) * load(up + at, count), count);
    });
  }
};

// -- rows as long as the vocabulary ----------------------------------------------------------------------------------------

constexpr int64_t kCapColumns = 8 << 10;  // in a chunk

int64_t soft_cap_count(const Instruction& i, const Sizes& sizes) {
  return sizes(i.rows) * ceil_div(i.as<CapArguments>().width, kCapColumns);
}

void soft_cap_run(const Instruction& i, const Sizes&, int64_t chunk) {
  const auto& a = i.as<CapArguments>();
  const int64_t across = ceil_div(a.width, kCapColumns), first = chunk % across * kCapColumns;
  const auto cap = static_cast<float>(a.cap);
  with_type(i.type, [&](auto type) {
    auto* x = static_cast<decltype(type)*>(a.x) + chunk / across * a.stride + first;
    for_vectors(std::min(kCapColumns, a.width - first), [&](int64_t at, int count) {
      store(x + at, tanh(load(x + at, count) / cap) * cap, count);
    });
  });
}

struct Argmax {
  using Arguments = ArgmaxArguments;
  static int64_t elements(const Arguments& a) { return a.width; }

  // Where the largest is becomes known by blocks; only in the one that has it is it looked for.
  static constexpr int64_t kBlock = 64 * kLanes;

  template <class T>
  static void row(const Arguments& a, int64_t row) {
    const auto* x = static_cast<const T*>(a.logits) + row * a.stride;
    float best = -INFINITY;
    int64_t start = 0;
    for (int64_t at = 0; at < a.width; at += kBlock) {
      const float value = largest(x + at, std::min(kBlock, a.width - at));
      if (value <= best) continue;
      best = value;
      start = at;
      if (value != value) break;
    }
    a.values[row] = best;
    a.ids[row] = start + find(x + start, std::min(kBlock, a.width - start), best);
  }

  // NaN if there is one.
  template <class T>
  static float largest(const T* x, int64_t size) {
    constexpr int kApart = 4;  // maxima that do not wait for each other
    F32 most[kApart];
    I32 is_nan[kApart]{};
    for (F32& value : most) value = splat<F32>(-INFINITY);
    const auto take = [&](F32 value, int i) {
      most[i] = max(value, most[i]);
      is_nan[i] |= value != value;
    };
    int64_t at = 0;
    for (; at + kApart * kLanes <= size; at += kApart * kLanes)
      for (int i = 0; i < kApart; ++i) take(load(x + at + i * kLanes), i);
    for (; at + kLanes <= size; at += kLanes) take(load(x + at), 0);
    for (; at < size; ++at) take(splat<F32>(load(x + at, 1)[0]), 0);
    const I32 any_nan = is_nan[0] | is_nan[1] | is_nan[2] | is_nan[3];
    for (int i = 0; i < kLanes; ++i)
      if (any_nan[i]) return NAN;
    return highest(max(max(most[0], most[1]), max(most[2], most[3])));
  }

  template <class T>
  static int64_t find(const T* x, int64_t size, float wanted) {
    for (int64_t at = 0;; at += kLanes) {
      const F32 value = load(x + at, static_cast<int>(std::min<int64_t>(kLanes, size - at)));
      for (int i = 0; i < kLanes; ++i)
        if (value[i] == wanted || (value[i] != value[i] && wanted != wanted)) return at + i;
    }
  }
};

}  // namespace

const Kernel kGatherKernel{ByRows<Gather>::count, ByRows<Gather>::run};
const Kernel kRmsNormKernel{ByRows<RmsNorm>::count, ByRows<RmsNorm>::run};
const Kernel kQkNormRopeKernel{ByRows<QkNormRope>::count, ByRows<QkNormRope>::run};
const Kernel kGatedActivationKernel{ByRows<GatedActivation>::count, ByRows<GatedActivation>::run};
const Kernel kSoftCapKernel{soft_cap_count, soft_cap_run};
const Kernel kArgmaxKernel{ByRows<Argmax>::count, ByRows<Argmax>::run};

}  // namespace ferrum
