// The norm of all gradients on the GPU, and their clipping: one launch each, nothing is read by the host.
#include "core/gpu.cuh"
//
#include "optim/gpu_memory.h"
#include "optim/grad_norm.h"
#include "optim/rule_math.h"
#include "optim/scaling_math.h"

namespace deepops::optim {
namespace {

constexpr int kThreads = 256;

// Pointers: in device memory.
struct NormArguments {
  RowTable table;
  const float* grad_scale;  // null: 1
  GradSquares* parts;       // [blocks]
  unsigned* arrived;        // blocks that have filled theirs; 0 between launches
  GradSquares* slots;       // by slot, for row_norms
  GradSquares* row_norms;   // [count]; null: not wanted
  GradNorm* out;
};

DEEPOPS_DEVICE void store(GradSquares* p, double squares, double non_finite) {
  gpu::store(&p->squares, squares);
  gpu::store(&p->non_finite, non_finite);
}

// A sum in double on each thread; products of fp32 numbers are exact there.
struct Sums {
  double squares = 0;
  int non_finite = 0;

  template <class C>
  DEEPOPS_DEVICE void add(C x) {
    squares += double(x) * double(x);
    non_finite += x - x == 0 ? 0 : 1;
  }
};

// What is read of a row.
struct Grad {
  void* data;
  int64_t numel;
  core::DataType dtype;

  DEEPOPS_DEVICE static Grad of(const Row* row) {
    static_assert(offsetof(Row, grad) % gpu::kPackBytes == 0 && offsetof(Row, numel) == offsetof(Row, grad) + 8);
    const gpu::Pack<int64_t> pack = gpu::load_pack(reinterpret_cast<const int64_t*>(&row->grad));
    return {reinterpret_cast<void*>(pack.value[0]), pack.value[1], gpu::load(&row->dtype)};
  }
  template <class T>
  DEEPOPS_DEVICE Span span(int64_t begin, int64_t end) const {
    return span_of(gap(data, sizeof(T)), numel, begin, end, gpu::Pack<T>::kSize);
  }
};

template <class T>
DEEPOPS_DEVICE void add_squares(const Grad& row, int64_t begin, int64_t end, Sums& sums) {
  constexpr int kPack = gpu::Pack<T>::kSize;
  const T* const grad = static_cast<const T*>(row.data);
  const Span span = row.template span<T>(begin, end);
#pragma unroll 4
  for (int k = gpu::lane() * kPack; k < span.packed; k += gpu::kWarp * kPack) {
    const gpu::Pack<T> pack = gpu::load_pack(grad + span.begin + span.head + k);
#pragma unroll
    for (int j = 0; j < kPack; ++j) sums.add(gpu::widen(pack.value[j]));
  }
#pragma unroll 1
  for (int k = gpu::lane(); k < span.count - span.packed; k += gpu::kWarp) {
    sums.add(gpu::widen(gpu::load(grad + span.single(k))));
  }
}

// The sums over [first, last) of `from`, which other blocks have filled: by the lanes, or threads, of which this is
// number `own` of `count`.
DEEPOPS_DEVICE GradSquares sum_of(const GradSquares* from, int64_t first, int64_t last, int own, int count) {
  GradSquares sum = {};
#pragma unroll 4
  for (int64_t k = first + own; k < last; k += count) {
    sum.squares += gpu::load_fresh(&from[k].squares);
    sum.non_finite += gpu::load_fresh(&from[k].non_finite);
  }
  return sum;
}

// The last block adds up what all blocks have found, in an order that depends on nothing else.
DEEPOPS_DEVICE void finish(const NormArguments& a) {
  if (a.row_norms) {
    for (int64_t i = gpu::warp(); i < a.table.count; i += kThreads / gpu::kWarp) {
      const int64_t first = gpu::load(a.table.slots + i), last = gpu::load(a.table.slots + i + 1);
      const GradSquares own = sum_of(a.slots, first, last, gpu::lane(), gpu::kWarp);
      const double squares = gpu::warp_sum<gpu::kWarp>(own.squares);
      const double non_finite = gpu::warp_sum<gpu::kWarp>(own.non_finite);
      if (gpu::lane() == 0) store(a.row_norms + i, squares, non_finite);
    }
  }
  const GradSquares own = sum_of(a.parts, 0, gpu::blocks(), gpu::thread(), kThreads);
  double total[] = {own.squares, own.non_finite};
  gpu::block_sum<kThreads>(total);
  if (gpu::thread() != 0) return;
  const double scale = a.grad_scale ? double(gpu::load(a.grad_scale)) : 1;
  gpu::store(&a.out->squares, total[0]);
  gpu::store(&a.out->non_finite, total[1]);
  gpu::store(&a.out->norm, float(isa_gpu::square_root(total[0]) / scale));
  gpu::store(&a.out->found_inf, total[1] != 0 ? 1.f : 0.f);
  gpu::store(a.arrived, 0u);
}

DEEPOPS_KERNEL(kThreads, 1) norm_kernel(NormArguments a) {
  double found[2] = {};  // by this thread: squares, non-finite
  for_each_stretch_of_warp<kThreads>(a.table, [&](int64_t i, int64_t begin, int64_t end) {
    const Grad row = Grad::of(a.table.rows + i);
    Sums sums;
    DEEPOPS_DISPATCH_DTYPE(row.dtype, [&]<class T>() { add_squares<T>(row, begin, end, sums); })
    found[0] += sums.squares;
    found[1] += sums.non_finite;
    if (!a.row_norms) return;
    const double squares = gpu::warp_sum<gpu::kWarp>(sums.squares);
    const int non_finite = gpu::warp_sum<gpu::kWarp>(sums.non_finite);
    if (gpu::lane() == 0) store(a.slots + slot_of(a.table, i, begin), squares, non_finite);
  });
  gpu::block_sum<kThreads>(found);
  if (gpu::thread() == 0) store(a.parts + gpu::block(), found[0], found[1]);
  if (gpu::last_block(a.arrived, gpu::blocks())) finish(a);
}

template <class T>
DEEPOPS_DEVICE void multiply(const Grad& row, int64_t begin, int64_t end, core::OpMath<T> factor) {
  constexpr int kPack = gpu::Pack<T>::kSize;
  T* const grad = static_cast<T*>(row.data);
  const Span span = row.template span<T>(begin, end);
#pragma unroll 1
  for (int k = gpu::lane() * kPack; k < span.packed; k += gpu::kWarp * kPack) {
    T* const at = grad + span.begin + span.head + k;
    gpu::Pack<T> pack = gpu::load_pack(at);
#pragma unroll
    for (int j = 0; j < kPack; ++j) pack.value[j] = gpu::narrow<T>(gpu::widen(pack.value[j]) * factor);
    gpu::store_pack(at, pack);
  }
#pragma unroll 1
  for (int k = gpu::lane(); k < span.count - span.packed; k += gpu::kWarp) {
    T* const at = grad + span.single(k);
    gpu::store(at, gpu::narrow<T>(gpu::widen(gpu::load(at)) * factor));
  }
}

DEEPOPS_KERNEL(kThreads) clip_kernel(RowTable table, const GradNorm* norm, double max_norm) {
  const double factor = isa_gpu::clip_factor(gpu::load(&norm->squares), 1, max_norm);
  if (factor == 1) return;
  for_each_stretch_of_warp<kThreads>(table, [&](int64_t i, int64_t begin, int64_t end) {
    const Grad row = Grad::of(table.rows + i);
    DEEPOPS_DISPATCH_DTYPE(row.dtype, [&]<class T>() { multiply<T>(row, begin, end, core::OpMath<T>(factor)); })
  });
}

// ---- host -----------------------------------------------------------------------------------------------------------

void norm(const StepCall& call, GradNorm* out, GradSquares* row_norms) {
  GpuCall gpu_call(call);
  GpuMemory& memory = gpu_call.memory();
  const int64_t blocks = blocks_for(*call.plan, kThreads);
  NormArguments a = {};
  a.table = gpu_call.rows();
  a.grad_scale = call.scaling.grad_scale;
  a.parts = gpu_call.uninitialised<GradSquares>(memory.norm_parts, blocks);
  a.arrived = gpu_call.zeroed<unsigned>(memory.norm_arrived, 1);
  if (row_norms) a.slots = gpu_call.uninitialised<GradSquares>(memory.norm_slots, call.plan->slots().back());
  a.row_norms = row_norms;
  a.out = out;
  gpu::launch("grad_norm", norm_kernel, blocks, kThreads, gpu_call.stream(), a);
}

void clip(const StepCall& call) {
  if (call.plan->items() == 0) return;
  GpuCall gpu_call(call);
  gpu::launch("grad_clip", clip_kernel, blocks_for(*call.plan, kThreads), kThreads, gpu_call.stream(), gpu_call.rows(),
              call.scaling.norm, call.scaling.max_norm);
}

}  // namespace
}  // namespace deepops::optim

void deepops_grad_norm_cuda(const deepops::optim::StepCall* call, deepops::optim::GradNorm* norm,
                            deepops::optim::GradSquares* row_norms) {
  deepops::optim::norm(*call, norm, row_norms);
}

void deepops_grad_clip_cuda(const deepops::optim::StepCall* call) { deepops::optim::clip(*call); }
