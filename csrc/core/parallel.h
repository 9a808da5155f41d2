// One parallel region over a flattened work list, on torch's own thread pool.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>

namespace deepops::core {

extern std::atomic<long long> parallel_regions;  // counted for the tests; see cpu_isa.h

// Calls body(begin, end) over [0, items), on as many threads as torch would use, at least `grain` items each: small
// work stays on the calling thread. Results must not depend on how the range is split.
template <class Body>
void parallel_for(int64_t items, int64_t grain, const Body& body) {
  if (items <= 0) return;
  parallel_regions.fetch_add(1, std::memory_order_relaxed);
  torch::stable::parallel_for(0, items, grain, body);
}

}  // namespace deepops::core
