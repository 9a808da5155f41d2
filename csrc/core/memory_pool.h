// Memory for large results on the CPU, kept for the next one when a result is freed.
//
// Fresh memory is expensive: the C library maps it anew (every request over 32 MB, many below, since what it freed at
// the end of its heap goes back to the system), and the system then clears it page by page when it is first written.
// Writing 51 MB took 31 ms in fresh memory, 6 ms where the pages were of 2 MB, 2 ms in memory used before; normalising
// as much takes 4 ms. A training step asks for the same sizes over and over.
//
// What is kept is never more than was in use at one time, and the system may take back blocks of 4 MB and more whenever
// it is short of memory (MADV_FREE).
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "core/allocate.h"

namespace deepops::core {

// Smaller results are torch's to allocate.
inline constexpr int64_t kPooledBytes = int64_t(1) << 20;

// Uninitialised, dense with the given strides, of the dtype of `like`, which is on the CPU. Its storage cannot be
// resized.
torch::stable::Tensor pooled_empty(Sizes sizes, Sizes strides, const torch::stable::Tensor& like);
// A contiguous matrix.
torch::stable::Tensor pooled_matrix(int64_t rows, int64_t columns, const torch::stable::Tensor& like);
// With the sizes and strides of `like`, which is dense.
torch::stable::Tensor pooled_empty_like(const torch::stable::Tensor& like);
// Like `like`, or of nothing.
torch::stable::Tensor pooled_empty_like_if(bool wanted, const torch::stable::Tensor& like);

}  // namespace deepops::core
