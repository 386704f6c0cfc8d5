// The threads that compute. They sleep between steps, and within one they never wait for a thread that has nothing in hand: an
// instruction is over when its chunks are done, whoever did them. So a thread that the system has put aside (another process
// wanted its core) delays a step only while it holds a chunk.
#pragma once

#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#include "placement.h"
#include "program.h"

namespace ferrum {

class Pool {
 public:
  // `num_threads` includes the one that calls run(). Throws std::system_error if the system does not give that many.
  explicit Pool(int num_threads);
  ~Pool();

  // One call at a time, from any thread.
  void run(const Instruction* program, int64_t length, const Sizes& sizes);

 private:
  // Of an instruction. Its number of chunks is found once, by the thread that ended the one before: it may depend on what that
  // one wrote, and a thread that comes late would find what later ones have written over it.
  struct alignas(64) Progress {
    std::atomic<int32_t> done;
    std::atomic<int32_t> count;
  };
  struct Step {
    const Instruction* program;
    int64_t length;
    Sizes sizes;
  };

  void close();
  void open(int64_t i);  // finds how many chunks an instruction has, and the next one too as long as it is none
  void work(int self);
  void help(int self);
  static void wait_while(const std::atomic<int32_t>& value, int32_t unwanted);

  Step step_{};
  const int num_threads_;
  std::unique_ptr<Progress[]> progress_;
  // How many chunks are taken of each thread's share of an instruction. A thread takes those of its own share first, one after
  // the other, so that what it fetches ahead is its own; then those of the others.
  std::unique_ptr<std::atomic<int32_t>[]> claimed_;
  int64_t capacity_ = 0;
  // The lowest bit: no step is open. Above it: how many helpers are in the step.
  alignas(64) std::atomic<int32_t> visitors_{1};
  alignas(64) std::atomic<int32_t> epoch_{0};
  std::atomic<bool> is_closing_{false};
  std::vector<std::thread> helpers_;
  Placement placement_;
};

}  // namespace ferrum
