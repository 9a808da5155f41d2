// What both kernels of conv_bn_act do with a tile of finished sums: from shared memory to y.
//
// A tile is [rows][kColumns + kTilePad] floats. The pad keeps accesses of the same columns in neighbouring rows on
// different banks. A thread takes one pack of 16 bytes of y at a time, always of the same columns.
#pragma once
#include "conv_bn_act/column_statistics.cuh"
#include "core/gpu.cuh"
// after gpu.cuh, which says for what all else is compiled
#include "batch_norm_act/batch_norm_act_math.h"
#include "conv_bn_act/conv_bn_act.h"

namespace deepops::isa_gpu {

inline constexpr int kTilePad = 8;

template <class T>
struct ConvArguments {
  ConvProblem problem;
  const T* x;       // [N, H, W, C]
  const T* weight;  // [K, R, S, C]
  T* y;             // [N, P, Q, K]
  // evaluation
  const T* residual;           // like y, or null
  const float *scale, *shift;  // [K]
  Activation activation;
  double negative_slope;
  // statistics
  ColumnStatistics statistics;
};

// ---- which output pixels a tile is made of --------------------------------------------------------------------------

// kRows consecutive ones, but those after the last.
template <int kRows_>
struct ConsecutiveRows {
  static constexpr int kRows = kRows_;
  int first, pixels;  // of the tile; all there are

  DEEPOPS_DEVICE int tile() const { return first / kRows; }
  DEEPOPS_DEVICE bool has(int row) const { return first + row < pixels; }
  DEEPOPS_DEVICE int pixel(int row) const { return first + row; }
  DEEPOPS_DEVICE int count(int tile) const { return pixels - tile * kRows < kRows ? pixels - tile * kRows : kRows; }
  DEEPOPS_DEVICE int all() const { return pixels; }
};

// ---- a pack of y ----------------------------------------------------------------------------------------------------

// V values of y in `valid` columns. They are a pack on a 16-byte boundary if K is a multiple of V.
template <class T>
struct OutputPack {
  static constexpr int V = gpu::Pack<T>::kSize;
  int64_t at;
  int valid;
  bool whole;

  DEEPOPS_DEVICE gpu::Pack<T> load(const T* from) const {
    if (whole) return gpu::load_pack(from + at);
    gpu::Pack<T> pack{};
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (i < valid) pack.value[i] = gpu::load(from + at + i);
    return pack;
  }
  DEEPOPS_DEVICE void store(T* to, const gpu::Pack<T>& pack) const {
    if (whole) return gpu::store_pack(to + at, pack);
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (i < valid) gpu::store(to + at + i, pack.value[i]);
  }
};

// V neighbouring sums of a tile.
template <int V>
DEEPOPS_DEVICE void load_sums(const gpu::Shared<float>& tile, int at, float (&to)[V]) {
#pragma unroll
  for (int i = 0; i < V; ++i) to[i] = tile.load(at + i);
}
template <int V>
DEEPOPS_DEVICE void store_sums(const gpu::Shared<float>& tile, int at, const float (&from)[V]) {
#pragma unroll
  for (int i = 0; i < V; ++i) tile.store(at + i, from[i]);
}

// ---- a tile ---------------------------------------------------------------------------------------------------------

// each(pack, at) of this thread's share of a tile: a pack of y, and where its sums are.
template <class T, int kThreads, int kColumns, class Rows, class Each>
DEEPOPS_DEVICE void for_packs(const Rows& rows, int first_column, int columns, const Each& each) {
  constexpr int V = gpu::Pack<T>::kSize, kPacks = kColumns / V;
  static_assert(kThreads % kPacks == 0);
  const int in_tile = gpu::thread() % kPacks * V, column = first_column + in_tile;
  if (column >= columns) return;
#pragma unroll 1
  for (int row = gpu::thread() / kPacks; row < Rows::kRows; row += kThreads / kPacks) {
    if (!rows.has(row)) continue;
    const OutputPack<T> pack{int64_t(rows.pixel(row)) * columns + column, columns - column, columns % V == 0};
    each(pack, row * (kColumns + kTilePad) + in_tile);
  }
}

// y = act(sum * scale + shift + residual)
template <class T, int kThreads, int kColumns, class Rows>
DEEPOPS_DEVICE void evaluate_tile(const ConvArguments<T>& args, const gpu::Shared<float>& tile, const Rows& rows,
                                  int first_column) {
  constexpr int V = gpu::Pack<T>::kSize;
  const int columns = args.problem.out_channels, column = first_column + gpu::thread() % (kColumns / V) * V;
  float scale[V] = {}, shift[V] = {};
#pragma unroll
  for (int i = 0; i < V; ++i) {
    if (column + i >= columns) continue;
    scale[i] = gpu::load(args.scale + column + i);
    shift[i] = gpu::load(args.shift + column + i);
  }
  for_packs<T, kThreads, kColumns>(rows, first_column, columns, [&](const OutputPack<T>& pack, int at) {
    float z[V];
    load_sums(tile, at, z);
#pragma unroll
    for (int i = 0; i < V; ++i) z[i] = z[i] * scale[i] + shift[i];
    if (args.residual) {
      const gpu::Pack<T> residual = pack.load(args.residual);
#pragma unroll
      for (int i = 0; i < V; ++i) z[i] += gpu::widen(residual.value[i]);
    }
    with_activation(args.activation, args.negative_slope, [&](const auto& act) {
#pragma unroll
      for (int i = 0; i < V; ++i) z[i] = act.forward(z[i]);
    });
    gpu::Pack<T> y;
#pragma unroll
    for (int i = 0; i < V; ++i) y.value[i] = gpu::narrow<T>(z[i]);
    pack.store(args.y, y);
  });
}

// y = sum; what was stored takes the place of the sums.
template <class T, int kThreads, int kColumns, class Rows>
DEEPOPS_DEVICE void round_tile(const ConvArguments<T>& args, const gpu::Shared<float>& tile, const Rows& rows,
                               int first_column) {
  constexpr int V = gpu::Pack<T>::kSize;
  for_packs<T, kThreads, kColumns>(rows, first_column, args.problem.out_channels,
                                   [&](const OutputPack<T>& pack, int at) {
                                     float z[V];
                                     load_sums(tile, at, z);
                                     gpu::Pack<T> y;
#pragma unroll
                                     for (int i = 0; i < V; ++i) {
                                       y.value[i] = gpu::narrow<T>(z[i]);
                                       z[i] = gpu::widen(y.value[i]);
                                     }
                                     pack.store(args.y, y);
                                     if constexpr (sizeof(T) < sizeof(float)) store_sums(tile, at, z);
                                   });
}

// Brings the tile whose first column is `first_column`, a multiple of kColumns, to y. All threads of the block must
// call, after each has stored its sums; columns behind the last may hold anything. Where the tile lies may be written
// again after a barrier.
template <class T, ConvResult kind, int kThreads, int kColumns, class Rows>
DEEPOPS_DEVICE void finish_rows(const ConvArguments<T>& args, const gpu::Shared<float>& tile, const Rows& rows,
                                int first_column) {
  gpu::barrier();
  if constexpr (kind == ConvResult::evaluation) {
    evaluate_tile<T, kThreads, kColumns>(args, tile, rows, first_column);
  } else {
    round_tile<T, kThreads, kColumns>(args, tile, rows, first_column);
    gpu::barrier();
    column_statistics<kThreads, kColumns, kColumns + kTilePad>(args.statistics, tile, rows, first_column,
                                                               args.problem.out_channels);
  }
}

// The same for kRows consecutive output pixels from first_row on, a multiple of kRows.
template <class T, ConvResult kind, int kThreads, int kRows, int kColumns>
DEEPOPS_DEVICE void finish_tile(const ConvArguments<T>& args, const gpu::Shared<float>& tile, int first_row,
                                int first_column) {
  const ConsecutiveRows<kRows> rows{first_row, args.problem.rows()};
  finish_rows<T, kind, kThreads, kColumns>(args, tile, rows, first_column);
}

}  // namespace deepops::isa_gpu
