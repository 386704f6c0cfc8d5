// A step as data: the decoder's calls, recorded once, run for every batch.
#pragma once

#include <cstdint>

namespace ferrum {

// As the Python side numbers them (program.py).
enum class Op : int64_t {
  kPrepare,
  kLinear,
  kGather,
  kRmsNorm,
  kQkNormRope,
  kGatedActivation,
  kSoftCap,
  kArgmax,
  kAppend,
  kPlan,
  kAttention,
  kRoute,
  kGroup,
  kExpertsLinear,
  kCombine,
  kAdvance,
  kDraw,
  kCount
};

enum class Type : int64_t { kFloat32, kBfloat16, kFloat16, kFp8, kInt8 };  // the last two of pages only

// Sizes that are a batch's, wherever an instruction has one of these for a number of rows; four less is twice as many, and so on.
constexpr int64_t kTokens = -1;
constexpr int64_t kSampled = -2;
constexpr int64_t kSpans = -3;

struct Sizes {
  int64_t tokens, sampled, spans;

  int64_t operator()(int64_t size) const {
    if (size >= 0) return size;
    const int64_t times = (3 - size) / 4, name = size + 4 * (times - 1);
    return times * (name == kTokens ? tokens : name == kSampled ? sampled : spans);
  }
};

// All words have eight bytes: integers, pointers and doubles. Each kernel has a struct for its own.
constexpr int kWords = 24;

struct Instruction {
  Op op;
  Type type;  // of the activations
  int64_t rows;
  int64_t words[kWords - 3];

  template <class Arguments>
  const Arguments& as() const {
    static_assert(sizeof(Arguments) <= sizeof(words));
    return *reinterpret_cast<const Arguments*>(words);
  }
};
static_assert(sizeof(Instruction) == 8 * kWords);

// A kernel's work falls into chunks, which threads take in any order; nothing that a chunk computes depends on the others, nor
// on how many rows the batch has.
struct Kernel {
  int64_t (*count)(const Instruction&, const Sizes&);
  void (*run)(const Instruction&, const Sizes&, int64_t chunk);
};

extern const Kernel kPrepareKernel, kLinearKernel;
extern const Kernel kGatherKernel, kRmsNormKernel, kQkNormRopeKernel, kGatedActivationKernel, kSoftCapKernel, kArgmaxKernel;
extern const Kernel kAppendKernel, kPlanKernel, kAttentionKernel;
extern const Kernel kRouteKernel, kGroupKernel, kExpertsLinearKernel, kCombineKernel;
extern const Kernel kAdvanceKernel, kDrawKernel;

const Kernel& kernel_of(Op op);

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace ferrum
