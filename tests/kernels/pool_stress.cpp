// Uses the pool in all the ways in which threads could meet, for tools/sanitize_kernels.py to watch. The exit status is 1 if a
// sum is wrong; the sanitizer has a status of its own.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <thread>
#include <vector>

#include "linear.h"
#include "pool.h"

using namespace ferrum;

namespace {

constexpr int64_t kRows = 64, kSize = 96;

// Rows of ones are copied in several chunks, multiplied by twos in one that reads all of them, and both once more: each
// instruction reads what others have written in the one before.
struct Step {
  std::vector<float> x = std::vector<float>(kRows * kSize, 1.0f), weight = std::vector<float>(kSize * kSize, 2.0f);
  std::vector<float> copy = x, first = x, second = x;
  Instruction program[4] = {copied(x, copy), multiplied(copy, first), copied(first, copy), multiplied(copy, second)};

  template <class Arguments>
  static Instruction made(Op op, const Arguments& arguments) {
    Instruction result{op, Type::kFloat32, kTokens, {}};
    std::memcpy(result.words, &arguments, sizeof(arguments));
    return result;
  }

  static Instruction copied(const std::vector<float>& from, std::vector<float>& to) {
    PrepareArguments a{};
    a.x = from.data();
    a.stride = a.width = a.out_stride = kSize;
    a.out = reinterpret_cast<uint32_t*>(to.data());
    a.kind = Kind::kFloat32;
    return made(Op::kPrepare, a);
  }

  Instruction multiplied(const std::vector<float>& from, std::vector<float>& to) const {
    LinearArguments a{};
    a.out = to.data();
    a.x = reinterpret_cast<const uint32_t*>(from.data());
    a.weight = reinterpret_cast<const uint32_t*>(weight.data());
    a.stride = a.width = a.x_stride = a.granules = kSize;
    a.kind = Kind::kFloat32;
    return made(Op::kLinear, a);
  }

  bool run(Pool& pool, int64_t tokens) {
    std::fill(second.begin(), second.end(), 0.0f);
    pool.run(program, 4, {tokens, 0, 0});
    const double factor = 2.0 * kSize, found = std::accumulate(second.begin(), second.end(), 0.0);
    return found == static_cast<double>(tokens * kSize) * factor * factor;
  }
};

bool steps(Pool& pool, int count) {
  Step step;
  bool is_right = true;
  for (int i = 0; i < count; ++i) is_right = step.run(pool, 1 + i % kRows) && is_right;
  return is_right;
}

}  // namespace

int main() {
  bool is_right = true;
  for (int num_threads : {1, 2, 5}) {
    for (int i = 0; i < 50; ++i) Pool idle(num_threads);  // closed before its threads have come to rest
    Pool pool(num_threads);
    is_right = steps(pool, 500) && is_right;
    for (int i = 0; i < 20; ++i) std::thread([&] { is_right = steps(pool, 20) && is_right; }).join();
  }
  std::vector<std::thread> engines;
  std::vector<char> results(4);
  for (char& result : results) {
    engines.emplace_back([&result] {
      Pool pool(3);
      result = steps(pool, 200);
    });
  }
  for (auto& engine : engines) engine.join();
  for (char result : results) is_right = result && is_right;
  std::puts(is_right ? "the pool's sums are right" : "the pool's sums are wrong");
  return is_right ? 0 : 1;
}
