// The executor's test of core/tensor_core.cuh: small kernels with copies under way and products of matrices, and the
// bugs planted in them. Included by selftest.cu, which has the list of bugs.
#pragma once
#include "core/tensor_core.cuh"

namespace deepops::isa_gpu {

constexpr int kTile = 16;  // rows of a matrix that a warp takes at once, and its depth

// out [16, 8] = a [16, 16] b [8, 16]^T: one warp, no copies under way.
template <class T>
DEEPOPS_KERNEL(gpu::kWarp)
small_product(const T* a, const T* b, float* out, Bug bug) {
  constexpr int kPack = gpu::Pack<T>::kSize;
  DEEPOPS_SHARED(T, tile, 24 * kTile);
  for (int i = gpu::lane(); i < 24 * kTile / kPack; i += gpu::kWarp) {
    const bool of_a = i < kTile * kTile / kPack;
    tile.store_pack(i * kPack, gpu::load_pack((of_a ? a : b - kTile * kTile) + i * kPack));
  }
  gpu::warp_barrier();
  uint32_t left[4], right[4];
  // Lane l: row l % 16, columns from l / 16 * 8 on, which is matrix l / 8 in the order of the fragment.
  int row = gpu::lane() % kTile;
  if (bug == Bug::wrong_fragment_row) row = gpu::lane() % 8 * 2 + gpu::lane() / 8 % 2;
  const int at = row * kTile + gpu::lane() / kTile * kPack + (bug == Bug::misaligned_matrices ? 1 : 0);
  if (bug == Bug::divergent_matrices) {
    if (gpu::lane() < 24) gpu::load_matrices(left, tile, at);
  } else if (bug == Bug::matrices_in_two_places && gpu::lane() < 16) {
    gpu::load_matrices(left, tile, at);
  } else {
    gpu::load_matrices(left, tile, at);
  }
  const int past = bug == Bug::matrices_past_end ? kTile * kPack : 0;
  gpu::load_matrices(right, tile, (kTile + gpu::lane() % 8) * kTile + gpu::lane() / 8 % 2 * kPack + past);
  float sum[4] = {0, 0, 0, 0};
  if (bug == Bug::divergent_product) {
    if (gpu::lane() % 2 == 0) gpu::multiply_add<T>(sum, left, {right[0], right[1]});
  } else {
    gpu::multiply_add<T>(sum, left, {right[bug == Bug::wrong_fragment ? 1 : 0], right[1]});
  }
  for (int i = 0; i < 4; ++i) {
    gpu::store(out + (gpu::lane() / 4 + i / 2 * 8) * 8 + gpu::lane() % 4 * 2 + i % 2, sum[i]);
  }
}

// out [32, 16] = a [32, n] b [16, n]^T, n a multiple of 8: two warps, each with 16 rows. While they multiply one step
// of 32 columns, that two further is copied; rows of 64 bytes, whose 16-byte pieces change places from row to row, so
// that the eight rows of a matrix lie in different banks.
constexpr int kStep = 32, kRows = 48, kStages = 3, kPipelineThreads = 64;

DEEPOPS_DEVICE int place(int row, int piece, bool swizzled) {
  return row * kStep + (swizzled ? piece ^ row / 2 % 4 : piece) * 8;
}

template <class T>
DEEPOPS_DEVICE void copy_step(const gpu::Shared<T>& tile, const T* a, const T* b, int n, int step, Bug bug) {
  const bool swizzled = bug != Bug::missing_swizzle;
  for (int i = gpu::thread(); i < kRows * 4; i += kPipelineThreads) {
    const int row = i / 4, column = step * kStep + i % 4 * 8;
    const T* from = row < 32 ? a + row * n + column : b + (row - 32) * n + column;
    const int odd = bug == Bug::misaligned_source ? 1 : 0;
    const bool ok = column < n || bug == Bug::copy_past_end;
    int at = place(row, i % 4, swizzled) + step % kStages * kRows * kStep + (bug == Bug::misaligned_copy ? 4 : 0);
    if (bug == Bug::copy_out_of_bounds) at += kRows * kStep;
    if (bug == Bug::copied_twice) at -= row % 2 * kStep;
    gpu::copy_async(tile, at, ok ? from + odd : a, ok);
  }
  if (bug != Bug::missing_commit) gpu::copy_async_commit();
}

template <class T>
DEEPOPS_KERNEL(kPipelineThreads)
pipeline(const T* a, const T* b, float* out, int n, Bug bug) {
  const auto tile = gpu::dynamic_shared<T>();
  const int steps = (n + kStep - 1) / kStep;
  const bool swizzled = bug != Bug::missing_swizzle && bug != Bug::wrong_swizzle;
  float sum[2][4] = {};
  const bool early = bug == Bug::copy_too_early;
  for (int s = 0; s < kStages - (early ? 0 : 1); ++s) copy_step(tile, a, b, n, s, bug);
  for (int s = 0; s < steps; ++s) {
    if (bug == Bug::barrier_before_wait) gpu::barrier();
    if (bug == Bug::wait_too_lax) {
      gpu::copy_async_wait<kStages - 1>();
    } else if (bug != Bug::missing_wait) {
      gpu::copy_async_wait<kStages - 2>();
    }
    if (bug != Bug::missing_barrier_after_wait && bug != Bug::barrier_before_wait) gpu::barrier();
    // All threads are done with the step before this one: its place is free.
    if (!early) copy_step(tile, a, b, n, s + kStages - 1, bug);
    const int first = s % kStages * kRows;
    if (bug == Bug::store_under_copy) tile.store(((s + 2) % kStages * kRows) * kStep + gpu::thread(), T{});
    for (int k = 0; k < 2; ++k) {
      uint32_t left[4], right[4];
      const int row = gpu::lane() % 16, piece = k * 2 + gpu::lane() / 16;
      gpu::load_matrices(left, tile, first * kStep + place(gpu::warp() * 16 + row, piece, swizzled));
      gpu::load_matrices(right, tile, first * kStep + place(32 + row, piece, swizzled));
      gpu::multiply_add<T>(sum[0], left, {right[0], right[2]});
      gpu::multiply_add<T>(sum[1], left, {right[1], right[3]});
    }
    // Bug: the place is written again while the other warp may still read it.
    if (early) copy_step(tile, a, b, n, s + kStages, bug);
  }
  if (bug != Bug::exit_with_copies) gpu::copy_async_wait<0>();
  for (int i = 0; i < 8; ++i) {
    const int row = gpu::warp() * 16 + gpu::lane() / 4 + i / 2 % 2 * 8;
    gpu::store(out + row * 16 + i / 4 * 8 + gpu::lane() % 4 * 2 + i % 2, sum[i / 4][i % 4]);
  }
}

// Each lane copies 16 bytes for its neighbour: a warp barrier will do.
DEEPOPS_KERNEL(gpu::kWarp) turn_lanes(const float* x, float* y, Bug bug) {
  DEEPOPS_SHARED(float, kept, gpu::kWarp * 4);
  gpu::copy_async(kept, gpu::lane() * 4, x + gpu::lane() * 4, true);
  gpu::copy_async_commit();
  if (bug == Bug::own_copy_too_early) kept.load(gpu::lane() * 4);
  gpu::copy_async_wait<0>();
  kept.load(gpu::lane() * 4);  // its own: no barrier
  if (bug != Bug::missing_warp_barrier) gpu::warp_barrier();
  gpu::store_pack(y + gpu::lane() * 4, kept.load_pack((gpu::lane() + 1) % gpu::kWarp * 4));
}

// ---- the host's side ------------------------------------------------------------------------------------------------

inline uint16_t bits_of(core::Half, int value) { return gpu::to_half(float(value)).bits; }
inline uint16_t bits_of(core::BFloat16, int value) { return gpu::narrow<core::BFloat16>(float(value)).bits; }

// Small integers, so that sums are exact in any order; no two rows or columns are alike.
inline int number(int i) { return int((unsigned(i) * 2654435761u >> 20) % 15) - 7; }

template <class T>
std::vector<T> numbers(int n, int from) {
  std::vector<T> result;
  result.reserve(size_t(n));
  for (int i = 0; i < n; ++i) result.push_back({bits_of(T{}, number(from + i))});
  return result;
}

template <class T>
void run_products(Bug bug, const char* name, const char* pipeline_name) {
  const auto right = [](const std::vector<float>& out, int columns, int n) {
    bool same = true;
    for (int i = 0; i < int(out.size()); ++i) {
      int sum = 0;
      for (int k = 0; k < n; ++k) sum += number(i / columns * n + k) * number(1000 + i % columns * n + k);
      same &= out[size_t(i)] == float(sum);
    }
    return same;
  };
  const int n = 2 * kStep + 8;
  {
    const std::vector<T> a = numbers<T>(16 * 16, 0), b = numbers<T>(8 * 16, 1000);
    std::vector<float> out(16 * 8, -1.0f);
    gpu::launch(name, small_product<T>, 1, gpu::kWarp, 0, a.data(), b.data(), out.data(), bug);
    expect(right(out, 8, 16), name);
  }
  const std::vector<T> a = numbers<T>(32 * n, 0), b = numbers<T>(16 * n, 1000);
  std::vector<float> out(32 * 16, -1.0f);
  gpu::launch_on_chip(pipeline_name, pipeline<T>, 1, kPipelineThreads, kStages * kRows * kStep * 2, false, 0, a.data(),
                      b.data(), out.data(), n, bug);
  expect(right(out, 16, n), pipeline_name);
}

inline void run_tensor_core(Bug bug) {
  run_products<core::Half>(bug, "small_product_f16", "pipeline_f16");
  run_products<core::BFloat16>(bug, "small_product_bf16", "pipeline_bf16");
  const std::vector<float> x = values(gpu::kWarp * 4);
  std::vector<float> y(x.size(), -1.0f);
  gpu::launch("turn_lanes", turn_lanes, 1, gpu::kWarp, 0, x.data(), y.data(), bug);
  bool same = true;
  for (size_t i = 0; i < y.size(); ++i) same &= y[i] == x[(i + 4) % x.size()];
  expect(same, "turn_lanes");
}

}  // namespace deepops::isa_gpu
