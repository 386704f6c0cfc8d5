// Draws tokens from rows of logits, as kernels/sampling.py says: one uniform number for each (seed, position, sample) inverts the
// cumulative weights. In the order of ids where the whole vocabulary is in play, else of logits; of equal ones the lower id first.
#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <vector>

#include "rows.h"

namespace ferrum {
namespace {

struct Key {
  int64_t seed, sample;
};

struct Cut {
  double temperature;  // 0: the row keeps its likeliest
  double top_k;        // 0: all
  double top_p;
  double min_p;
};

struct DrawArguments {
  int64_t* ids;
  const float* highest;
  const void* logits;
  int64_t stride;
  int64_t width;
  const int64_t* positions;  // of the batch's rows; a token is drawn for the next one
  const int64_t* rows;       // of the batch, by row of logits
  const Key* keys;
  const Cut* cuts;
};

struct Candidate {
  float logit, weight;
  int64_t id;

  bool operator<(const Candidate& other) const { return logit > other.logit || (logit == other.logit && id < other.id); }
};

constexpr int64_t kBlock = 128;
static_assert(kBlock % kLanes == 0);

// Weights, which are 1 at most, by their exponent and the first five bits behind it; the heaviest first.
constexpr int kBinShift = 18;
constexpr int64_t kBins = (std::bit_cast<uint32_t>(1.0f) >> kBinShift) + 1;

int64_t bin_of(float weight) { return std::max<int64_t>(0, kBins - 1 - (std::bit_cast<uint32_t>(weight) >> kBinShift)); }

float lightest_of(int64_t bin) { return std::bit_cast<float>(static_cast<uint32_t>(kBins - 1 - bin) << kBinShift); }

// SplitMix64's finalizer (Steele et al., OOPSLA 2014).
uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

// In [0, 1).
double uniform(const Key& key, int64_t position) {
  constexpr uint64_t kGolden = 0x9E3779B97F4A7C15u;
  uint64_t mixed = mix(static_cast<uint64_t>(key.seed) + kGolden);
  mixed = mix(mixed + (static_cast<uint64_t>(key.sample) + 1) * kGolden);
  mixed = mix(mixed + (static_cast<uint64_t>(position) + 1) * kGolden);
  return static_cast<double>(mixed >> 11) * 0x1p-53;
}

// The first place whose cumulative weight is above the target; the last with any weight where rounding would point past it.
template <class Weight>
int64_t invert(int64_t size, double target, Weight weight, double* before = nullptr) {
  double sum = 0.0;
  int64_t last = 0;
  for (int64_t at = 0; at < size; ++at) {
    const double more = weight(at);
    if (more <= 0) continue;
    last = at;
    if (before != nullptr) *before = sum;
    sum += more;
    if (sum > target) break;
  }
  return last;
}

// What a thread works in.
struct Work {
  std::vector<float> weights;  // of a row, with zeros up to a whole block
  std::vector<float> blocks;   // a number for each block
  std::vector<double> bins;    // the weights in each
  std::vector<Candidate> candidates;
};

template <class T>
class Row {
 public:
  Row(const DrawArguments& a, int64_t row, Work& work)
      : x_(static_cast<const T*>(a.logits) + row * a.stride), width_(a.width), highest_(a.highest[row]), cut_(a.cuts[row]),
        draw_(uniform(a.keys[row], a.positions[a.rows[row]] + 1)), work_(work) {}

  int64_t draw() {
    if (cut_.top_k > 0 && cut_.top_k < static_cast<double>(width_)) {
      find_best(static_cast<int64_t>(cut_.top_k));
      double total = 0.0;
      for (Candidate& candidate : work_.candidates) total += candidate.weight = weigh(splat<F32>(candidate.logit))[0];
      return draw_candidate(total);
    }
    const double total = weigh_all();
    if (cut_.top_k <= 0 && cut_.top_p >= 1 && cut_.min_p <= 0) return draw_from_all(total);
    return draw_heavy(total);
  }

 private:
  F32 weigh(F32 logits) const { return exp((logits - highest_) / static_cast<float>(cut_.temperature)); }

  // All weights; their sum.
  double weigh_all() {
    const int64_t num_blocks = ceil_div(width_, kBlock);
    work_.weights.resize(num_blocks * kBlock);
    work_.blocks.resize(num_blocks);
    float* weights = work_.weights.data();
    for_vectors(width_, [&](int64_t at, int count) { store(weights + at, weigh(load(x_ + at, count)), count); });
    std::fill(weights + width_, weights + num_blocks * kBlock, 0.0f);
    double total = 0.0;
    for (int64_t block = 0; block < num_blocks; ++block) {
      F32 part{};
      for (int64_t at = block * kBlock; at < (block + 1) * kBlock; at += kLanes) part += load(weights + at);
      total += work_.blocks[block] = sum(part);
    }
    return total;
  }

  int64_t draw_from_all(double total) const {
    const double target = draw_ * total;
    double before = 0.0;
    const auto block_at = [&](int64_t block) { return double{work_.blocks[block]}; };
    const int64_t block = invert(static_cast<int64_t>(work_.blocks.size()), target, block_at, &before);
    const float* weights = work_.weights.data() + block * kBlock;
    return block * kBlock + invert(kBlock, target - before, [&](int64_t at) { return double{weights[at]}; });
  }

  // The `count` likeliest, in their order: they are in the blocks with the `count` largest maxima.
  void find_best(int64_t count) {
    const int64_t num_blocks = ceil_div(width_, kBlock);
    work_.blocks.resize(num_blocks);
    for (int64_t block = 0; block < num_blocks; ++block) {
      const int64_t first = block * kBlock;
      F32 most = splat<F32>(-INFINITY);
      for_vectors(std::min(kBlock, width_ - first), [&](int64_t at, int size) {
        F32 value = load(x_ + first + at, size);
        for (int lane = size; lane < kLanes; ++lane) value[lane] = -INFINITY;
        most = max(value, most);
      });
      work_.blocks[block] = highest(most);
    }
    float least = -INFINITY;
    if (count < num_blocks) {
      work_.weights.assign(work_.blocks.begin(), work_.blocks.end());
      const auto place = work_.weights.begin() + count - 1;
      std::nth_element(work_.weights.begin(), place, work_.weights.end(), std::greater<float>());
      least = *place;
    }
    auto& found = work_.candidates;
    found.clear();
    for (int64_t block = 0; block < num_blocks; ++block) {
      if (work_.blocks[block] < least) continue;
      for (int64_t id = block * kBlock; id < std::min(width_, (block + 1) * kBlock); ++id)
        if (const float logit = load(x_ + id, 1)[0]; logit >= least) found.push_back({logit, 0.0f, id});
    }
    count = std::min<int64_t>(count, found.size());
    std::partial_sort(found.begin(), found.begin() + count, found.end());
    found.resize(count);
  }

  // Of the heaviest that top_p and min_p leave. They are added up in bins of like weights, of which two are put in order: the one
  // where the cut is, and the one that is drawn from.
  int64_t draw_heavy(double total) {
    const double enough = enough_of(total);
    const float least = fill_bins(enough);
    auto& bins = work_.bins;
    double left = 0.0;
    int64_t last = 0;
    while (last < kBins - 1 && left + bins[last] < enough) left += bins[last++];
    order_bin(last, least);
    auto& found = work_.candidates;
    double part = 0.0;
    size_t count = 0;
    while (count < found.size() && left + part < enough) part += found[count++].weight;
    found.resize(count);
    bins[last] = part;
    left += part;

    const double target = draw_ * left;
    double before = 0.0;
    const int64_t bin = invert(last + 1, target, [&](int64_t at) { return bins[at]; }, &before);
    if (bin != last) order_bin(bin, least);
    return invert_candidates(target - before);
  }

  // With the weights that are heavy enough to be left: few of a vocabulary carry most of its weight. The least of them.
  float fill_bins(double enough) {
    constexpr float kStep = 1.0f / 64;
    const auto min_p = static_cast<float>(cut_.min_p);
    for (float step = kStep;; step = step > 1e-30f ? step * kStep : 0.0f) {
      const float least = std::max(step, min_p);
      work_.bins.assign(kBins, 0.0);
      double mass = 0.0;
      for_heavier(least, [&](int64_t, float weight) {
        work_.bins[bin_of(weight)] += weight;
        mass += weight;
      });
      if (step <= min_p || mass >= enough) return least;
    }
  }

  void order_bin(int64_t bin, float least) {
    work_.candidates.clear();
    for_heavier(std::max(least, lightest_of(bin)), [&](int64_t id, float weight) {
      if (bin_of(weight) == bin) work_.candidates.push_back({load(x_ + id, 1)[0], weight, id});
    });
    std::sort(work_.candidates.begin(), work_.candidates.end());
  }

  template <class Visit>
  void for_heavier(float least, Visit visit) const {
    const float* weights = work_.weights.data();
    for (int64_t at = 0; at < static_cast<int64_t>(work_.weights.size()); at += kLanes) {
      if (highest(load(weights + at)) < least) continue;
      for (int64_t id = at; id < at + kLanes; ++id)
        if (weights[id] >= least && weights[id] > 0) visit(id, weights[id]);
    }
  }

  double enough_of(double total) const { return cut_.top_p < 1 ? cut_.top_p * total : INFINITY; }

  int64_t invert_candidates(double target) const {
    const auto& found = work_.candidates;
    return found[invert(found.size(), target, [&](int64_t at) { return double{found[at].weight}; })].id;
  }

  int64_t draw_candidate(double total) {
    const auto& found = work_.candidates;
    const double enough = enough_of(total);
    double left = 0.0;
    size_t count = 0;
    for (; count < found.size(); ++count) {
      const float weight = found[count].weight;
      if (count > 0 && (left >= enough || weight < static_cast<float>(cut_.min_p) || weight <= 0)) break;
      left += weight;
    }
    work_.candidates.resize(count);
    return invert_candidates(draw_ * left);
  }

  const T* const x_;
  const int64_t width_;
  const float highest_;
  const Cut& cut_;
  const double draw_;
  Work& work_;
};

int64_t draw_count(const Instruction& i, const Sizes& sizes) { return sizes(i.rows); }

void draw_run(const Instruction& i, const Sizes&, int64_t row) {
  thread_local Work work;
  const auto& a = i.as<DrawArguments>();
  if (a.cuts[row].temperature <= 0 || !std::isfinite(a.highest[row])) return;
  with_type(i.type, [&](auto type) { a.ids[row] = Row<decltype(type)>(a, row, work).draw(); });
}

}  // namespace

const Kernel kDrawKernel{draw_count, draw_run};

}  // namespace ferrum
