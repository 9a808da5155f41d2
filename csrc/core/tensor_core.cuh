// Tensor cores, and copies that run beside the computation: what csrc/core/gpu.cuh is for everything else, for GPUs of
// compute capability 8.0 and newer. Older ones have neither; there a kernel that uses them stops with an error.
//
// PTX: the PTX ISA 9.0, sections 9.7.9.25 (cp.async) and 9.7.15 (ldmatrix, mma). For the executor: tests/simt.
#pragma once
#include "core/gpu.cuh"

#include <type_traits>

namespace deepops::gpu {

// ---- what differs: nvcc ---------------------------------------------------------------------------------------------

#ifndef DEEPOPS_SIMT

namespace detail {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kTensorCores = false;
#else
constexpr bool kTensorCores = true;
#endif
template <class T>
DEEPOPS_DEVICE unsigned shared_address(const Shared<T>& array, int i) {
  return unsigned(__cvta_generic_to_shared(array.data + i));
}
}  // namespace detail

// 16 bytes from global to shared memory, past the registers and the multiprocessor's own cache. They land at any time
// between this call and the wait; until then nobody may touch them. Not `ok`: zeros, and `from` is not read.
// from, and i, an element's index: on a 16-byte boundary.
template <class T>
DEEPOPS_DEVICE void copy_async(const Shared<T>& to, int i, const T* from, bool ok, Here = DEEPOPS_HERE) {
  if constexpr (detail::kTensorCores) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(detail::shared_address(to, i)),
                 "l"(__cvta_generic_to_global(from)), "r"(ok ? kPackBytes : 0)
                 : "memory");
  } else {
    __trap();
  }
}
// This thread's copies since the last call become a group.
DEEPOPS_DEVICE void copy_async_commit(Here = DEEPOPS_HERE) {
  if constexpr (detail::kTensorCores) asm volatile("cp.async.commit_group;" ::: "memory");
}
// All of this thread's groups but the newest kNewest have landed. Other threads see them after a barrier.
template <int kNewest>
DEEPOPS_DEVICE void copy_async_wait(Here = DEEPOPS_HERE) {
  if constexpr (detail::kTensorCores) asm volatile("cp.async.wait_group %0;" ::"n"(kNewest) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements. Lane l points at row l % 8 of matrix l / 8 by the index of its first element,
// on a 16-byte boundary, and gets of matrix m, in to[m], two elements of row l / 4, from column l % 4 * 2 on, the first
// in the lower half. All 32 lanes must call.
template <class T>
DEEPOPS_DEVICE void load_matrices(uint32_t (&to)[4], const Shared<T>& from, int i, Here = DEEPOPS_HERE) {
  static_assert(sizeof(T) == 2);
  if constexpr (detail::kTensorCores) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(detail::shared_address(from, i))
                 : "memory");
  } else {
    __trap();
  }
}

// d += a b: a 16 x 16, b 16 x 8, d 16 x 8, spread over the warp. With g = lane() / 4 and t = lane() % 4 * 2, a lane has
// pairs of neighbours, the first in the lower half:
//   a: of rows (g, t), (g + 8, t), (g, t + 8), (g + 8, t + 8);  b: of columns (t, g), (t + 8, g);
//   d: (g, t), (g, t + 1), (g + 8, t), (g + 8, t + 1), where (row, column) is an element's place.
// So load_matrices() gives a of row-major memory: matrices 0, 1: rows 0, 8; 2, 3: the same, columns 8 to 15. And b of
// column-major memory, two at once. T: core::Half or core::BFloat16. All 32 lanes must call.
template <class T>
DEEPOPS_DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Here = DEEPOPS_HERE) {
  static_assert(std::is_same_v<T, core::Half> || std::is_same_v<T, core::BFloat16>);
  if constexpr (!detail::kTensorCores) {
    __trap();
  } else if constexpr (std::is_same_v<T, core::Half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// ---- what differs: the executor -------------------------------------------------------------------------------------

#else

template <class T>
DEEPOPS_DEVICE void copy_async(const Shared<T>& to, int i, const T* from, bool ok, Here here = DEEPOPS_HERE) {
  Bits16 value{};
  if (ok) {
    value = detail::load_fresh<Bits16>(from, here);
  } else {
    ::simt::no_load(kPackBytes, here);
  }
  ::simt::copy_async(to.array, i, sizeof(T), &value, here);
}
DEEPOPS_DEVICE void copy_async_commit(Here here = DEEPOPS_HERE) { ::simt::copy_async_commit(here); }
template <int kNewest>
DEEPOPS_DEVICE void copy_async_wait(Here here = DEEPOPS_HERE) {
  ::simt::copy_async_wait(kNewest, here);
}

template <class T>
DEEPOPS_DEVICE void load_matrices(uint32_t (&to)[4], const Shared<T>& from, int i, Here here = DEEPOPS_HERE) {
  static_assert(sizeof(T) == 2);
  const Pack<T> row = from.load_pack(i, here);
  ::simt::matrix_op(::simt::WarpOp::load_matrices, to, &row, nullptr, here);
}

template <class T>
DEEPOPS_DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                 Here here = DEEPOPS_HERE) {
  static_assert(std::is_same_v<T, core::Half> || std::is_same_v<T, core::BFloat16>);
  constexpr bool kHalf = std::is_same_v<T, core::Half>;
  ::simt::matrix_op(kHalf ? ::simt::WarpOp::multiply_add_f16 : ::simt::WarpOp::multiply_add_bf16, d, a, b, here);
}

#endif

}  // namespace deepops::gpu
