// Where helpers may run: wherever the thread that calls may, but not on the CPU that it is on. Left to itself the system likes
// to wake a thread on the CPU of the one that wakes it. That one computes on, and so the helper waits until the system looks
// again at what is where, which takes longer than many a step.
#pragma once

#include <thread>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif

namespace ferrum {

class Placement {
 public:
  // To be called at each step by the thread that computes it, whose own affinity is left alone. It may have been moved, or its
  // affinity have been changed; where nothing has, this asks the system two questions and does nothing. With fewer CPUs than
  // threads the helpers may run on all of them. What the system refuses is no error.
  void keep_apart(std::vector<std::thread>& helpers);

 private:
#if defined(__linux__)
  cpu_set_t given_{};  // what the helpers have; none at first
#endif
};

}  // namespace ferrum
