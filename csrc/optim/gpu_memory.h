// What the GPU's step and norm functions keep from one call to the next: their tables in device memory, and workspace.
#pragma once
#include <cstddef>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "optim/rows.cuh"
#include "optim/step.h"

namespace deepops::optim {

// Bytes of the host and their copy on the device, which is made when they have changed.
class Mirror {
 public:
  // Returns where the copy is. In a graph that is being captured the copy is part of the graph: it reads the same host
  // memory at every replay, so that is never given back, for the graph may outlive everything here.
  const char* update(const std::vector<char>& bytes, int32_t device_index, bool capturing) {
    const auto size = static_cast<int64_t>(bytes.size());
    if (device_ && bytes == copied_) return static_cast<const char*>(device_->data_ptr());
    const torch::stable::Tensor staged = gpu::host_bytes(size);
    std::memcpy(staged.data_ptr(), bytes.data(), bytes.size());
    if (!device_ || device_->numel() != size) device_ = gpu::device_bytes(size, device_index);
    copied_.clear();
    gpu::copy_in(*device_, staged);
    copied_ = bytes;
    if (capturing) {
      static std::mutex mutex;
      static auto* const kept = new std::vector<torch::stable::Tensor>;
      const std::lock_guard<std::mutex> lock(mutex);
      kept->push_back(staged);
    }
    return static_cast<const char*>(device_->data_ptr());
  }

 private:
  std::optional<torch::stable::Tensor> device_;
  std::vector<char> copied_;
};

// Memory on the device for `count` T at least.
class Workspace {
 public:
  template <class T>
  T* uninitialised(int64_t count, const gpu::Device&, int32_t device_index) {
    grow(int64_t(sizeof(T)) * count, device_index);
    return static_cast<T*>(tensor_->data_ptr());
  }
  // 0 when it is new: counters, which every kernel leaves as it has found them.
  template <class T>
  T* zeroed(int64_t count, const gpu::Device& device, int32_t device_index) {
    const int64_t bytes = int64_t(sizeof(T)) * count;
    if (grow(bytes, device_index)) gpu::zero(tensor_->data_ptr(), bytes, device.stream());
    return static_cast<T*>(tensor_->data_ptr());
  }

 private:
  bool grow(int64_t bytes, int32_t device_index) {
    if (tensor_ && tensor_->numel() >= bytes) return false;
    tensor_ = gpu::device_bytes(bytes, device_index);
    return true;
  }

  std::optional<torch::stable::Tensor> tensor_;
};

// One class for all rules and the norm, which share the StepMemory of a table.
struct GpuMemory final : StepMemory {
  gpu::Stream stream = {};
  std::vector<char> bytes;
  Mirror rows, group_blocks;
  std::unique_ptr<StepMemory> groups;              // of the rule
  Workspace arrived, counted, fact_slots;          // of a step
  Workspace norm_arrived, norm_parts, norm_slots;  // of a norm
};

// A call, its device and its memory, while the call lasts.
class GpuCall {
 public:
  explicit GpuCall(const StepCall& call)
      : call_(call), device_(call.device_index), capturing_(gpu::capturing(device_.stream())) {
    // What is allocated and copied while a graph is captured belongs to that graph: the copy is repeated by each
    // replay.
    const bool keeps = call.memory && !capturing_;
    if (keeps) {
      // Memory of torch's allocator may be used on the stream it was allocated on.
      const auto* known = static_cast<const GpuMemory*>(call.memory->get());
      if (!known || known->stream != device_.stream()) *call.memory = std::make_unique<GpuMemory>();
    }
    memory_ = keeps ? static_cast<GpuMemory*>(call.memory->get()) : &once_;
    memory_->stream = device_.stream();
  }

  gpu::Stream stream() const { return device_.stream(); }
  GpuMemory& memory() { return *memory_; }

  RowTable rows() {
    const size_t count = call_.row_count, rows = sizeof(Row) * count, starts = sizeof(int64_t) * count;
    std::vector<char>& bytes = memory_->bytes;
    bytes.resize(rows + starts + starts + sizeof(int64_t));
    std::memcpy(bytes.data(), call_.rows, rows);
    for (size_t i = 0; i < count; ++i) {
      std::memcpy(bytes.data() + sizeof(Row) * i + offsetof(Row, numel), &call_.plan->sizes()[i], sizeof(int64_t));
    }
    std::memcpy(bytes.data() + rows, call_.plan->starts().data(), starts);
    std::memcpy(bytes.data() + rows + starts, call_.plan->slots().data(), starts + sizeof(int64_t));
    const char* copy = memory_->rows.update(bytes, call_.device_index, capturing_);
    return {reinterpret_cast<const Row*>(copy), reinterpret_cast<const int64_t*>(copy + rows),
            reinterpret_cast<const int64_t*>(copy + rows + starts), call_.row_count, call_.plan->chunk()};
  }

  template <class Group>
  const Group* groups(const std::vector<Group>& groups) {
    const auto* data = reinterpret_cast<const char*>(groups.data());
    memory_->bytes.assign(data, data + sizeof(Group) * groups.size());
    return reinterpret_cast<const Group*>(memory_->group_blocks.update(memory_->bytes, call_.device_index, capturing_));
  }

  template <class T>
  T* uninitialised(Workspace& workspace, int64_t count) {
    return workspace.uninitialised<T>(count, device_, call_.device_index);
  }
  template <class T>
  T* zeroed(Workspace& workspace, int64_t count) {
    return workspace.zeroed<T>(count, device_, call_.device_index);
  }

 private:
  const StepCall& call_;
  gpu::Device device_;
  bool capturing_;
  GpuMemory once_;
  GpuMemory* memory_;
};

// Where tensors are and how they are divided, for ListOp.
struct GpuBackend {
  static constexpr const char* kDevice = "CUDA";
  static bool on_device(const torch::stable::Tensor& tensor) { return gpu::on_gpu(tensor); }
  static int64_t chunk(const std::vector<int64_t>& sizes) { return gpu_chunk(sizes); }
};

}  // namespace deepops::optim
