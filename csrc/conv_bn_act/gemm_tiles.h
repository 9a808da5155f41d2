// The tiles of the convolution on tensor cores, and which one a call gets. For host and device.
//
// The convolution is a product: a row for each output pixel, a column for each output channel, and a depth of
// filter_height * filter_width * channels, in the order in which the filters lie in memory. A block computes a tile of
// rows x columns, 32 numbers of depth at a time; each of its warps a part of the tile.
#pragma once
#include <cstdint>

namespace deepops::isa_gpu {

template <int rows, int columns, int warp_rows, int warp_columns, int stages, int blocks>
struct Tile {
  static constexpr int kRows = rows, kColumns = columns;
  static constexpr int kWarpRows = warp_rows, kWarpColumns = warp_columns;
  static constexpr int kStages = stages;  // pieces of depth in shared memory: one is used, the others are on their way
  static constexpr int kBlocks = blocks;  // that a multiprocessor has room for
  static constexpr int kDepth = 32;       // of a piece: 64 bytes of a row are two whole sectors
  static constexpr int kWarpsAcross = columns / warp_columns;
  static constexpr int kThreads = 32 * (rows / warp_rows) * kWarpsAcross;
  static constexpr int kStageElements = (rows + columns) * kDepth;
  static constexpr int64_t kBytes = 2ll * stages * kStageElements;  // of shared memory
  static_assert(rows % warp_rows == 0 && columns % warp_columns == 0 && warp_rows % 16 == 0 && warp_columns % 16 == 0);
};

// A warp of 64 x 64 reads least from shared memory. Its sums alone take 128 registers of a thread, so that there is
// room for two blocks of four such warps.
using Tile128x128 = Tile<128, 128, 64, 64, 3, 2>;
using Tile256x64 = Tile<256, 64, 64, 64, 3, 2>;  // for 64 output channels
using Tile128x64 = Tile<128, 64, 64, 32, 4, 3>;
using Tile64x64 = Tile<64, 64, 32, 32, 4, 4>;    // for few output pixels
using Tile128x32 = Tile<128, 32, 32, 32, 3, 4>;  // for up to 32 output channels, of which wider tiles waste half

// ---- the choice -----------------------------------------------------------------------------------------------------

struct TileSize {
  int rows, columns;
};
inline constexpr TileSize kTileSizes[] = {{128, 128}, {256, 64}, {128, 64}, {64, 64}, {128, 32}};

// What a tile costs for each number of depth: its multiplications, whether or not their rows and columns exist, and
// moving rows + columns numbers from global memory, each of which takes a multiprocessor about as long as 64
// multiplications. (Data sheets: an A100 moves about 45 bytes from the L2 cache for a multiprocessor in a cycle, in
// which that multiplies 1024 pairs: 45 for each number of 2 bytes; an H100 about twice as many.)
constexpr int64_t tile_cost(TileSize tile) {
  constexpr int64_t kMove = 64;
  return int64_t(tile.rows) * tile.columns + kMove * (tile.rows + tile.columns);
}

// The tile with which the multiprocessor that has most to do is done first; of equals the one that is first in the
// list. Not measured on any device. multiprocessors: 0 if unknown; then the least work in all.
constexpr int best_tile(int64_t rows, int64_t columns, int64_t multiprocessors) {
  int best = 0;
  int64_t least = INT64_MAX;
  for (int i = 0; i < int(sizeof(kTileSizes) / sizeof(TileSize)); ++i) {
    const TileSize tile = kTileSizes[i];
    const int64_t tiles = ((rows + tile.rows - 1) / tile.rows) * ((columns + tile.columns - 1) / tile.columns);
    const int64_t rounds = multiprocessors > 0 ? (tiles + multiprocessors - 1) / multiprocessors : tiles;
    const int64_t cost = rounds * tile_cost(tile);
    if (cost < least) {
      least = cost;
      best = i;
    }
  }
  return best;
}

// call.operator()<Tile>(name) for kTileSizes[i].
template <class Call>
void with_tile(int i, const Call& call) {
  switch (i) {
    case 0:
      return call.template operator()<Tile128x128>("conv_bn_act_128x128");
    case 1:
      return call.template operator()<Tile256x64>("conv_bn_act_256x64");
    case 2:
      return call.template operator()<Tile128x64>("conv_bn_act_128x64");
    case 3:
      return call.template operator()<Tile64x64>("conv_bn_act_64x64");
    default:
      return call.template operator()<Tile128x32>("conv_bn_act_128x32");
  }
}

}  // namespace deepops::isa_gpu
