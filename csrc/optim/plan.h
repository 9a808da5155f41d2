// How the tensors of an optimizer's step are divided into work items.
// Knows nothing of torch, Python or a particular optimizer, so that it is tested alone (tests/test_plan.py).
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/host_device.h"

namespace deepops::optim {

// Whether a tensor fills its memory without gaps or overlaps (in any order of its dimensions), so that it can be walked
// as a flat array. Dimensions of size 1 may have any stride.
inline bool is_dense(int64_t dims, const int64_t* sizes, const int64_t* strides) {
  std::vector<int64_t> order;
  for (int64_t d = 0; d < dims; ++d) {
    if (sizes[d] == 0) return true;
    if (sizes[d] > 1) order.push_back(d);
  }
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return strides[a] < strides[b]; });
  int64_t expected = 1;
  for (const int64_t d : order) {
    if (strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return true;
}

// Calls body(tensor, begin, end) for every stretch of elements whose place in the index space of ChunkPlan (below) is
// in [lo, hi), in order, none empty. start(i): where tensor i begins; size(i): its elements. On the GPU these two read
// the device's copy of the plan.
#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
template <class Start, class Size, class Body>
DEEPOPS_HD void for_each_stretch(int64_t tensors, int64_t lo, int64_t hi, const Start& start, const Size& size,
                                 const Body& body) {
  // The last tensor that starts at or before lo; empty ones share their start with the one after them.
  int64_t tensor = 0;
  for (int64_t after = tensors; after - tensor > 1;) {
    const int64_t middle = tensor + (after - tensor) / 2;
    (start(middle) <= lo ? tensor : after) = middle;
  }
  for (; tensor < tensors; ++tensor) {
    const int64_t first = start(tensor), count = size(tensor);
    if (first >= hi) break;
    const int64_t begin = lo > first ? lo - first : 0;
    const int64_t end = hi - first < count ? hi - first : count;
    if (begin < end) body(tensor, begin, end);
  }
}

// Divides many tensors into work items of equal size, whatever the sizes of the tensors.
//
// The tensors are laid end to end in one index space, each followed by padding; item i is the interval
// [i * chunk, (i + 1) * chunk) of it. So a large tensor is split, small ones share an item, and there is no list of
// chunks to build or store: two numbers per tensor and a binary search per item, on the GPU too.
//   padding: up to a multiple of kAlign elements, so that a tensor is only ever split at a multiple of kAlign, and
//   kOverhead more, which stands for the fixed cost of visiting a tensor: 8000 scalars are not one item.
class ChunkPlan {
 public:
  static constexpr int64_t kAlign = 64;
  static constexpr int64_t kOverhead = 64;

  ChunkPlan() = default;

  // sizes: elements of each tensor (0: never visited). chunk: elements per item, rounded up to a multiple of kAlign.
  ChunkPlan(const std::vector<int64_t>& sizes, int64_t chunk) : sizes_(sizes), chunk_(round_up(chunk)) {
    start_.reserve(sizes.size() + 1);
    start_.push_back(0);
    slot_.reserve(sizes.size() + 1);
    slot_.push_back(0);
    for (const int64_t size : sizes) {
      const int64_t start = start_.back();
      slot_.push_back(slot_.back() + (size > 0 ? (start + size - 1) / chunk_ - start / chunk_ + 1 : 0));
      start_.push_back(start + (size > 0 ? round_up(size) + kOverhead : 0));
    }
  }

  int64_t chunk() const { return chunk_; }
  int64_t items() const { return start_.empty() ? 0 : (start_.back() + chunk_ - 1) / chunk_; }
  const std::vector<int64_t>& sizes() const { return sizes_; }
  // Where each tensor begins in the index space, and where the last one ends: one number more than tensors.
  const std::vector<int64_t>& starts() const { return start_; }

  // Stretches are numbered tensor by tensor, and in a tensor in order: places for what a pass finds, to be added up in
  // an order that does not depend on who found it. Tensor i has slots [slots()[i], slots()[i + 1]).
  const std::vector<int64_t>& slots() const { return slot_; }
  // The slot of the stretch of `tensor` that begins at `begin`.
  int64_t slot(int64_t tensor, int64_t begin) const {
    return slot_[tensor] + (start_[tensor] + begin) / chunk_ - start_[tensor] / chunk_;
  }

  // Calls body(tensor, begin, end) for every stretch of elements in items [first, last), in order, none empty, none
  // longer than chunk().
  template <class Body>
  void for_each(int64_t first, int64_t last, const Body& body) const {
    for (int64_t item = first; item < last; ++item) {
      for_each_stretch(
          static_cast<int64_t>(sizes_.size()), item * chunk_, (item + 1) * chunk_,
          [&](int64_t tensor) { return start_[tensor]; }, [&](int64_t tensor) { return sizes_[tensor]; }, body);
    }
  }

 private:
  static int64_t round_up(int64_t count) { return (std::max<int64_t>(count, 1) + kAlign - 1) / kAlign * kAlign; }

  std::vector<int64_t> sizes_, start_, slot_;
  int64_t chunk_ = kAlign;
};

// Elements per work item on the CPU: the 4 streams of Adam in fp32, 32 KB each, stay in one core's level-2 cache.
inline constexpr int64_t kCpuChunk = 8192;

// Elements per work item on a GPU, where an item is a warp's: many enough to outweigh what is looked up per item, few
// enough for 8000 warps, which fill a large GPU, as long as there are that many elements. Results do not depend on it.
inline int64_t gpu_chunk(const std::vector<int64_t>& sizes) {
  int64_t total = 0;
  for (const int64_t size : sizes) total += size;
  return std::clamp<int64_t>(total / 8192, 1024, 4096);
}

}  // namespace deepops::optim
