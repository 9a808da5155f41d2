// The executor's own test: small kernels of the kinds the project has, each with planted bugs chosen at run time.
//
//   simt_selftest [BUG [in_order|reverse|random SEED] [counts]]
//
// Prints what it found; without arguments, the names of all bugs. Exit status: 0 clean, 1 wrong values, 2 the executor
// stopped the kernel, 3 counts out of budget; a sanitizer has its own. tests/simt/test_selftest.py has the table of who
// must catch what.
#include <cstdio>
#include <cstdlib>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/gpu.cuh"

namespace deepops::isa_gpu {

// An enumeration, and what it enumerates as text: "none, missing_barrier, ..."
#define NAMED_ENUM(type, ...)            \
  enum class type : int { __VA_ARGS__ }; \
  const char* const kNames = #__VA_ARGS__

NAMED_ENUM(Bug, none, missing_barrier, missing_second_barrier, barrier_in_branch, different_barriers,
           returns_before_barrier, lane_returns_before_shuffle, shuffle_in_branch, lanes_at_different_shuffles,
           wrong_shuffle_mask, shared_out_of_bounds, shared_uninitialised, shared_race_in_warp, too_much_shared_memory,
           store_past_end, load_past_end, missing_tail, misaligned_pack, index_overflow, blocks_share_an_output,
           plain_counter, missing_fence, missing_first_fence, missing_second_fence, stale_load, not_the_last_block,
           counter_not_zeroed, order_of_arrival, scalar_accesses, strided_accesses, bank_conflicts, partial_warp,
           missing_signal, too_few_signals, not_together, missing_second_meeting, missing_meeting,
           plain_load_after_signal, signal_without_fence, dynamic_out_of_bounds, wrong_fragment_row, wrong_fragment,
           misaligned_matrices, divergent_matrices, matrices_in_two_places, matrices_past_end, divergent_product,
           missing_swizzle, wrong_swizzle, misaligned_source, misaligned_copy, copy_past_end, copy_out_of_bounds,
           copied_twice, missing_commit, wait_too_lax, missing_wait, missing_barrier_after_wait, barrier_before_wait,
           copy_too_early, store_under_copy, exit_with_copies, own_copy_too_early, missing_warp_barrier, never_asked,
           more_than_there_is);

constexpr int kThreads = 128;

// y = 2 x + 1 on n values: packs, then a scalar tail.
DEEPOPS_KERNEL(kThreads) scale(const float* x, float* y, int64_t n, Bug bug) {
  using Pack = gpu::Pack<float>;
  const int64_t thread = int64_t(gpu::block()) * kThreads + gpu::thread(), threads = int64_t(gpu::blocks()) * kThreads;
  const int64_t packs = n / Pack::kSize;
  if (bug == Bug::scalar_accesses) {
    for (int64_t i = thread; i < n; i += threads) gpu::store(y + i, 2 * gpu::load(x + i) + 1);
    return;
  }
  for (int64_t i = thread; i < packs; i += threads) {
    int64_t at = i * Pack::kSize;
    if (bug == Bug::strided_accesses) at = (i % 32 * (packs / 32) + i / 32) * Pack::kSize;
    if (bug == Bug::misaligned_pack) at = at == 0 ? 0 : at - 1;
    Pack pack = gpu::load_pack(x + at);
    for (float& value : pack.value) value = 2 * value + 1;
    gpu::store_pack(y + at, pack);
  }
  const int64_t end = bug == Bug::missing_tail ? n - 1 : bug == Bug::store_past_end ? n + 1 : n;
  const int64_t i = packs * Pack::kSize + thread;
  if (i < end) gpu::store(y + i, 2 * gpu::load(x + (bug == Bug::load_past_end ? i + 1 : i < n ? i : 0)) + 1);
}

// out[c] = sum of row c of x [rows, n], one block a row; shared memory by hand, as block_sum() has it.
DEEPOPS_KERNEL(kThreads) row_sums(const float* x, float* out, int n, Bug bug) {
  const int row = gpu::block();
  float sum = 0;
  int overflow = bug == Bug::index_overflow ? 0x7fffff00 : 0;  // as if n were that large
  for (int i = gpu::thread(); i < n; i += kThreads) {
    if (bug == Bug::index_overflow) overflow += n;
    sum += gpu::load(x + int64_t(row) * n + i + (overflow < 0 ? 1 : 0));
  }
  if (bug == Bug::lane_returns_before_shuffle && gpu::thread() == 5) return;
  if (bug == Bug::returns_before_barrier && gpu::warp() == 3) return;
  if (bug == Bug::shuffle_in_branch) {
    if (gpu::lane() < 8) sum += gpu::shuffle_xor(sum, 16);
  } else if (bug == Bug::lanes_at_different_shuffles && gpu::lane() < 16) {
    sum += gpu::shuffle_xor(sum, 16);
  } else {
    sum += gpu::shuffle_xor(sum, 16);
  }
  for (int mask = 8; mask > 0; mask /= 2) {
    sum += gpu::shuffle_xor(sum, bug == Bug::wrong_shuffle_mask && mask == 2 ? 4 : mask);
  }
  constexpr int kWarps = kThreads / gpu::kWarp;
  DEEPOPS_SHARED(float, partial, kWarps);
  if (gpu::lane() == 0 && !(bug == Bug::shared_uninitialised && gpu::warp() == 2)) {
    partial.store(gpu::warp() + (bug == Bug::shared_out_of_bounds ? 1 : 0), sum);
  }
  if (bug == Bug::barrier_in_branch) {
    if (gpu::thread() < 64) gpu::barrier();
  } else if (bug == Bug::different_barriers) {
    if (gpu::thread() < 64) {
      gpu::barrier();
    } else {
      gpu::barrier();
    }
  } else if (bug != Bug::missing_barrier) {
    gpu::barrier();
  }
  if (gpu::thread() != 0) return;
  sum = 0;
  for (int w = 0; w < kWarps; ++w) sum += partial.load(w);
  const int at = bug == Bug::blocks_share_an_output ? row / 2 * 2 : row;
  gpu::store(out + at, sum);
}

// y = x reversed within each block of kThreads values, twice over: shared memory that is written again.
DEEPOPS_KERNEL(kThreads) reverse_twice(const float* x, float* y, Bug bug) {
  DEEPOPS_SHARED(float, values, kThreads);
  DEEPOPS_SHARED(float, wide, 33 * 32);
  const int64_t at = int64_t(gpu::block()) * kThreads + gpu::thread();
  float value = gpu::load(x + at);
  for (int turn = 0; turn < 2; ++turn) {
    values.store(gpu::thread(), value);
    gpu::barrier();
    value = values.load(kThreads - 1 - gpu::thread());
    if (bug != Bug::missing_second_barrier) gpu::barrier();
  }
  // A transpose of a 32 x 4 table: 33 columns keep the banks apart.
  const int stride = bug == Bug::bank_conflicts ? 32 : 33;
  if (gpu::thread() < 32) {
    for (int k = 0; k < 4; ++k) wide.store(gpu::thread() * stride + k, value + float(k));
  }
  if (bug == Bug::shared_race_in_warp && gpu::thread() < 32) wide.store(0, value);
  gpu::barrier();
  gpu::store(y + at, value + 0 * wide.load(gpu::thread() / 32));
}

DEEPOPS_KERNEL(kThreads) greedy(float* y) {
  DEEPOPS_SHARED(double, values, 8192);
  values.store(gpu::thread(), 1.0);
  gpu::barrier();
  gpu::store(y + gpu::thread(), float(values.load(gpu::thread())));
}

// out[0] = sum of x [n] over all blocks, by the last of them; out[1 + b] are the blocks' sums.
DEEPOPS_KERNEL(kThreads) grid_sum(const float* x, float* out, unsigned* counter, int64_t n, Bug bug) {
  float sum[1] = {0};
  for (int64_t i = int64_t(gpu::block()) * kThreads + gpu::thread(); i < n; i += int64_t(gpu::blocks()) * kThreads) {
    sum[0] += gpu::load(x + i);
  }
  gpu::block_sum<kThreads>(sum);
  if (gpu::thread() == 0) gpu::store(out + 1 + gpu::block(), sum[0]);
  bool last;
  const bool no_fence = bug == Bug::missing_fence;
  if (no_fence || bug == Bug::missing_first_fence || bug == Bug::missing_second_fence || bug == Bug::order_of_arrival) {
    DEEPOPS_SHARED(unsigned, arrived, 1);
    if (!no_fence && bug != Bug::missing_first_fence) gpu::fence();
    gpu::barrier();
    if (gpu::thread() == 0) arrived.store(0, gpu::atomic_add(counter, 1));
    gpu::barrier();
    last = arrived.load(0) == unsigned(gpu::blocks()) - 1;
    if (!no_fence && bug != Bug::missing_second_fence) gpu::fence();
    if (bug == Bug::order_of_arrival) {
      // Every block adds to the total as it comes: the order of the additions is anybody's guess.
      if (gpu::thread() == 0) gpu::store(out, (arrived.load(0) ? gpu::load_fresh(out) : 0.0f) + sum[0]);
      return;
    }
  } else if (bug == Bug::not_the_last_block) {
    last = gpu::block() == gpu::blocks() - 1;
  } else if (bug == Bug::plain_counter) {
    DEEPOPS_SHARED(unsigned, arrived, 1);
    gpu::fence();
    gpu::barrier();
    if (gpu::thread() == 0) {
      arrived.store(0, gpu::load(counter));
      gpu::store(counter, arrived.load(0) + 1);
    }
    gpu::barrier();
    last = arrived.load(0) == unsigned(gpu::blocks()) - 1;
  } else {
    last = gpu::last_block(counter, unsigned(gpu::blocks()));
  }
  if (!last || gpu::thread() != 0) return;
  float total = 0;
  for (int b = 0; b < gpu::blocks(); ++b) {
    total += bug == Bug::stale_load ? gpu::load(out + 1 + b) : gpu::load_fresh(out + 1 + b);
  }
  gpu::store(out, total);
}

// All blocks wait for all, for the turn-th time, counted from 1.
DEEPOPS_DEVICE void meet(unsigned* counter, int turn, Bug bug) {
  if (bug != Bug::signal_without_fence) gpu::fence();
  gpu::barrier();
  if (gpu::thread() == 0) {
    // Bug: a block that does not say that it is there.
    if (bug != Bug::missing_signal || gpu::block() != 2) gpu::atomic_add(counter, 1);
    gpu::await(counter, unsigned(gpu::blocks() * turn) + (bug == Bug::too_few_signals ? 1 : 0));
    gpu::fence();
  }
  gpu::barrier();
}

// x := 2 (x shifted by one block), in place, by blocks that run side by side and keep their values on the chip; then
// sums[b] = the sum of block b's first values so far, by block b, from what the others say.
DEEPOPS_KERNEL(kThreads) shift_blocks(float* x, float* heads, float* sums, unsigned* counter, Bug bug) {
  const auto kept = gpu::dynamic_shared<float>();
  const int blocks = gpu::blocks(), next = (gpu::block() + 1) % blocks;
  kept.store(gpu::thread() + (bug == Bug::dynamic_out_of_bounds ? 1 : 0),
             gpu::load(x + gpu::block() * kThreads + gpu::thread()));
  if (bug != Bug::missing_meeting) meet(counter, 1, bug);
  const float value = 2 * kept.load(gpu::thread());
  gpu::store(x + next * kThreads + gpu::thread(), value);
  if (gpu::thread() == 0) gpu::store(heads + gpu::block(), value);
  if (bug != Bug::missing_second_meeting) meet(counter, bug == Bug::missing_meeting ? 1 : 2, bug);
  if (gpu::thread() != 0) return;
  float sum = 0;
  for (int b = 0; b < blocks; ++b) {
    sum += bug == Bug::plain_load_after_signal ? gpu::load(heads + b) : gpu::load_fresh(heads + b);
  }
  gpu::store(sums + gpu::block(), sum);
}

// ---- the host's side ------------------------------------------------------------------------------------------------

int failures = 0;

void expect(bool condition, const char* what) {
  if (condition) return;
  std::printf("wrong: %s\n", what);
  ++failures;
}

// Exact sums: small integers. Of a size that no allocator rounds up, so that sanitizers see the first value past it.
std::vector<float> values(size_t n) {
  std::vector<float> result(n);
  for (size_t i = 0; i < n; ++i) result[i] = float(int(i * 7 % 13) - 5);
  result.shrink_to_fit();
  return result;
}

void run(Bug bug) {
  const bool counting = simt::running.counting;
  (void)counting;
  {
    const int64_t n = 5 * kThreads * 4 + 3;
    std::vector<float> x = values(size_t(n)), y(static_cast<size_t>(n), -1.0f);
    gpu::launch("scale", scale, 3, kThreads, 0, x.data(), y.data(), n, bug);
    bool right = true;
    for (size_t i = 0; i < y.size(); ++i) right &= y[i] == 2 * x[i] + 1;
    expect(right, "scale");
  }
  {
    const int rows = 5, n = 300;
    std::vector<float> x = values(size_t(rows) * n), out(rows, -1.0f);
    gpu::launch("row_sums", row_sums, rows, bug == Bug::partial_warp ? kThreads - 16 : kThreads, 0, x.data(),
                out.data(), n, bug);
    for (int r = 0; r < rows; ++r) {
      float sum = 0;
      for (int i = 0; i < n; ++i) sum += x[size_t(r) * n + i];
      expect(out[r] == sum, "row_sums");
    }
  }
  {
    std::vector<float> x = values(3 * kThreads), y(x.size(), -1.0f);
    gpu::launch("reverse_twice", reverse_twice, 3, kThreads, 0, x.data(), y.data(), bug);
    expect(x == y, "reverse_twice");
    if (bug == Bug::too_much_shared_memory) gpu::launch("greedy", greedy, 1, kThreads, 0, y.data());
  }
  {
    const int64_t n = 7 * kThreads + 5;
    const int blocks = 6;
    std::vector<float> x(static_cast<size_t>(n)), out(1 + blocks, -1.0f);
    // 2^25 at the start, where a float is a multiple of 4, and 127 or 254 in every other block: the order counts.
    for (size_t i = 0; i < x.size(); ++i) x[i] = i == 0 ? 33554432.0f : i % kThreads == 1 ? 0.0f : 1.0f;
    unsigned counter = bug == Bug::counter_not_zeroed ? 1 : 0;
    gpu::launch("grid_sum", grid_sum, blocks, kThreads, 0, x.data(), out.data(), &counter, n, bug);
    float sum = 0;
    for (int b = 0; b < blocks; ++b) sum += out[1 + b];
    expect(out[0] == sum, "grid_sum");
  }
  {
    const int blocks = 5;
    const std::vector<float> given = values(size_t(blocks) * kThreads);
    std::vector<float> x = given, heads(blocks, -1.0f), sums(blocks, -1.0f);
    unsigned counter = 0;
    gpu::launch_on_chip("shift_blocks", shift_blocks, blocks, kThreads, kThreads * int64_t(sizeof(float)),
                        bug != Bug::not_together, 0, x.data(), heads.data(), sums.data(), &counter, bug);
    bool right = true;
    for (size_t i = 0; i < x.size(); ++i) right &= x[(i + kThreads) % x.size()] == 2 * given[i];
    float sum = 0;
    for (int b = 0; b < blocks; ++b) sum += 2 * given[size_t(b) * kThreads];
    for (const float found : sums) right &= found == sum;
    expect(right, "shift_blocks");
  }
}

}  // namespace deepops::isa_gpu

#include "selftest_tensor_core.cuh"

int main(int count, char** arguments) {
  using deepops::isa_gpu::Bug;
  std::istringstream names(deepops::isa_gpu::kNames);
  int bug = 0;
  std::string name;
  for (; std::getline(names >> std::ws, name, ','); ++bug) {
    if (count > 1 && name == arguments[1]) break;
    if (count == 1) std::printf("%s\n", name.c_str());
  }
  if (!names) return 64;
  bool counting = false;
  for (int i = 2; i < count; ++i) {
    const std::string word = arguments[i];
    if (word == "in_order") simt_set_schedule(0, 0);
    if (word == "reverse") simt_set_schedule(1, 0);
    if (word == "random" && i + 1 < count) simt_set_schedule(2, uint64_t(atoll(arguments[i + 1])));
    if (word == "counts") counting = true;
  }
  if (counting) simt_set_counting(1);
  try {
    deepops::isa_gpu::run(Bug(bug));
    deepops::isa_gpu::run_tensor_core(Bug(bug));
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 2;
  }
  if (counting) std::printf("%s\n", simt_counts());
  return deepops::isa_gpu::failures ? 1 : 0;
}
