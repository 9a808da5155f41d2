// Launches of conv_bn_act: the choice of the kernel, the shapes of grids, workspaces.
//
// Grids depend on the shape alone, and so does every sum.
#pragma once
#include <algorithm>
#include <numeric>
#include <optional>

#include "conv_bn_act/direct.cuh"
#include "conv_bn_act/gemm_launches.h"
#include "conv_bn_act/workspace.h"
#include "core/gpu_arguments.h"

namespace deepops::isa_gpu {

// ---- direct.cuh -----------------------------------------------------------------------------------------------------

// Rows (or columns) of the patch for so many outputs and taps, and how far apart they are in x.
struct PatchSide {
  int unit, size;
  PatchSide(int outputs, int taps, int stride, int dilation)
      : unit(taps == 1 ? stride : std::gcd(stride, dilation)),
        size(int((int64_t(outputs - 1) * stride + int64_t(taps - 1) * dilation) / unit + 1)) {}
};

inline DirectTiles direct_tiles_of(const ConvProblem& p) {
  constexpr int kMostBlocks = 1024;  // more do not fill a device better: they share filters instead
  DirectTiles t{};
  t.tiles_y = int(up(p.out_height, DirectTiles::kHeight));
  t.tiles_x = int(up(p.out_width, DirectTiles::kWidth));
  t.tiles = p.batch * t.tiles_y * t.tiles_x;
  t.column_tiles = int(up(p.out_channels, DirectTiles::kColumns));
  t.tiles_per_block = int(std::clamp<int64_t>(int64_t(t.tiles) * t.column_tiles / kMostBlocks, 1, 8));
  t.taps_y = p.filter_height;
  t.taps_x = p.filter_width;
  const auto fits = [&] {
    const PatchSide y(DirectTiles::kHeight, t.taps_y, p.stride_y, p.dilation_y);
    const PatchSide x(DirectTiles::kWidth, t.taps_x, p.stride_x, p.dilation_x);
    t.unit_y = y.unit;
    t.unit_x = x.unit;
    t.patch_height = y.size;
    t.patch_width = x.size;
    t.depth = int(std::min<int64_t>(int64_t(t.taps_y) * t.taps_x * p.channels, INT32_MAX));
    return t.depth <= DirectTiles::kMostDepth && int64_t(y.size) * x.size * p.channels <= int64_t(DirectTiles::kPatch);
  };
  while (!fits()) (t.taps_y > 1 ? t.taps_y : t.taps_x) = int(up(t.taps_y > 1 ? t.taps_y : t.taps_x, 2));
  t.one_step = t.taps_y == p.filter_height && t.taps_x == p.filter_width;
  return t;
}

template <class T, ConvResult kind>
void launch_direct(ConvArguments<T> args, const Tensor& x, gpu::Stream stream) {
  const DirectTiles tiles = direct_tiles_of(args.problem);
  std::optional<Tensor> memory;
  if constexpr (kind == ConvResult::statistics)
    memory = give_memory(args.statistics, tiles.tiles, tiles.column_tiles, args.problem.out_channels, x, stream);
  const int64_t blocks = up(tiles.tiles, tiles.tiles_per_block) * tiles.column_tiles;
  gpu::launch_on_chip("conv_bn_act_direct", direct_convolution<T, kind>, blocks, DirectTiles::kThreads,
                      4 * int64_t(tiles.words()), false, stream, args, tiles);
}

// ---- the choice -----------------------------------------------------------------------------------------------------

template <class T, ConvResult kind>
void launch_convolution(const ConvArguments<T>& args, const Tensor& x, gpu::Stream stream) {
  if (args.problem.direct()) return launch_direct<T, kind>(args, x, stream);
  if constexpr (sizeof(T) == 2) return launch_implicit_gemm<T, kind>(args, x, stream);  // host.h refuses the rest
}

}  // namespace deepops::isa_gpu
