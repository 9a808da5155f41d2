// Memory of conv_bn_act beside its tensors.
#pragma once
#include <algorithm>
#include <cstdint>

#include "conv_bn_act/column_statistics.cuh"
#include "core/allocate.h"
#include "core/gpu_arguments.h"

namespace deepops::isa_gpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Workspace of the statistics of so many tiles, in memory that lives as long as the result. Tiles: of kRows output
// pixels (or fewer) and kColumns channels.
inline Tensor give_memory(ColumnStatistics& args, int row_tiles, int column_tiles, int columns, const Tensor& like,
                          gpu::Stream stream) {
  constexpr int kFewTiles = 64;  // are merged by one block
  args.row_tiles = row_tiles;
  args.column_tiles = column_tiles;
  args.log_group = 0;
  while ((int64_t(1) << args.log_group) < std::min(row_tiles, kFewTiles) ||
         (int64_t(1) << 2 * args.log_group) < row_tiles)
    ++args.log_group;
  const int64_t groups = args.groups(), counters = (groups + 1) * column_tiles + 1;
  const int64_t values = int64_t(columns) * (2 * int64_t(row_tiles) + 3 * groups);
  const Tensor memory = core::empty_vector(values + up(counters, 2), ScalarType::Double, like);
  args.partial = static_cast<double*>(memory.mutable_data_ptr());
  args.merged = args.partial + int64_t(columns) * 2 * row_tiles;
  args.arrived = reinterpret_cast<unsigned*>(args.partial + values);
  gpu::zero(args.arrived, size_t(counters) * sizeof(unsigned), stream);
  return memory;
}

}  // namespace deepops::isa_gpu
