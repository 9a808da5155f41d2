// Parallel regions over a flattened work list, on torch's own thread pool.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace deepops::core {

// Less work than this does not pay for waking a thread: values of elementwise work, multiply-adds of a product.
inline constexpr int64_t kValuesPerThread = 8192, kMultiplyAddsPerThread = int64_t(1) << 20;

extern std::atomic<long long> parallel_regions;  // counted for the tests; see cpu_isa.h

// Calls body(begin, end) over [0, items), on as many threads as torch would use, at least `grain` items each: small
// work stays on the calling thread. Results must not depend on how the range is split.
template <class Body>
void parallel_for(int64_t items, int64_t grain, const Body& body) {
  if (items <= 0) return;
  parallel_regions.fetch_add(1, std::memory_order_relaxed);
  torch::stable::parallel_for(0, items, grain, body);
}

// How many threads pay for `work`; at least one, and no more than there are items.
inline int64_t workers_for(int64_t work, int64_t work_per_thread, int64_t items) {
  const int64_t useful = std::min<int64_t>(work / work_per_thread, torch::stable::get_num_threads());
  return std::clamp<int64_t>(useful, 1, std::max<int64_t>(items, 1));
}

// Calls pass(worker, begin, end) over [0, items), divided evenly among the workers, in one region: for passes in which
// a worker needs memory of its own.
template <class Pass>
void divide(int64_t workers, int64_t items, const Pass& pass) {
  parallel_for(workers, 1, [&](int64_t first, int64_t last) {
    for (int64_t worker = first; worker < last; ++worker)
      pass(worker, worker * items / workers, (worker + 1) * items / workers);
  });
}

}  // namespace deepops::core
