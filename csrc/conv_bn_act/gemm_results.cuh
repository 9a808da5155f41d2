// From the sums in the registers of a tile's threads to the output, by way of shared memory.
#pragma once
#include "conv_bn_act/epilogue.cuh"
#include "conv_bn_act/implicit_gemm.cuh"

namespace deepops::isa_gpu {

// Two neighbouring values, as multiply_add() leaves them in a lane: they move together.
template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T low, high;
};

// each(row, column, low, high) for all pairs of this thread; rows and columns of the tile.
template <class Tile, class Each>
DEEPOPS_DEVICE void for_pairs(const Sums<Tile>& sums, const Each& each) {
  const int row = warp_row<Tile>() + gpu::lane() / 4, column = warp_column<Tile>() + gpu::lane() % 4 * 2;
#pragma unroll
  for (int i = 0; i < Tile::kWarpRows / 16; ++i) {
#pragma unroll
    for (int j = 0; j < Tile::kWarpColumns / 8; ++j) {
      const auto& four = sums.value[i][j];
      each(row + i * 16, column + j * 8, four[0], four[1]);
      each(row + i * 16 + 8, column + j * 8, four[2], four[3]);
    }
  }
}

// y = act(sum * scale + shift + residual), a part of the rows after the other: as floats the tile is larger than what
// its pieces of depth have taken.
template <class T, class Tile>
DEEPOPS_DEVICE void evaluate_sums(const ConvArguments<T>& args, const Sums<Tile>& sums, int first_row,
                                  int first_column) {
  constexpr int kRows = 64, kPitch = Tile::kColumns + kTilePad;
  static_assert(Tile::kRows % kRows == 0 && kRows % Tile::kWarpRows == 0);
  static_assert(kFinishBytes<ConvResult::evaluation, Tile::kThreads, kRows, Tile::kColumns> <= Tile::kBytes);
  const auto tile = gpu::dynamic_shared<float>();
  const auto pairs = gpu::dynamic_shared<Pair<float>>();
#pragma unroll 1
  for (int part = 0; part < Tile::kRows; part += kRows) {
    if (part > 0) gpu::barrier();
    if (warp_row<Tile>() / kRows * kRows == part) {
      for_pairs(sums, [&](int row, int column, float low, float high) {
        pairs.store(((row - part) * kPitch + column) / 2, {low, high});
      });
    }
    finish_tile<T, ConvResult::evaluation, Tile::kThreads, kRows, Tile::kColumns>(args, tile, first_row + part,
                                                                                  first_column);
  }
}

// y = sum, rounded, and the statistics of what is stored.
template <class T, class Tile>
DEEPOPS_DEVICE void keep_sums(const ConvArguments<T>& args, const Sums<Tile>& sums, int first_row, int first_column) {
  constexpr int kPitch = Tile::kColumns + kTilePad;
  static_assert(kFinishBytes<ConvResult::statistics, Tile::kThreads, Tile::kRows, Tile::kColumns> <= Tile::kBytes);
  const auto tile = gpu::dynamic_shared<T>();
  const auto pairs = gpu::dynamic_shared<Pair<T>>();
  for_pairs(sums, [&](int row, int column, float low, float high) {
    pairs.store((row * kPitch + column) / 2, {gpu::narrow<T>(low), gpu::narrow<T>(high)});
  });
  finish_tile<T, ConvResult::statistics, Tile::kThreads, Tile::kRows, Tile::kColumns>(args, tile, first_row,
                                                                                      first_column);
}

template <class T, class Tile, ConvResult kind, bool kPointwise>
DEEPOPS_KERNEL(Tile::kThreads, Tile::kBlocks)
implicit_gemm(ConvArguments<T> args, GemmShape shape) {
  const int column_tiles = (shape.columns + Tile::kColumns - 1) / Tile::kColumns;
  const int first_row = gpu::block() / column_tiles * Tile::kRows;
  const int first_column = gpu::block() % column_tiles * Tile::kColumns;
  Sums<Tile> sums;
  multiply<T, Tile, kPointwise>(sums, shape, args.x, args.weight, first_row, first_column, gpu::dynamic_shared<T>());
  gpu::barrier();  // all warps have loaded their last fragments: the memory is free
  if constexpr (kind == ConvResult::evaluation) {
    evaluate_sums<T, Tile>(args, sums, first_row, first_column);
  } else {
    keep_sums<T, Tile>(args, sums, first_row, first_column);
  }
}

}  // namespace deepops::isa_gpu
