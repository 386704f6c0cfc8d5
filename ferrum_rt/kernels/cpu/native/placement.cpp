#include "placement.h"

namespace ferrum {

#if defined(__linux__)

void Placement::keep_apart(std::vector<std::thread>& helpers) {
  cpu_set_t wanted;
  const int cpu = sched_getcpu();
  if (helpers.empty() || cpu < 0 || cpu >= CPU_SETSIZE || sched_getaffinity(0, sizeof(wanted), &wanted) != 0) return;
  if (static_cast<size_t>(CPU_COUNT(&wanted)) > helpers.size()) CPU_CLR(cpu, &wanted);
  if (CPU_EQUAL(&wanted, &given_)) return;
  for (auto& helper : helpers) pthread_setaffinity_np(helper.native_handle(), sizeof(wanted), &wanted);
  given_ = wanted;
}

#else

void Placement::keep_apart(std::vector<std::thread>&) {}

#endif

}  // namespace ferrum
