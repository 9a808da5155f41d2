// Adam on the GPU: one launch for all tensors of all param groups and dtypes, from a table in device memory.
//
// A work item of ChunkPlan is a warp's. It finds its tensors by binary search, as the CPU's threads do, and makes the
// bias corrections of each from its step counter on the device, so that the host never waits and a CUDA graph of the
// step goes on counting. Elements are independent of each other: the bits do not depend on how they are divided.
#include "core/gpu.cuh"
//
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <mutex>
#include <optional>
#include <vector>

#include "optim/adam_math.h"
#include "optim/adam_op.h"

namespace deepops {
namespace {

using core::DataType;
using gpu::Pack;
using isa_gpu::AdamFactors;
using optim::AdamGroup;
using optim::AdamHyper;
using optim::AdamScalars;
using optim::Row;
using optim::StepCall;
using torch::stable::Tensor;

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / gpu::kWarp;

// In device memory, but for this struct itself.
struct AdamTable {
  const Row* rows;          // [count]; numel is 0 where a row is not active
  const int64_t* starts;    // [count]: ChunkPlan::starts()
  const AdamGroup* groups;  // by Row::group
  unsigned* arrived;        // [count]: warps that have read the row's step counter; 0 between launches
  int64_t count, chunk;
  bool some_empty;  // some active rows have no elements
};

// A struct of the table, 16 bytes at a time.
template <class T>
DEEPOPS_DEVICE T load_record(const T* p) {
  static_assert(sizeof(T) % gpu::kPackBytes == 0);
  struct Parts {
    Pack<uint32_t> part[sizeof(T) / gpu::kPackBytes];
  } parts;
#pragma unroll
  for (int i = 0; i < int(sizeof(T) / gpu::kPackBytes); ++i) {
    parts.part[i] = gpu::load_pack(reinterpret_cast<const uint32_t*>(p) + i * Pack<uint32_t>::kSize);
  }
  return __builtin_bit_cast(T, parts);
}

// The step that is being taken. Many warps of many blocks may ask for the same tensor, one for each of its `parts`, and
// the last of them, when all have read the counter, advances it.
DEEPOPS_DEVICE float next_step(float* step, unsigned* arrived, int64_t parts) {
  float t = 0;
  if (gpu::lane() == 0) {
    t = gpu::load(step) + 1;
    bool last = true;
    if (parts > 1) {
      gpu::fence();
      last = gpu::atomic_add(arrived, 1u) == unsigned(parts - 1);
      gpu::fence();
      if (last) gpu::store(arrived, 0u);
    }
    if (last) gpu::store(step, t);
  }
  return gpu::shuffle(t, 0);
}

// power() of adam_math.h, a leaf of its tree per lane. All lanes must call, and get the same.
DEEPOPS_DEVICE double warp_power(const double* powers, float t) {
  static_assert(AdamGroup::kPowers == gpu::kWarp);
  double v = isa_gpu::has_factor(isa_gpu::counter_bits(t), gpu::lane()) ? gpu::load(powers + gpu::lane()) : 1;
#pragma unroll
  for (int m = gpu::kWarp / 2; m > 0; m /= 2) v = v * gpu::shuffle_xor(v, m);
  return v;
}

template <bool kGradDecay, bool kAmsgrad, class T>
DEEPOPS_DEVICE void update_one(T& p, T g, T& m, T& v, T& v_max, const AdamFactors<core::OpMath<T>>& f) {
  using C = core::OpMath<T>;
  C wide_p = gpu::widen(p), wide_m = gpu::widen(m), wide_v = gpu::widen(v), wide_max = 0;
  if (kAmsgrad) wide_max = gpu::widen(v_max);
  isa_gpu::adam_element<kGradDecay, kAmsgrad>(wide_p, C(gpu::widen(g)), wide_m, wide_v, wide_max, f);
  p = gpu::narrow<T>(wide_p);
  m = gpu::narrow<T>(wide_m);
  v = gpu::narrow<T>(wide_v);
  if (kAmsgrad) v_max = gpu::narrow<T>(wide_max);
}

// Where a warp works in a tensor: `count` elements from `begin` on, first `head` one by one, then `packs` packs, and
// the rest one by one again.
struct Span {
  int64_t begin;
  int count;
  int head, packs;
};

// The part [begin, end) of the plan. Where all streams lie alike, every cut but the ends of the tensor is moved up to
// the next boundary of 16 bytes: a multiple of ChunkPlan::kAlign elements is one in a tensor that begins at one.
template <bool kAmsgrad, class T>
DEEPOPS_DEVICE Span span_of(const Row& row, int64_t begin, int64_t end) {
  const auto offset = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % gpu::kPackBytes; };
  const uintptr_t at = offset(row.param);
  if (offset(row.grad) != at || offset(row.state[0]) != at || offset(row.state[1]) != at ||
      (kAmsgrad && offset(row.state[2]) != at)) {
    return {begin, int(end - begin), int(end - begin), 0};
  }
  const int64_t head = gpu::head(static_cast<const T*>(row.param), row.numel);
  const auto moved = [&](int64_t cut) { return cut + head < row.numel ? cut + head : row.numel; };
  const bool is_first = begin == 0;
  begin = is_first ? 0 : moved(begin);
  end = moved(end);
  const int single = is_first ? int(head) : 0;
  const int count = int(end - begin);
  return {begin, count, single, (count - single) / Pack<T>::kSize};
}

template <bool kGradDecay, bool kAmsgrad, class T>
DEEPOPS_DEVICE void update(const Row& row, int64_t begin, int64_t end, const AdamScalars& scalars) {
  const auto f = isa_gpu::rounded<core::OpMath<T>>(scalars);
  const Span span = span_of<kAmsgrad, T>(row, begin, end);
  T* const p = static_cast<T*>(row.param) + span.begin;
  const T* const g = static_cast<const T*>(row.grad) + span.begin;
  T* const m = static_cast<T*>(row.state[0]) + span.begin;
  T* const v = static_cast<T*>(row.state[1]) + span.begin;
  T* const v_max = static_cast<T*>(row.state[2]) + (kAmsgrad ? span.begin : 0);
  const int count = span.count;
#pragma unroll 1
  for (int k = gpu::lane(); k < span.packs; k += gpu::kWarp) {
    const int i = span.head + k * Pack<T>::kSize;
    Pack<T> pack_p = gpu::load_pack(p + i), pack_m = gpu::load_pack(m + i), pack_v = gpu::load_pack(v + i);
    const Pack<T> pack_g = gpu::load_pack(g + i);
    Pack<T> pack_max = {};
    if (kAmsgrad) pack_max = gpu::load_pack(v_max + i);
#pragma unroll
    for (int j = 0; j < Pack<T>::kSize; ++j) {
      update_one<kGradDecay, kAmsgrad>(pack_p.value[j], pack_g.value[j], pack_m.value[j], pack_v.value[j],
                                       pack_max.value[j], f);
    }
    gpu::store_pack(p + i, pack_p);
    gpu::store_pack(m + i, pack_m);
    gpu::store_pack(v + i, pack_v);
    if (kAmsgrad) gpu::store_pack(v_max + i, pack_max);
  }
  // Head and tail together.
  const int in_packs = span.packs * Pack<T>::kSize;
#pragma unroll 1
  for (int k = gpu::lane(); k < count - in_packs; k += gpu::kWarp) {
    const int i = k < span.head ? k : k + in_packs;
    T one_p = gpu::load(p + i), one_m = gpu::load(m + i), one_v = gpu::load(v + i), one_max = {};
    if (kAmsgrad) one_max = gpu::load(v_max + i);
    update_one<kGradDecay, kAmsgrad>(one_p, gpu::load(g + i), one_m, one_v, one_max, f);
    gpu::store(p + i, one_p);
    gpu::store(m + i, one_m);
    gpu::store(v + i, one_v);
    if (kAmsgrad) gpu::store(v_max + i, one_max);
  }
}

template <class T>
DEEPOPS_DEVICE void update(const Row& row, int64_t begin, int64_t end, const AdamScalars& s, bool amsgrad) {
  if (s.grad_decay != 0) {
    amsgrad ? update<true, true, T>(row, begin, end, s) : update<true, false, T>(row, begin, end, s);
  } else {
    amsgrad ? update<false, true, T>(row, begin, end, s) : update<false, false, T>(row, begin, end, s);
  }
}

DEEPOPS_KERNEL(kThreads) adam_kernel(AdamTable table) {
  if (table.some_empty && gpu::block() == 0) {  // their counters are advanced all the same
    for (int64_t i = gpu::thread(); i < table.count; i += kThreads) {
      const Row row = load_record(table.rows + i);
      if (row.active && row.numel == 0) gpu::store(row.step, gpu::load(row.step) + 1);
    }
  }
  const int64_t item = int64_t(gpu::block()) * kWarps + gpu::warp();
  const auto start = [&](int64_t i) { return gpu::load(table.starts + i); };
  const auto size = [&](int64_t i) { return gpu::load(&table.rows[i].numel); };
  const auto body = [&](int64_t i, int64_t begin, int64_t end) {
    const Row row = load_record(table.rows + i);
    int64_t parts = 1;
    if (begin > 0 || end < row.numel) {
      const int64_t first = start(i);
      parts = (first + row.numel - 1) / table.chunk - first / table.chunk + 1;
    }
    const float t = next_step(row.step, table.arrived + i, parts);
    const AdamGroup* group = table.groups + row.group;
    const double beta1_t = warp_power(&group->beta1_powers[0], t);
    const double beta2_t = warp_power(&group->beta2_powers[0], t);
    const AdamHyper hyper = load_record(&group->hyper);
    const AdamScalars scalars = isa_gpu::scalars_of(hyper, beta1_t, beta2_t);
    DEEPOPS_DISPATCH_DTYPE(row.dtype, [&]<class T>() { update<T>(row, begin, end, scalars, hyper.amsgrad != 0); })
  };
  optim::for_each_stretch(table.count, item * table.chunk, (item + 1) * table.chunk, start, size, body);
}

// ---- host -----------------------------------------------------------------------------------------------------------

// Bytes of the host and their copy on the device, which is made when they have changed.
class Mirror {
 public:
  // Returns where the copy is. In a graph that is being captured the copy is part of the graph: it reads the same host
  // memory at every replay, so that is never given back, for the graph may outlive everything here.
  const char* update(const std::vector<char>& bytes, int32_t device_index, bool capturing) {
    const auto size = static_cast<int64_t>(bytes.size());
    if (device_ && bytes == copied_) return static_cast<const char*>(device_->data_ptr());
    const Tensor staged = gpu::host_bytes(size);
    std::memcpy(staged.data_ptr(), bytes.data(), bytes.size());
    if (!device_ || device_->numel() != size) device_ = gpu::device_bytes(size, device_index);
    copied_.clear();
    gpu::copy_in(*device_, staged);
    copied_ = bytes;
    if (capturing) {
      static std::mutex mutex;
      static auto* const kept = new std::vector<Tensor>;
      const std::lock_guard<std::mutex> lock(mutex);
      kept->push_back(staged);
    }
    return static_cast<const char*>(device_->data_ptr());
  }

 private:
  std::optional<Tensor> device_;
  std::vector<char> copied_;
};

struct GpuMemory final : optim::StepMemory {
  gpu::Stream stream = {};
  optim::AdamGroups groups;
  std::vector<char> bytes;
  Mirror rows, group_blocks;
  std::optional<Tensor> arrived;
};

// Rows, then starts.
void write_rows(const StepCall& call, std::vector<char>& bytes) {
  const size_t rows = sizeof(Row) * call.row_count;
  bytes.resize(rows + sizeof(int64_t) * call.row_count);
  std::memcpy(bytes.data(), call.rows, rows);
  for (int64_t i = 0; i < call.row_count; ++i) {
    std::memcpy(bytes.data() + sizeof(Row) * i + offsetof(Row, numel), &call.plan->sizes()[i], sizeof(int64_t));
  }
  std::memcpy(bytes.data() + rows, call.plan->starts().data(), bytes.size() - rows);
}

void step(const StepCall& call) {
  if (!optim::any_active(call)) return;
  const gpu::Device device(call.device_index);
  // What is allocated and copied while a graph is captured belongs to that graph: the copy is repeated by each replay.
  const bool capturing = gpu::capturing(device.stream());
  GpuMemory once;
  if (call.memory && !capturing) {
    // Memory of torch's allocator may be used on the stream it was allocated on.
    const auto* known = static_cast<const GpuMemory*>(call.memory->get());
    if (!known || known->stream != device.stream()) *call.memory = std::make_unique<GpuMemory>();
  }
  GpuMemory& memory = call.memory && !capturing ? static_cast<GpuMemory&>(**call.memory) : once;
  memory.stream = device.stream();

  AdamTable table = {};
  table.count = call.row_count;
  table.chunk = call.plan->chunk();
  for (int64_t i = 0; i < call.row_count; ++i) table.some_empty |= call.rows[i].active && call.rows[i].numel == 0;
  write_rows(call, memory.bytes);
  const char* rows = memory.rows.update(memory.bytes, call.device_index, capturing);
  table.rows = reinterpret_cast<const Row*>(rows);
  table.starts = reinterpret_cast<const int64_t*>(rows + sizeof(Row) * call.row_count);
  const std::vector<AdamGroup>& groups = memory.groups.update(call);
  const auto* group_bytes = reinterpret_cast<const char*>(groups.data());
  memory.bytes.assign(group_bytes, group_bytes + sizeof(AdamGroup) * groups.size());
  table.groups =
      reinterpret_cast<const AdamGroup*>(memory.group_blocks.update(memory.bytes, call.device_index, capturing));
  if (!memory.arrived) {
    const int64_t size = int64_t(sizeof(unsigned)) * call.row_count;
    memory.arrived = gpu::device_bytes(size, call.device_index);
    gpu::zero(memory.arrived->data_ptr(), size, device.stream());
  }
  table.arrived = static_cast<unsigned*>(memory.arrived->data_ptr());

  const int64_t blocks = std::max<int64_t>((call.plan->items() + kWarps - 1) / kWarps, 1);
  gpu::launch("adam", adam_kernel, blocks, kThreads, device.stream(), table);
}

struct Gpu {
  static constexpr const char* kDevice = "CUDA";
  static bool on_device(const Tensor& tensor) { return gpu::on_gpu(tensor); }
  static int64_t chunk(const std::vector<int64_t>& sizes) { return optim::gpu_chunk(sizes); }
  static void step(const StepCall& call) { deepops::step(call); }
};

DEEPOPS_GPU_LIBRARY_IMPL(m) { m.impl("adam", TORCH_BOX(&optim::AdamOp<Gpu>::run)); }

}  // namespace
}  // namespace deepops

void deepops_adam_step_cuda(const deepops::optim::StepCall* call) { deepops::step(*call); }
