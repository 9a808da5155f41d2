#include "core/memory_pool.h"

#include <pthread.h>
#include <sys/mman.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <bit>
#include <mutex>
#include <vector>

#include "core/checks.h"
#include "core/memory_stats.h"

namespace deepops::core {
namespace {

constexpr size_t kHugePage = size_t(2) << 20;
// From this size on the system may take back what is kept. Of small pages, one by one, that takes 100 us for 1.6 MB.
constexpr size_t kReclaimed = 2 * kHugePage;

struct Block {
  void* data;
  size_t size;
};

size_t round_up(size_t size, size_t unit) { return (size + unit - 1) / unit * unit; }

// Eight sizes between one power of two and the next, so that results of nearly the same size share blocks.
size_t block_size(size_t bytes) { return round_up(bytes, std::bit_floor(bytes) / 8); }

// On a boundary of 2 MB and in pages of that size, if the system has any.
void* map(size_t size) {
  const size_t reserved = size + kHugePage;
  void* const start = mmap(nullptr, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  STD_TORCH_CHECK(start != MAP_FAILED, "deepops: there is no memory for a result of ", size, " bytes");
  char* const first = static_cast<char*>(start);
  char* const data = reinterpret_cast<char*>(round_up(reinterpret_cast<uintptr_t>(first), kHugePage));
  if (data != first) munmap(first, data - first);
  if (const size_t after = first + reserved - (data + size)) munmap(data + size, after);
#ifdef MADV_HUGEPAGE
  madvise(data, size, MADV_HUGEPAGE);
#endif
  return data;
}

class MemoryPool {
 public:
  void* take(size_t size) {
    {
      const std::lock_guard lock(mutex_);
      const auto same = std::find_if(kept_.rbegin(), kept_.rend(), [&](const Block& b) { return b.size == size; });
      if (same != kept_.rend()) {
        void* const data = same->data;
        kept_.erase(std::next(same).base());
        kept_bytes_ -= size;
        live_ += size;
        return data;
      }
      most_live_ = std::max(most_live_, live_ + size);
      while (!kept_.empty() && live_ + size + kept_bytes_ > most_live_) release_oldest();
    }
    void* const data = map(size);
    const std::lock_guard lock(mutex_);
    live_ += size;
    ++mapped_;
    return data;
  }

  void give(void* data, size_t size) {
#ifdef MADV_FREE
    if (size >= kReclaimed) madvise(data, size, MADV_FREE);
#endif
    const std::lock_guard lock(mutex_);
    live_ -= size;
    kept_.push_back({data, size});
    kept_bytes_ += size;
  }

  void clear() {
    const std::lock_guard lock(mutex_);
    while (!kept_.empty()) release_oldest();
    most_live_ = live_;
  }

  deepops_memory_stats_result stats() {
    const std::lock_guard lock(mutex_);
    return {int64_t(live_), int64_t(kept_bytes_), mapped_};
  }

  std::mutex& mutex() { return mutex_; }

 private:
  void release_oldest() {
    const Block block = kept_.front();
    kept_.erase(kept_.begin());
    kept_bytes_ -= block.size;
    munmap(block.data, block.size);
  }

  std::mutex mutex_;
  std::vector<Block> kept_;  // the one given last at the end: its lines may still be in a cache
  size_t live_ = 0, most_live_ = 0, kept_bytes_ = 0;
  int64_t mapped_ = 0;
};

// Never destroyed: results may outlive every destructor. A process forked by another thread finds it unlocked.
MemoryPool& pool() {
  static MemoryPool* const pool = [] {
    auto* const made = new MemoryPool;
    pthread_atfork([] { core::pool().mutex().lock(); }, [] { core::pool().mutex().unlock(); },
                   [] { core::pool().mutex().unlock(); });
    return made;
  }();
  return *pool;
}

}  // namespace

torch::stable::Tensor pooled_empty(Sizes sizes, Sizes strides, const torch::stable::Tensor& like) {
  size_t bytes = like.element_size();
  for (const int64_t size : sizes) bytes *= size_t(size);
  if (bytes < size_t(kPooledBytes)) return empty(sizes, strides, like);
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  const size_t size = block_size(bytes);
  void* const data = pool().take(size);
  const auto give = [](void* block, void* size) { pool().give(block, reinterpret_cast<size_t>(size)); };
  AtenTensorHandle made;
  const auto error =
      torch_from_blob(data, int64_t(sizes.size()), sizes.data(), strides.data(), 0, dtype, aoti_torch_device_type_cpu(),
                      -1, &made, aoti_torch_layout_strided(), nullptr, 0, give, reinterpret_cast<void*>(size));
  if (error != 0) pool().give(data, size);
  STABLE_TORCH_ERROR_CODE_CHECK(error);
  return torch::stable::Tensor(made);
}

torch::stable::Tensor pooled_empty_like(const torch::stable::Tensor& like) {
  return pooled_empty(like.sizes(), like.strides(), like);
}

torch::stable::Tensor pooled_matrix(int64_t rows, int64_t columns, const torch::stable::Tensor& like) {
  const int64_t sizes[] = {rows, columns}, strides[] = {columns, 1};
  return pooled_empty({sizes, 2}, {strides, 2}, like);
}

torch::stable::Tensor pooled_empty_like_if(bool wanted, const torch::stable::Tensor& like) {
  return wanted ? pooled_empty_like(like) : empty_vector(0, like.scalar_type(), like);
}

}  // namespace deepops::core

deepops_memory_stats_result deepops_memory_stats() { return deepops::core::pool().stats(); }

void deepops_empty_cache() { deepops::core::pool().clear(); }
