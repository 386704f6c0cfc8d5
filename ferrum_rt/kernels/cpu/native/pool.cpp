#include "pool.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ferrum {
namespace {

// About 20 us: longer than most waits within a step, shorter than what it costs to keep a core from another process.
constexpr int kSpins = 2000;
constexpr int32_t kUnknown = -1;

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

const Kernel& kernel_of(Op op) {
  static const Kernel* const kernels[] = {
      &kPrepareKernel, &kLinearKernel,
      &kGatherKernel, &kRmsNormKernel, &kQkNormRopeKernel, &kGatedActivationKernel, &kSoftCapKernel, &kArgmaxKernel,
      &kAppendKernel, &kPlanKernel, &kAttentionKernel,
      &kRouteKernel, &kGroupKernel, &kExpertsLinearKernel, &kCombineKernel, &kAdvanceKernel,
      &kDrawKernel,
  };
  static_assert(sizeof(kernels) / sizeof(*kernels) == static_cast<size_t>(Op::kCount));
  return *kernels[static_cast<int64_t>(op)];
}

Pool::Pool(int num_threads) : num_threads_(num_threads) {
  try {
    for (int i = 1; i < num_threads; ++i) helpers_.emplace_back([this, i] { help(i); });
  } catch (...) {
    close();
    throw;
  }
}

Pool::~Pool() { close(); }

void Pool::close() {
  is_closing_.store(true);
  epoch_.fetch_add(1);
  epoch_.notify_all();
  for (auto& helper : helpers_) helper.join();
}

void Pool::run(const Instruction* program, int64_t length, const Sizes& sizes) {
  if (length >= capacity_) {
    progress_ = std::make_unique<Progress[]>(length + 1);
    claimed_ = std::make_unique<std::atomic<int32_t>[]>((length + 1) * num_threads_);
    capacity_ = length + 1;
  }
  for (int64_t i = 0; i <= length; ++i) {
    progress_[i].done.store(0, std::memory_order_relaxed);
    progress_[i].count.store(kUnknown, std::memory_order_relaxed);
  }
  for (int64_t i = 0; i < length * num_threads_; ++i) claimed_[i].store(0, std::memory_order_relaxed);
  step_ = {program, length, sizes};
  open(0);
  placement_.keep_apart(helpers_);
  visitors_.fetch_and(~1, std::memory_order_release);
  epoch_.fetch_add(1, std::memory_order_release);
  epoch_.notify_all();
  work(0);
  // Nobody enters any more; those inside have nothing left to do, but must be out before the step's memory changes.
  for (int32_t found = visitors_.fetch_or(1) | 1; found != 1; found = visitors_.load(std::memory_order_acquire))
    wait_while(visitors_, found);
}

void Pool::open(int64_t i) {
  for (int32_t count = 0; count == 0; ++i) {
    const bool is_end = i == step_.length;
    count = is_end ? 1 : static_cast<int32_t>(kernel_of(step_.program[i].op).count(step_.program[i], step_.sizes));
    progress_[i].count.store(count, std::memory_order_release);
    progress_[i].count.notify_all();
  }
}

void Pool::work(int self) {
  for (int64_t i = 0; i < step_.length; ++i) {
    const Instruction& instruction = step_.program[i];
    const Kernel& kernel = kernel_of(instruction.op);
    Progress& progress = progress_[i];
    const int64_t count = progress.count.load(std::memory_order_acquire);
    for (int turn = 0; turn < num_threads_; ++turn) {
      const int share = (self + turn) % num_threads_;
      const int64_t first = count * share / num_threads_, end = count * (share + 1) / num_threads_;
      auto& claimed = claimed_[i * num_threads_ + share];
      for (int64_t chunk; (chunk = first + claimed.fetch_add(1, std::memory_order_relaxed)) < end;) {
        kernel.run(instruction, step_.sizes, chunk);
        if (progress.done.fetch_add(1, std::memory_order_acq_rel) + 1 == count) open(i + 1);
      }
    }
    wait_while(progress_[i + 1].count, kUnknown);
  }
}

void Pool::help(int self) {
  for (int32_t seen = 0;;) {
    epoch_.wait(seen, std::memory_order_acquire);
    seen = epoch_.load(std::memory_order_acquire);
    if (is_closing_.load()) return;
    if ((visitors_.fetch_add(2, std::memory_order_acq_rel) & 1) == 0) work(self);
    if (visitors_.fetch_sub(2, std::memory_order_acq_rel) == 3) visitors_.notify_all();
  }
}

void Pool::wait_while(const std::atomic<int32_t>& value, int32_t unwanted) {
  for (int spins = 0; spins < kSpins; ++spins) {
    if (value.load(std::memory_order_acquire) != unwanted) return;
    pause();
  }
  while (value.load(std::memory_order_acquire) == unwanted) value.wait(unwanted, std::memory_order_acquire);
}

}  // namespace ferrum
