// Launches of the convolution on tensor cores.
#pragma once
#include <optional>

#include "conv_bn_act/gemm_results.cuh"
#include "conv_bn_act/workspace.h"
#include "core/gpu_arguments.h"

namespace deepops::isa_gpu {

// A 1 x 1 filter that is nowhere outside the image.
inline bool is_pointwise(const ConvProblem& p) {
  return p.filter_height == 1 && p.filter_width == 1 && p.top == 0 && p.left == 0 &&
         int64_t(p.out_height - 1) * p.stride_y < p.height && int64_t(p.out_width - 1) * p.stride_x < p.width;
}

template <class T, ConvResult kind>
void launch_implicit_gemm(ConvArguments<T> args, const Tensor& x, gpu::Stream stream) {
  const GemmShape shape = gemm_shape_of(args.problem);
  with_tile(best_tile(shape.rows, shape.columns, gpu::multiprocessors()), [&]<class Tile>(const char* name) {
    const int64_t row_tiles = up(shape.rows, Tile::kRows), column_tiles = up(shape.columns, Tile::kColumns);
    std::optional<Tensor> memory;
    if constexpr (kind == ConvResult::statistics)
      memory = give_memory(args.statistics, int(row_tiles), int(column_tiles), shape.columns, x, stream);
    const auto kernel =
        is_pointwise(args.problem) ? implicit_gemm<T, Tile, kind, true> : implicit_gemm<T, Tile, kind, false>;
    gpu::launch_with_shared(name, kernel, row_tiles * column_tiles, Tile::kThreads, Tile::kBytes, stream, args, shape);
  });
}

}  // namespace deepops::isa_gpu
