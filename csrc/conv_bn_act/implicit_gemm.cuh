// The convolution on tensor cores: the main loop over depth.
//
// While the tensor cores work on one piece of depth, later pieces are on their way to shared memory (cp.async), and the
// next fragments on their way from there to registers (ldmatrix). core/tensor_core.cuh says which lane of a warp holds
// what of fragments and sums.
#pragma once
#include "conv_bn_act/gemm_loads.cuh"

namespace deepops::isa_gpu {

// 16 numbers of depth, of all rows and columns of a warp.
template <class Tile>
struct Fragments {
  uint32_t a[Tile::kWarpRows / 16][4];
  uint32_t b[Tile::kWarpColumns / 8][2];
};

template <class Tile>
struct Sums {
  float value[Tile::kWarpRows / 16][Tile::kWarpColumns / 8][4];
};

template <class Tile>
DEEPOPS_DEVICE int warp_row() {  // first of the warp in the tile
  return gpu::warp() / Tile::kWarpsAcross * Tile::kWarpRows;
}
template <class Tile>
DEEPOPS_DEVICE int warp_column() {
  return gpu::warp() % Tile::kWarpsAcross * Tile::kWarpColumns;
}

// kStep: which 16 of the 32 numbers of depth; `stage`: element at which the piece begins.
template <int kStep, class T, class Tile>
DEEPOPS_DEVICE void load_fragments(Fragments<Tile>& to, const gpu::Shared<T>& memory, int stage) {
  const int lane = gpu::lane();
  // a: rows 0-7 and 8-15 of the first half of depth, then of the second
  const int a = stage + swizzled(warp_row<Tile>() + lane % 16, 2 * kStep + lane / 16);
#pragma unroll
  for (int i = 0; i < Tile::kWarpRows / 16; ++i) gpu::load_matrices(to.a[i], memory, a + i * 16 * Tile::kDepth);
  // b: both halves of depth for columns 0-7, then for 8-15
  const int b = stage + Tile::kRows * Tile::kDepth +
                swizzled(warp_column<Tile>() + lane / 16 * 8 + lane % 8, 2 * kStep + lane / 8 % 2);
#pragma unroll
  for (int j = 0; j < Tile::kWarpColumns / 16; ++j) {
    uint32_t four[4];
    gpu::load_matrices(four, memory, b + j * 16 * Tile::kDepth);
    to.b[2 * j][0] = four[0];
    to.b[2 * j][1] = four[1];
    to.b[2 * j + 1][0] = four[2];
    to.b[2 * j + 1][1] = four[3];
  }
}

template <class T, class Tile>
DEEPOPS_DEVICE void multiply_add(Sums<Tile>& sums, const Fragments<Tile>& fragments) {
#pragma unroll
  for (int i = 0; i < Tile::kWarpRows / 16; ++i) {
#pragma unroll
    for (int j = 0; j < Tile::kWarpColumns / 8; ++j) {
      gpu::multiply_add<T>(sums.value[i][j], fragments.a[i], fragments.b[j]);
    }
  }
}

// The sums of one tile. When it returns all copies have landed and been used, but other warps may still load fragments.
template <class T, class Tile, bool kPointwise>
DEEPOPS_DEVICE void multiply(Sums<Tile>& sums, const GemmShape& shape, const T* x, const T* filter, int first_row,
                             int first_column, const gpu::Shared<T>& memory) {
  constexpr int kStages = Tile::kStages;
  const int pieces = (shape.depth + Tile::kDepth - 1) / Tile::kDepth;
  InputPieces<T, Tile, kPointwise> input(shape, x, first_row);
  FilterPieces<T, Tile> weights(shape, filter, first_column);
  // A group of copies for each piece, empty past the end: so the newest groups can be counted.
  const auto copy = [&](int piece, int stage) {
    if (piece < pieces) {
      input.copy(shape, memory, stage);
      weights.copy(shape, memory, stage + Tile::kRows * Tile::kDepth);
    }
    gpu::copy_async_commit();
  };
#pragma unroll 1
  for (int piece = 0; piece < kStages - 1; ++piece) copy(piece, piece * Tile::kStageElements);
#pragma unroll
  for (auto& row : sums.value)
    for (auto& four : row)
      for (float& sum : four) sum = 0;

  constexpr int kLast = (kStages - 1) * Tile::kStageElements;
  Fragments<Tile> first, second;
  int read = 0;  // where the piece in use begins
  gpu::copy_async_wait<kStages - 2>();
  gpu::barrier();
  load_fragments<0>(first, memory, read);
#pragma unroll 1
  for (int piece = 0; piece < pieces; ++piece) {
    load_fragments<1>(second, memory, read);
    // Over the piece before this one: its last fragments were loaded before the last barrier.
    copy(piece + kStages - 1, read == 0 ? kLast : read - Tile::kStageElements);
    multiply_add<T>(sums, first);
    if (piece + 1 < pieces) {
      read = read == kLast ? 0 : read + Tile::kStageElements;
      gpu::copy_async_wait<kStages - 2>();
      gpu::barrier();
      load_fragments<0>(first, memory, read);
    }
    multiply_add<T>(sums, second);
  }
}

}  // namespace deepops::isa_gpu
