// How the GPU kernels of the optimizers walk over the rows of a step.
//
// The table of the rows is in device memory. A work item of ChunkPlan is a warp's, which finds its tensors by binary
// search, as the CPU's threads do.
#pragma once
#include "core/gpu.cuh"
//
#include "optim/plan.h"
#include "optim/row.h"

namespace deepops::optim {

// In device memory, but for this struct itself.
struct RowTable {
  const Row* rows;        // [count]; numel is 0 where a row is not active
  const int64_t* starts;  // [count]: ChunkPlan::starts()
  const int64_t* slots;   // [count + 1]: ChunkPlan::slots()
  int64_t count, chunk;
};

// A struct of the table, 16 bytes at a time.
template <class T>
DEEPOPS_DEVICE T load_record(const T* p, gpu::Here here = DEEPOPS_HERE) {
  static_assert(sizeof(T) % gpu::kPackBytes == 0);
  using Part = gpu::Pack<uint32_t>;
  struct Parts {
    Part part[sizeof(T) / gpu::kPackBytes];
  } parts;
#pragma unroll
  for (int i = 0; i < int(sizeof(T) / gpu::kPackBytes); ++i) {
    parts.part[i] = gpu::load_pack(reinterpret_cast<const uint32_t*>(p) + i * Part::kSize, here);
  }
  return __builtin_bit_cast(T, parts);
}

// Calls body(i, begin, end) for every stretch of the work item of this warp, in blocks of kThreads threads.
template <int kThreads, class Body>
DEEPOPS_DEVICE void for_each_stretch_of_warp(const RowTable& table, const Body& body) {
  const int64_t item = int64_t(gpu::block()) * (kThreads / gpu::kWarp) + gpu::warp();
  const auto start = [&](int64_t i) { return gpu::load(table.starts + i); };
  const auto size = [&](int64_t i) { return gpu::load(&table.rows[i].numel); };
  for_each_stretch(table.count, item * table.chunk, (item + 1) * table.chunk, start, size, body);
}

inline int64_t blocks_for(const ChunkPlan& plan, int threads) {
  const int warps = threads / gpu::kWarp;
  return std::max<int64_t>((plan.items() + warps - 1) / warps, 1);
}

// How many stretches row i is cut into, and the slot of the one that begins at `begin` (ChunkPlan::slot()).
DEEPOPS_DEVICE int64_t parts_of(const RowTable& table, int64_t i, int64_t numel) {
  const int64_t start = gpu::load(table.starts + i);
  return (start + numel - 1) / table.chunk - start / table.chunk + 1;
}
DEEPOPS_DEVICE int64_t slot_of(const RowTable& table, int64_t i, int64_t begin) {
  const int64_t start = gpu::load(table.starts + i);
  return gpu::load(table.slots + i) + (start + begin) / table.chunk - start / table.chunk;
}

// Whether the calling thread is the last of `parts` that call this with the same counter, which is 0 before and after.
// What the others had stored is then visible to it by load_fresh().
DEEPOPS_DEVICE bool comes_last(unsigned* counter, int64_t parts) {
  if (parts == 1) return true;
  gpu::fence();
  const bool last = gpu::atomic_add(counter, 1u) == unsigned(parts - 1);
  gpu::fence();
  if (last) gpu::store(counter, 0u);
  return last;
}

// ---- 16 bytes at a time ---------------------------------------------------------------------------------------------

// Elements of `size` bytes before the first boundary of 16 bytes.
DEEPOPS_DEVICE int gap(const void* p, int64_t size) {
  return int((gpu::kPackBytes - reinterpret_cast<uintptr_t>(p) % gpu::kPackBytes) % gpu::kPackBytes / size);
}

// Elements before the first place where all streams of a row that are used are on a boundary; -1: there is none.
// states: an entry of Rule::kStateSets.
DEEPOPS_DEVICE int gap_of_all(const Row& row, int states) {
  const auto for_each_stream = [&](auto use) {
    use(row.param, core::size_of(row.dtype));
    use(row.grad, core::size_of(row.dtype));
    if (row.master_kind != Master::none) use(row.master, size_of(row.master_kind));
#pragma unroll
    for (int k = 0; k < Row::kStates; ++k) {
      if (states >> k & 1) use(row.state[k], core::size_of(row.state_dtype));
    }
  };
  // Boundaries come every 16 / size elements: where one is common to all, the first such is the largest of the gaps.
  int largest = 0;
  for_each_stream([&](const void* p, int64_t size) { largest = gap(p, size) > largest ? gap(p, size) : largest; });
  bool common = true;
  for_each_stream([&](const void* p, int64_t size) {
    common &= (reinterpret_cast<uintptr_t>(p) + largest * size) % gpu::kPackBytes == 0;
  });
  return common ? largest : -1;
}

// Where a warp works in a tensor: `count` elements from `begin` on, first `head` one by one, then `packed` in wide
// accesses, and the rest one by one again.
struct Span {
  int64_t begin;
  int count, head, packed;

  // The place of the k-th of the elements that are taken one by one, head and tail together.
  DEEPOPS_DEVICE int64_t single(int k) const { return begin + (k < head ? k : k + packed); }
};

// The stretch [begin, end) of a tensor. gap: elements before its first boundary, -1: it has none. Every cut but the
// ends of the tensor is moved up to the next boundary: a multiple of ChunkPlan::kAlign elements is one in a tensor that
// begins at one. unit: `packed` is a multiple of it.
DEEPOPS_DEVICE Span span_of(int gap, int64_t numel, int64_t begin, int64_t end, int unit) {
  if (gap < 0) return {begin, int(end - begin), int(end - begin), 0};
  const auto moved = [&](int64_t cut) { return cut + gap < numel ? cut + gap : numel; };
  const bool is_first = begin == 0;
  begin = is_first ? 0 : moved(begin);
  end = moved(end);
  const int count = int(end - begin);
  const int head = !is_first ? 0 : gap < count ? gap : count;
  return {begin, count, head, (count - head) / unit * unit};
}

}  // namespace deepops::optim
