// What the launches of lstm's GPU kernels have in common: matrices, memory, whether packs can be used, sizes of grids.
#pragma once
#include "core/gpu.cuh"
// after gpu.cuh
#include <initializer_list>
#include <optional>

#include "core/allocate.h"
#include "core/gpu_arguments.h"
#include "lstm/backward_norm.cuh"
#include "lstm/forward_norm.cuh"
#include "lstm/host.h"
#include "lstm/state.cuh"

namespace deepops::isa_gpu::lstm {

// ---- tensors --------------------------------------------------------------------------------------------------------

inline Tensor matrix(int64_t rows, int64_t columns, const Tensor& like) {
  const int64_t sizes[] = {rows, columns}, strides[] = {columns, 1};
  return core::empty({sizes, 2}, {strides, 2}, like);
}
inline Tensor matrix_if(bool wanted, int64_t rows, int64_t columns, const Tensor& like) {
  return wanted ? matrix(rows, columns, like) : core::empty_vector(0, like.scalar_type(), like);
}

// A view, without the detour over dispatcher and autograd: [rows, columns] from element `offset` on.
inline Tensor view(const Tensor& of, int64_t offset, int64_t rows, int64_t columns, int64_t row_stride,
                   int64_t column_stride) {
  const int64_t sizes[] = {rows, columns}, strides[] = {row_stride, column_stride};
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(of.get(), 2, sizes, strides, offset, &made));
  return Tensor(made);
}
inline Tensor view(const Tensor& of, int64_t offset, int64_t rows, int64_t columns) {
  return view(of, offset, rows, columns, columns, 1);
}
inline Tensor transposed(const Tensor& matrix) {
  return view(matrix, 0, matrix.size(1), matrix.size(0), 1, matrix.size(1));
}

// Results [T, B, size], uninitialised; of nothing where they are not wanted.
inline Tensor sequence(bool wanted, const LstmShape& p, int64_t size, const Tensor& like) {
  if (!wanted) return core::empty_vector(0, like.scalar_type(), like);
  const int64_t sizes[] = {p.steps, p.batch, size}, strides[] = {p.batch * size, size, 1};
  return core::empty({sizes, 3}, {strides, 3}, like);
}
// In the type of sums.
inline Tensor sums_sequence(bool wanted, const LstmShape& p, int64_t size, const Tensor& like) {
  return sequence(wanted, p, size, core::empty_vector(0, core::opmath_scalar_type(p.dtype), like));
}

// p + offset, null for null.
template <class T>
T* at(T* p, int64_t offset) {
  return p ? p + offset : nullptr;
}

// ---- steps ----------------------------------------------------------------------------------------------------------

// 16-byte accesses: rows of `size` elements of `width` bytes and what all of these point to lie on such boundaries.
inline bool on_packs(int64_t size, int64_t width, std::initializer_list<const void*> streams) {
  bool packs = size * width % gpu::kPackBytes == 0;
  for (const void* stream : streams) packs = packs && reinterpret_cast<uintptr_t>(stream) % gpu::kPackBytes == 0;
  return packs;
}

inline StepPlace place_of(const LstmShape& p, int64_t t, const int64_t* lengths) {
  return {int(p.batch), int(p.hidden), int(p.state), p.steps, t, p.reverse, lengths};
}
inline Draws draws_of(const LstmShape& p, int64_t t, const int64_t* seed) {
  return {p.random ? seed : nullptr,           uint32_t(p.first_step + t),
          lstm_threshold(p.zoneout_h),         lstm_threshold(p.zoneout_c),
          lstm_threshold(p.recurrent_dropout), p.recurrent_dropout < 1 ? 1 / (1 - p.recurrent_dropout) : 0};
}

// Kernels count the units of a step in 32 bits.
inline void check_size(int64_t batch, int64_t size, const char* op) {
  STD_TORCH_CHECK(batch * size < int64_t(1) << 31, op, ": ", batch, " sequences of ", size,
                  " units are more than a GPU kernel takes at once");
}

template <class T>
void launch_forward(const ForwardStep<T>& step, bool packs, bool normalizes, gpu::Stream stream) {
  constexpr int V = gpu::Pack<T>::kSize;
  const StepPlace& place = step.place;
  if (normalizes) {
    gpu::launch("lstm_forward_norm", packs ? lstm_forward_norm<T, V> : lstm_forward_norm<T, 1>, place.batch,
                kRowThreads, stream, step);
  } else {
    const int64_t chunks = int64_t(place.batch) * place.hidden / (packs ? V : 1);
    gpu::launch("lstm_forward", packs ? lstm_forward<T, V> : lstm_forward<T, 1>, up(chunks, kFlatThreads), kFlatThreads,
                stream, step);
  }
}

template <class T>
void launch_backward(const BackwardStep<T>& step, bool packs, bool normalizes, gpu::Stream stream) {
  constexpr int V = gpu::Pack<T>::kSize;
  const StepPlace& place = step.place;
  if (normalizes) {
    gpu::launch("lstm_backward_norm", packs ? lstm_backward_norm<T, V> : lstm_backward_norm<T, 1>, place.batch,
                kRowThreads, stream, step);
  } else {
    const int64_t chunks = int64_t(place.batch) * place.hidden / (packs ? V : 1);
    gpu::launch("lstm_backward", packs ? lstm_backward<T, V> : lstm_backward<T, 1>, up(chunks, kFlatThreads),
                kFlatThreads, stream, step);
  }
}

template <class T>
void launch_state(const StateStep<T>& step, gpu::Stream stream) {
  const StepPlace& place = step.place;
  const int64_t chunks = int64_t(place.batch) * place.state / (step.packs ? gpu::Pack<T>::kSize : 1);
  gpu::launch("lstm_state", lstm_state<T>, up(chunks, kFlatThreads), kFlatThreads, stream, step);
}

// Gradients of `count` small weights [H] from what the steps have summed, [count, B, H]. packs: as in the steps.
template <class T>
void launch_column_sums(const OpMath<T>* sums, int64_t count, const LstmShape& p, bool packs, OpMath<T>* to,
                        gpu::Stream stream) {
  using Packed = Sums<OpMath<T>, gpu::Pack<T>::kSize>;
  gpu::launch("lstm_column_sums", lstm_column_sums<OpMath<T>>, count * up(p.hidden, gpu::kWarp), kRowThreads, stream,
              sums, int(p.batch), int(p.hidden), packs ? Packed::kPack : 1, packs ? Packed::kParts : 1, to);
}

}  // namespace deepops::isa_gpu::lstm
