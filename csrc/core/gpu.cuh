// The portability layer of the GPU kernels: with tensor_core.cuh the only file that knows whether it is CUDA.
//
// nvcc compiles the .cu files for the GPU. With DEEPOPS_SIMT, g++ compiles the very same files, launch code included,
// for the executor in tests/simt, which runs one fiber per CUDA thread on CPU tensors and checks and counts what the
// kernels do. Kernels may use nothing but what is here (`make lint`): a raw __shared__ would silently become a local
// variable under g++, and a plain dereference of global memory would be neither checked nor counted.
//
// Blocks and grids have one dimension. `Here` parameters are never given: they tell the executor where a call stands.
#pragma once
#define DEEPOPS_GPU
#define DEEPOPS_ISA isa_gpu

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

#include "core/allocate.h"
#include "core/dtype.h"

#ifdef DEEPOPS_SIMT
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <cmath>

#include "simt/simt.h"
#else
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#include <torch/csrc/stable/accelerator.h>

#include <map>
#include <set>
#include <tuple>
#include <utility>
#endif

namespace deepops::gpu {

constexpr int kWarp = 32;
constexpr int kPackBytes = 16;

// 16 bytes of T, which move in one instruction.
template <class T>
struct alignas(kPackBytes) Pack {
  static constexpr int kSize = kPackBytes / int(sizeof(T));
  T value[kSize];
};

// ---- what differs: nvcc ---------------------------------------------------------------------------------------------

#ifndef DEEPOPS_SIMT

struct Here {};
#define DEEPOPS_HERE \
  ::deepops::gpu::Here {}

// DEEPOPS_KERNEL(threads) name(arguments) {...}: a kernel that is launched with blocks of `threads` threads.
// DEEPOPS_KERNEL(threads, blocks): registers have to suffice for so many blocks on a multiprocessor. With 1 the
// compiler does not spill some to fit in another block.
#define DEEPOPS_KERNEL(...) __global__ void __launch_bounds__(__VA_ARGS__)
#define DEEPOPS_DEVICE __device__ __forceinline__

DEEPOPS_DEVICE int thread() { return int(threadIdx.x); }  // in its block
DEEPOPS_DEVICE int block() { return int(blockIdx.x); }    // in the grid
DEEPOPS_DEVICE int blocks() { return int(gridDim.x); }

namespace detail {
template <class V>
DEEPOPS_DEVICE V load(const void* p, Here) {
  return *static_cast<const V*>(p);
}
template <class V>
DEEPOPS_DEVICE V load_fresh(const void* p, Here) {
  return __ldcg(static_cast<const V*>(p));
}
template <class V>
DEEPOPS_DEVICE void store(void* p, V value, Here) {
  *static_cast<V*>(p) = value;
}
// Of an int4 the compiler makes four stores, which it joins again unless it has moved some of them out of branches.
DEEPOPS_DEVICE void store_whole(void* p, int4 value, Here) { __stwb(static_cast<int4*>(p), value); }
}  // namespace detail
using Bits16 = int4;  // 16 bytes that move at once

// Waits for all threads of the block; what they wrote to memory before is visible after.
DEEPOPS_DEVICE void barrier(Here = DEEPOPS_HERE) { __syncthreads(); }
DEEPOPS_DEVICE void warp_barrier(Here = DEEPOPS_HERE) { __syncwarp(); }
// Orders this thread's writes before its later ones, for all threads of the device.
DEEPOPS_DEVICE void fence() { __threadfence(); }
// Adds to *counter, returns what was there before.
DEEPOPS_DEVICE unsigned atomic_add(unsigned* counter, unsigned value, Here = DEEPOPS_HERE) {
  return atomicAdd(counter, value);
}

// Waits until *counter, which others increase by atomic_add(), is at least `value`. Their blocks must be sure to run.
DEEPOPS_DEVICE void await(const unsigned* counter, unsigned value, Here = DEEPOPS_HERE) {
  while (*static_cast<const volatile unsigned*>(counter) < value) __nanosleep(32);
}

// All 32 lanes of the warp must call. T: 4 or 8 bytes.
template <class T>
DEEPOPS_DEVICE T shuffle_xor(T value, int lane_mask, Here = DEEPOPS_HERE) {
  return __shfl_xor_sync(0xffffffffu, value, lane_mask);
}
template <class T>
DEEPOPS_DEVICE T shuffle(T value, int source_lane, Here = DEEPOPS_HERE) {
  return __shfl_sync(0xffffffffu, value, source_lane);
}
// One bit per lane.
DEEPOPS_DEVICE unsigned ballot(bool condition, Here = DEEPOPS_HERE) { return __ballot_sync(0xffffffffu, condition); }

// DEEPOPS_SHARED(T, name, n): an array of n T shared by the block, uninitialised; name.load(i), name.store(i, value).
// i of a pack: of its first element, on a 16-byte boundary.
template <class T>
struct Shared {
  T* data;
  DEEPOPS_DEVICE T load(int i, Here = DEEPOPS_HERE) const { return data[i]; }
  DEEPOPS_DEVICE void store(int i, T value, Here = DEEPOPS_HERE) const { data[i] = value; }
  DEEPOPS_DEVICE Pack<T> load_pack(int i, Here = DEEPOPS_HERE) const {
    return __builtin_bit_cast(Pack<T>, *reinterpret_cast<const Bits16*>(data + i));
  }
  DEEPOPS_DEVICE void store_pack(int i, const Pack<T>& pack, Here = DEEPOPS_HERE) const {
    *reinterpret_cast<Bits16*>(data + i) = __builtin_bit_cast(Bits16, pack);
  }
};
#define DEEPOPS_SHARED(T, name, n)                \
  __shared__ __align__(16) T name##_in_shared[n]; \
  const ::deepops::gpu::Shared<T> name { name##_in_shared }
// The bytes that launch_on_chip() was given, as an array of T.
template <class T>
DEEPOPS_DEVICE Shared<T> dynamic_shared() {
  extern __shared__ __align__(16) unsigned char dynamic_bytes[];
  return {reinterpret_cast<T*>(dynamic_bytes)};
}

DEEPOPS_DEVICE float to_float(core::Half value) { return __half2float(__ushort_as_half(value.bits)); }
DEEPOPS_DEVICE core::Half to_half(float value) { return {__half_as_ushort(__float2half_rn(value))}; }

using Stream = cudaStream_t;

inline void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, ": CUDA error: ", cudaGetErrorString(error));
}

inline bool on_gpu(const torch::stable::Tensor& tensor) { return tensor.is_cuda(); }

// Makes the device of a tensor the current one, and knows its current stream.
class Device {
 public:
  explicit Device(const torch::stable::Tensor& tensor) : Device(tensor.get_device_index()) {}
  explicit Device(int32_t index) : guard_(index) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
    stream_ = static_cast<Stream>(stream);
  }
  Stream stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  Stream stream_;
};

namespace detail {
inline int attribute(cudaDeviceAttr which) {  // of the current device
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "device");
  check(cudaDeviceGetAttribute(&value, which, device), "device attribute");
  return value;
}
}  // namespace detail

// Of the current device: 8 for all of 8.x.
inline int major_capability() { return detail::attribute(cudaDevAttrComputeCapabilityMajor); }
inline int multiprocessors() { return detail::attribute(cudaDevAttrMultiProcessorCount); }

// Runs kernel(arguments...) on `blocks` blocks of `threads` threads. name: for error messages and the executor's
// counts.
template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), int64_t blocks, int threads, Stream stream, A... arguments) {
  STD_TORCH_CHECK(blocks > 0 && blocks <= 0x7fffffff, name, ": ", blocks, " blocks");
  kernel<<<unsigned(blocks), unsigned(threads), 0, stream>>>(arguments...);
  check(cudaGetLastError(), name);
}

// What launch_on_chip() may ask of the current device with `each` blocks on every multiprocessor: so many blocks run at
// the same time, each with so many bytes of dynamic shared memory. 0 and 0 where that cannot be.
struct Residency {
  int64_t blocks = 0, bytes = 0;
};
template <class... P>
Residency residency(void (*kernel)(P...), int threads, int each) {
  int device = 0;
  check(cudaGetDevice(&device), "device");
  thread_local std::map<std::tuple<const void*, int, int>, Residency> known;
  const auto [at, is_new] = known.try_emplace({reinterpret_cast<const void*>(kernel), device, each});
  if (!is_new) return at->second;
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device), "device attribute");
    return value;
  };
  if (!attribute(cudaDevAttrCooperativeLaunch)) return {};
  cudaFuncAttributes own;
  check(cudaFuncGetAttributes(&own, kernel), "kernel attributes");
  const int most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - int(own.sharedSizeBytes);
  const int share = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / each -
                    attribute(cudaDevAttrReservedSharedMemoryPerBlock) - int(own.sharedSizeBytes);
  const int bytes = (most < share ? most : share) / 1024 * 1024;
  if (bytes <= 0) return {};
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most), "shared memory");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100), "shared memory");
  int fit = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&fit, kernel, threads, size_t(bytes)), "occupancy");
  if (fit < each) return {};
  return at->second = {int64_t(each) * attribute(cudaDevAttrMultiProcessorCount), bytes};
}

// launch() with dynamic shared memory. together: all blocks run at the same time and may wait for each other; false,
// with nothing done, if the device does not have room for them now (a process may have a part of it).
template <class... P, class... A>
bool launch_on_chip(const char* name, void (*kernel)(P...), int64_t blocks, int threads, int64_t bytes, bool together,
                    Stream stream, A... arguments) {
  STD_TORCH_CHECK(blocks > 0 && blocks <= 0x7fffffff, name, ": ", blocks, " blocks");
  cudaLaunchAttribute cooperative{};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = unsigned(blocks);
  config.blockDim = unsigned(threads);
  config.dynamicSmemBytes = size_t(bytes);
  config.stream = stream;
  config.attrs = &cooperative;
  config.numAttrs = together ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, P(arguments)...);
  if (together && error == cudaErrorCooperativeLaunchTooLarge) {
    cudaGetLastError();  // forgets it
    return false;
  }
  check(error, name);
  return true;
}

// launch() with dynamic shared memory: more than the 48 KiB that every block may have, too.
template <class... P, class... A>
void launch_with_shared(const char* name, void (*kernel)(P...), int64_t blocks, int threads, int64_t bytes,
                        Stream stream, A... arguments) {
  int device = 0;
  check(cudaGetDevice(&device), "device");
  thread_local std::set<std::pair<const void*, int>> prepared;
  if (prepared.insert({reinterpret_cast<const void*>(kernel), device}).second) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)), name);
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100), name);
  }
  launch_on_chip(name, kernel, blocks, threads, bytes, false, stream, arguments...);
}

// In the order of the stream.
inline void zero(void* data, size_t bytes, Stream stream) { check(cudaMemsetAsync(data, 0, bytes, stream), "memset"); }

// Whether what is queued on the stream now becomes part of a CUDA graph.
inline bool capturing(Stream stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &status), "capture status");
  return status != cudaStreamCaptureStatusNone;
}

inline int32_t device_type() { return aoti_torch_device_type_cuda(); }

// [bytes] of page-locked memory, uninitialised, from torch's caching allocator.
inline torch::stable::Tensor host_bytes(int64_t bytes) {
  const int64_t stride = 1;
  AtenTensorHandle made;
  // Where the allocator has nothing left it asks the driver, which refuses that to a thread that captures a graph
  // unless the thread says that it knows what it does.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  check(cudaThreadExchangeStreamCaptureMode(&mode), "capture mode");
  const AOTITorchError error = aoti_torch_empty_strided_pinned(1, &bytes, &stride, aoti_torch_dtype_uint8(),
                                                               aoti_torch_device_type_cpu(), 0, &made);
  check(cudaThreadExchangeStreamCaptureMode(&mode), "capture mode");
  STABLE_TORCH_ERROR_CODE_CHECK(error);
  return torch::stable::Tensor(made);
}

// In the order of torch's current stream, without waiting. torch does not give the memory of `host` to anybody else
// before the copy is done, even if the tensor is gone.
inline void copy_in(const torch::stable::Tensor& device, const torch::stable::Tensor& host) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(device.get(), host.get(), 1));
}

// out = a b and out += a b for matrices, by torch (cuBLAS), in the order of torch's current stream.
inline void multiply(const torch::stable::Tensor& out, const torch::stable::Tensor& a, const torch::stable::Tensor& b) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_mm_out(out.get(), a.get(), b.get()));
}
inline void multiply_add(const torch::stable::Tensor& out, const torch::stable::Tensor& a,
                         const torch::stable::Tensor& b) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_addmm_out(out.get(), out.get(), a.get(), b.get(), 1, 1));
}

// STABLE_TORCH_LIBRARY_IMPL of the GPU kernels.
#define DEEPOPS_GPU_LIBRARY_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(deepops, CUDA, m)

// ---- what differs: the executor -------------------------------------------------------------------------------------

#else

using Here = ::simt::Here;
#define DEEPOPS_HERE ::simt::Here::at()

#define DEEPOPS_KERNEL(...) void
#define DEEPOPS_DEVICE inline

DEEPOPS_DEVICE int thread() { return ::simt::thread(); }
DEEPOPS_DEVICE int block() { return ::simt::block(); }
DEEPOPS_DEVICE int blocks() { return ::simt::blocks(); }

namespace detail {
// The executor is told of an access; the access itself stands here, where sanitizers see it.
template <class V>
DEEPOPS_DEVICE V load(const void* p, Here here, ::simt::Global kind = ::simt::Global::load) {
  ::simt::global_access(p, sizeof(V), kind, here);
  V value;
  __builtin_memcpy(&value, p, sizeof(V));
  return value;
}
template <class V>
DEEPOPS_DEVICE V load_fresh(const void* p, Here here) {
  return load<V>(p, here, ::simt::Global::load_fresh);
}
template <class V>
DEEPOPS_DEVICE void store(void* p, V value, Here here) {
  ::simt::global_access(p, sizeof(V), ::simt::Global::store, here);
  __builtin_memcpy(p, &value, sizeof(V));
}
}  // namespace detail
struct alignas(16) Bits16 {
  uint64_t low, high;
};
namespace detail {
DEEPOPS_DEVICE void store_whole(void* p, Bits16 value, Here here) { store(p, value, here); }
}  // namespace detail

DEEPOPS_DEVICE void barrier(Here here = DEEPOPS_HERE) { ::simt::barrier(here); }
DEEPOPS_DEVICE void warp_barrier(Here here = DEEPOPS_HERE) { ::simt::warp_barrier(here); }
DEEPOPS_DEVICE void fence() { ::simt::fence(); }
DEEPOPS_DEVICE unsigned atomic_add(unsigned* counter, unsigned value, Here here = DEEPOPS_HERE) {
  return ::simt::atomic_add(counter, value, here);
}
DEEPOPS_DEVICE void await(const unsigned* counter, unsigned value, Here here = DEEPOPS_HERE) {
  ::simt::await(counter, value, here);
}
template <class T>
DEEPOPS_DEVICE T shuffle_xor(T value, int lane_mask, Here here = DEEPOPS_HERE) {
  return ::simt::shuffle(::simt::WarpOp::shuffle_xor, value, lane_mask, here);
}
template <class T>
DEEPOPS_DEVICE T shuffle(T value, int source_lane, Here here = DEEPOPS_HERE) {
  return ::simt::shuffle(::simt::WarpOp::shuffle, value, source_lane, here);
}
DEEPOPS_DEVICE unsigned ballot(bool condition, Here here = DEEPOPS_HERE) { return ::simt::ballot(condition, here); }

template <class T>
struct Shared {
  ::simt::SharedArray array;
  DEEPOPS_DEVICE T load(int i, Here here = DEEPOPS_HERE) const { return read<T>(i, here); }
  DEEPOPS_DEVICE void store(int i, T value, Here here = DEEPOPS_HERE) const { write(i, value, here); }
  DEEPOPS_DEVICE Pack<T> load_pack(int i, Here here = DEEPOPS_HERE) const { return read<Pack<T>>(i, here); }
  DEEPOPS_DEVICE void store_pack(int i, const Pack<T>& pack, Here here = DEEPOPS_HERE) const { write(i, pack, here); }

 private:
  template <class V>
  V read(int i, Here here) const {
    const void* p = ::simt::shared_access(array, i, sizeof(T), sizeof(V), ::simt::Shared::load, here);
    V value;
    __builtin_memcpy(&value, p, sizeof(V));
    return value;
  }
  template <class V>
  void write(int i, const V& value, Here here) const {
    void* p = ::simt::shared_access(array, i, sizeof(T), sizeof(V), ::simt::Shared::store, here);
    __builtin_memcpy(p, &value, sizeof(V));
  }
};
// Its key: the address of a static variable, of which every instantiation of a template has its own.
#define DEEPOPS_SHARED(T, name, n)       \
  const ::deepops::gpu::Shared<T> name { \
    ::simt::shared_array(                \
        #name, sizeof(T), n,             \
        [] {                             \
          static char key;               \
          return &key;                   \
        }(),                             \
        DEEPOPS_HERE)                    \
  }

template <class T>
DEEPOPS_DEVICE Shared<T> dynamic_shared() {
  return {::simt::dynamic_array(sizeof(T))};
}

float to_float(core::Half value);  // below
core::Half to_half(float value);

using Stream = int;

inline bool on_gpu(const torch::stable::Tensor& tensor) { return tensor.is_cpu(); }

class Device {
 public:
  explicit Device(const torch::stable::Tensor&) {}
  explicit Device(int32_t) {}
  Stream stream() const { return 0; }
};
inline int major_capability() { return 8; }
inline int multiprocessors() { return int(::simt::residency(1).blocks); }  // 0 where none are pretended

template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), int64_t blocks, int threads, Stream, A... arguments) {
  STD_TORCH_CHECK(blocks > 0 && blocks <= 0x7fffffff, name, ": ", blocks, " blocks");
  ::simt::launch(name, blocks, threads, [&] { kernel(arguments...); });
}

using Residency = ::simt::Residency;
template <class... P>
Residency residency(void (*)(P...), int, int each) {
  return ::simt::residency(each);
}
template <class... P, class... A>
bool launch_on_chip(const char* name, void (*kernel)(P...), int64_t blocks, int threads, int64_t bytes, bool together,
                    Stream, A... arguments) {
  ::simt::launch(name, blocks, threads, [&] { kernel(arguments...); }, size_t(bytes), together);
  return true;
}

template <class... P, class... A>
void launch_with_shared(const char* name, void (*kernel)(P...), int64_t blocks, int threads, int64_t bytes,
                        Stream stream, A... arguments) {
  launch_on_chip(name, kernel, blocks, threads, bytes, false, stream, arguments...);
}

inline void zero(void* data, size_t bytes, Stream) { ::simt::zero(data, bytes); }

inline bool capturing(Stream) { return false; }
inline int32_t device_type() { return aoti_torch_device_type_cpu(); }
inline torch::stable::Tensor host_bytes(int64_t bytes) {
  return core::empty_vector(bytes, aoti_torch_dtype_uint8(), device_type(), 0);
}
inline void copy_in(const torch::stable::Tensor& device, const torch::stable::Tensor& host) {
  ::simt::copy_in(device.data_ptr(), host.data_ptr(), size_t(host.numel()));
}

inline void multiply(const torch::stable::Tensor& out, const torch::stable::Tensor& a, const torch::stable::Tensor& b) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}
inline void multiply_add(const torch::stable::Tensor& out, const torch::stable::Tensor& a,
                         const torch::stable::Tensor& b) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), 1, 1));
}

#define DEEPOPS_GPU_LIBRARY_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(deepops_simt, CPU, m)

#endif

// ---- what is the same -----------------------------------------------------------------------------------------------

// [bytes] of device memory, uninitialised, from torch's caching allocator: for what is queued on the current stream.
inline torch::stable::Tensor device_bytes(int64_t bytes, int32_t device_index) {
  return core::empty_vector(bytes, aoti_torch_dtype_uint8(), device_type(), device_index);
}

DEEPOPS_DEVICE int lane() { return thread() % kWarp; }
DEEPOPS_DEVICE int warp() { return thread() / kWarp; }

// Global memory. p of a pack: on a 16-byte boundary.
template <class T>
DEEPOPS_DEVICE T load(const T* p, Here here = DEEPOPS_HERE) {
  return detail::load<T>(p, here);
}
template <class T>
DEEPOPS_DEVICE void store(T* p, T value, Here here = DEEPOPS_HERE) {
  detail::store<T>(p, value, here);
}
template <class T>
DEEPOPS_DEVICE Pack<T> load_pack(const T* p, Here here = DEEPOPS_HERE) {
  return __builtin_bit_cast(Pack<T>, detail::load<Bits16>(p, here));
}
template <class T>
DEEPOPS_DEVICE void store_pack(T* p, const Pack<T>& pack, Here here = DEEPOPS_HERE) {
  detail::store<Bits16>(p, __builtin_bit_cast(Bits16, pack), here);
}
// The same for a condition that differs from lane to lane.
template <class T>
DEEPOPS_DEVICE void store_pack_if(bool condition, T* p, const Pack<T>& pack, Here here = DEEPOPS_HERE) {
  if (condition) detail::store_whole(p, __builtin_bit_cast(Bits16, pack), here);
}
// What another block of this launch has written (it has passed last_block(), below). T: a built-in type.
template <class T>
DEEPOPS_DEVICE T load_fresh(const T* p, Here here = DEEPOPS_HERE) {
  return detail::load_fresh<T>(p, here);
}

// Elements up to the first 16-byte boundary at or after p, at most n: the scalar head of a stream.
template <class T>
DEEPOPS_DEVICE int64_t head(const T* p, int64_t n) {
  const int64_t count = int64_t((kPackBytes - reinterpret_cast<uintptr_t>(p) % kPackBytes) % kPackBytes / sizeof(T));
  return count < n ? count : n;
}

// Between stored values and the type arithmetic is done in.
DEEPOPS_DEVICE float widen(float value) { return value; }
DEEPOPS_DEVICE double widen(double value) { return value; }
DEEPOPS_DEVICE float widen(core::Half value) { return to_float(value); }
DEEPOPS_DEVICE float widen(core::BFloat16 value) { return __builtin_bit_cast(float, uint32_t(value.bits) << 16); }

template <class T>
struct Narrow;
template <>
struct Narrow<float> {
  DEEPOPS_DEVICE static float of(float value) { return value; }
};
template <>
struct Narrow<double> {
  DEEPOPS_DEVICE static double of(double value) { return value; }
};
template <>
struct Narrow<core::Half> {
  DEEPOPS_DEVICE static core::Half of(float value) { return to_half(value); }
};
template <>
struct Narrow<core::BFloat16> {  // round to nearest even; every NaN becomes 0x7fc0, as in torch
  DEEPOPS_DEVICE static core::BFloat16 of(float value) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return {uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded)};
  }
};
template <class T>
DEEPOPS_DEVICE T narrow(core::OpMath<T> value) {
  return Narrow<T>::of(value);
}

// Sums over the `kWidth` (a power of 2, at most 32) lanes around this one; every one of them gets the sum. All 32 lanes
// must call.
template <int kWidth, class T>
DEEPOPS_DEVICE T warp_sum(T value, Here here = DEEPOPS_HERE) {
#pragma unroll
  for (int mask = kWidth / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask, here);
  return value;
}

// Sums `kCount` values each over a block of kThreads threads, in an order that depends on nothing else; the sums are
// valid in thread 0. All threads must call. It may be called again after a barrier.
template <int kThreads, int kCount, class T>
DEEPOPS_DEVICE void block_sum(T (&value)[kCount], Here here = DEEPOPS_HERE) {
  static_assert(kThreads % kWarp == 0 && kThreads <= kWarp * kWarp);
  constexpr int kWarps = kThreads / kWarp;
  DEEPOPS_SHARED(T, partial, kCount * kWarps);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    value[i] = warp_sum<kWarp>(value[i], here);
    if (lane() == 0) partial.store(i * kWarps + warp(), value[i], here);
  }
  gpu::barrier(here);
  if (warp() != 0) return;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    value[i] = warp_sum<kWarp>(lane() < kWarps ? partial.load(i * kWarps + lane(), here) : T(0), here);
  }
}

// True in all threads of the block that comes last of the `count` blocks that call this with the same counter, which is
// 0 before. What those blocks had stored is then visible to it by load_fresh(). All threads of a block must call.
DEEPOPS_DEVICE bool last_block(unsigned* counter, unsigned count, Here here = DEEPOPS_HERE) {
  DEEPOPS_SHARED(unsigned, arrived, 1);
  fence();
  gpu::barrier(here);
  if (thread() == 0) arrived.store(0, gpu::atomic_add(counter, 1u, here));
  gpu::barrier(here);
  const bool last = arrived.load(0) == count - 1;
  if (last) fence();
  return last;
}

// Between blocks that all run at the same time: one of them tells the others, once, that what it has stored is visible
// to load_fresh(). *signal is 0 before. All threads of a block must call.
DEEPOPS_DEVICE void give_signal(unsigned* signal, Here here = DEEPOPS_HERE) {
  fence();
  gpu::barrier(here);
  if (thread() == 0) gpu::atomic_add(signal, 1u, here);
}
DEEPOPS_DEVICE void wait_for_signal(const unsigned* signal, Here here = DEEPOPS_HERE) {
  if (thread() == 0) {
    gpu::await(signal, 1, here);
    fence();
  }
  gpu::barrier(here);
}

#ifdef DEEPOPS_SIMT
inline float to_float(core::Half value) { return ::simt::half_to_float(value.bits); }
inline core::Half to_half(float value) { return {::simt::float_to_half(value)}; }
#endif

}  // namespace deepops::gpu
