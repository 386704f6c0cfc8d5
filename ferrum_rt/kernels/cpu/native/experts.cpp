#include "experts.h"

#include "rows.h"

namespace ferrum {
namespace {

struct Route {
  using Arguments = RouteArguments;
  static int64_t elements(const Arguments& a) { return a.num_experts; }

  template <class T>
  static void row(const Arguments& a, int64_t row) {
    const auto* logits = static_cast<const T*>(a.logits) + row * a.stride;
    int64_t* chosen = a.chosen + row * a.top_k;
    float* weights = a.weights + row * a.top_k;
    // By their logits, whose order is that of the shares, but finer. Whatever a row holds, top_k of the experts are chosen.
    for (int64_t expert = 0; expert < a.num_experts; ++expert) {
      const float logit = load(logits + expert, 1)[0];
      int64_t at = std::min(expert, a.top_k);
      if (at == a.top_k && !(logit > weights[at - 1])) continue;
      for (at = std::min(at, a.top_k - 1); at > 0 && logit > weights[at - 1]; --at) {
        weights[at] = weights[at - 1];
        chosen[at] = chosen[at - 1];
      }
      weights[at] = logit;
      chosen[at] = expert;
    }
    const float highest = weights[0];
    F32 total{};
    for_vectors(a.num_experts, [&](int64_t at, int count) {
      F32 value = load(logits + at, count);
      for (int i = count; i < kLanes; ++i) value[i] = -INFINITY;
      total += exp(value - highest);
    });
    float kept = 0.0f;
    for (int64_t rank = 0; rank < a.top_k; ++rank) {
      weights[rank] = exp(splat<F32>(weights[rank] - highest))[0] / sum(total);
      kept += weights[rank];
    }
    if (!a.renormalize) return;
    for (int64_t rank = 0; rank < a.top_k; ++rank) weights[rank] /= kept;
  }
};

int64_t group_count(const Instruction&, const Sizes&) { return 1; }

void group_run(const Instruction& i, const Sizes& sizes, int64_t) {
  const auto& a = i.as<GroupArguments>();
  const int64_t size = sizes(i.rows) * a.top_k;
  // Numbers of rows, then where the next row goes, which in the end is where the next expert's rows start.
  int64_t* next = a.starts + 1;
  std::fill_n(a.starts, a.num_experts + 1, 0);
  for (int64_t at = 0; at < size; ++at) ++next[a.chosen[at]];
  for (int64_t expert = 0, before = 0; expert < a.num_experts; ++expert) {
    const int64_t rows = next[expert];
    next[expert] = before;
    before += rows;
  }
  for (int64_t at = 0; at < size; ++at) {
    const int64_t row = next[a.chosen[at]]++;
    a.tokens[row] = at / a.top_k;
    a.places[at] = row;
  }
}

// Calls `body(expert, number of its chunks)` until it has found what it wants.
template <class Body>
void for_experts(const ExpertsLinearArguments& a, Body body) {
  const int64_t across = linear_chunks_across(a.linear);
  for (int64_t expert = 0; expert < a.num_experts; ++expert)
    if (body(expert, across * ceil_div(a.starts[expert + 1] - a.starts[expert], kLinearRows))) return;
}

int64_t experts_linear_count(const Instruction& i, const Sizes&) {
  int64_t total = 0;
  for_experts(i.as<ExpertsLinearArguments>(), [&](int64_t, int64_t count) {
    total += count;
    return false;
  });
  return total;
}

void experts_linear_run(const Instruction& i, const Sizes&, int64_t chunk) {
  const auto& a = i.as<ExpertsLinearArguments>();
  for_experts(a, [&](int64_t expert, int64_t count) {
    if (chunk >= count) {
      chunk -= count;
      return false;
    }
    const Expert& own = a.experts[expert];
    LinearArguments linear = a.linear;
    linear.weight = own.weight;
    linear.bias = own.bias;
    linear.scales = own.scales;
    linear.offsets = own.offsets;
    linear_chunk(i.type, linear, a.starts[expert], a.starts[expert + 1] - a.starts[expert], chunk);
    return true;
  });
}

struct Combine {
  using Arguments = CombineArguments;
  static int64_t elements(const Arguments& a) { return a.width * a.top_k; }

  // In the order of the ranks, in float32, rounded once.
  template <class T>
  static void row(const Arguments& a, int64_t row) {
    auto* out = static_cast<T*>(a.out) + row * a.stride;
    const auto* results = static_cast<const T*>(a.results);
    const int64_t* places = a.places + row * a.top_k;
    const float* weights = a.weights + row * a.top_k;
    for_vectors(a.width, [&](int64_t at, int count) {
      F32 total{};
      for (int64_t rank = 0; rank < a.top_k; ++rank)
        total = multiply_add(splat<F32>(weights[rank]), load(results + places[rank] * a.results_stride + at, count), total);
      store(out + at, total, count);
    });
  }
};

}  // namespace

const Kernel kRouteKernel{ByRows<Route>::count, ByRows<Route>::run};
const Kernel kGroupKernel{group_count, group_run};
const Kernel kExpertsLinearKernel{experts_linear_count, experts_linear_run};
const Kernel kCombineKernel{ByRows<Combine>::count, ByRows<Combine>::run};

}  // namespace ferrum
