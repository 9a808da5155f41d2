// What both kernels of conv_bn_act do with a tile of finished sums: from shared memory to y.
//
// A tile is [rows][kColumns], with a pad after each row that keeps the same columns of neighbouring rows on different
// banks: sums as floats or, where statistics are taken, as they are stored in y. A thread takes one pack of 16 bytes of
// y at a time, always of the same columns.
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

// V neighbouring sums of a tile, by packs of 4. Of 8, every lane would have the same four of all eight places that make
// up the 32 banks: so half of the eight lanes that are served at once begin with the second pack. (Values are chosen,
// not indices: registers have none.)
template <int V>
DEEPOPS_DEVICE void load_sums(const gpu::Shared<float>& tile, int at, float (&to)[V]) {
  static_assert(V == 4 || V == 8);
  if constexpr (V == 4) {
    const gpu::Pack<float> pack = tile.load_pack(at);
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = pack.value[i];
  } else {
    const bool turned = gpu::lane() & 4;
    const gpu::Pack<float> first = tile.load_pack(turned ? at + 4 : at), second = tile.load_pack(turned ? at : at + 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float one = first.value[i], other = second.value[i];
      to[i] = turned ? other : one;
      to[i + 4] = turned ? one : other;
    }
  }
}
template <int V>
DEEPOPS_DEVICE void store_sums(const gpu::Shared<float>& tile, int at, const float (&from)[V]) {
  static_assert(V == 4 || V == 8);
  const bool turned = V == 8 && gpu::lane() & 4;
  gpu::Pack<float> first, second;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float one = from[i], other = from[i + V - 4];
    first.value[i] = turned ? other : one;
    second.value[i] = turned ? one : other;
  }
  tile.store_pack(turned ? at + 4 : at, first);
  if constexpr (V == 8) tile.store_pack(turned ? at : at + 4, second);
}

// ---- a tile ---------------------------------------------------------------------------------------------------------

// This thread's share of a tile: packs of the same columns in every kStep-th row.
template <class T, int kThreads, int kColumns, int kPitch>
struct TilePacks {
  static constexpr int V = gpu::Pack<T>::kSize, kPacks = kColumns / V, kStep = kThreads / kPacks;
  static_assert(kColumns % V == 0 && kThreads % kPacks == 0);
  // Eight lanes are served at once. Where that are two rows of four packs, one has to lie in the first half of the 32
  // banks and one in the second: neighbours, or where the pad is in the way those four rows apart (of 80 bytes each).
  static constexpr bool kFourApart = kPacks == 4 && kPitch * sizeof(T) % 128 != 64;
  static_assert(!kFourApart || 4 * kPitch * sizeof(T) % 128 == 64);

  DEEPOPS_DEVICE static int column() { return gpu::thread() % kPacks * V; }  // of the tile
  DEEPOPS_DEVICE static int row() {                                          // the first
    const int row = gpu::thread() / kPacks;
    return kFourApart ? row / 8 * 8 + row % 2 * 4 + row % 8 / 2 : row;
  }
  DEEPOPS_DEVICE static int at(int row) { return row * kPitch + column(); }
  template <class Rows>
  DEEPOPS_DEVICE static OutputPack<T> output(const Rows& rows, int row, int first_column, int columns) {
    const int column = first_column + TilePacks::column();
    return {int64_t(rows.pixel(row)) * columns + column, columns - column, columns % V == 0};
  }
};

// In both: a tile has kPitch elements from row to row, and first_column is a multiple of kColumns. All threads of the
// block must call, after each has stored its part of the tile; columns behind the last may hold anything. Where the
// tile lies may be written again after a barrier.

// y = act(sum * scale + shift + residual). affine: 2 * kColumns floats of shared memory from element `at` on.
template <class T, int kThreads, int kColumns, int kPitch = kColumns + kTilePad, class Rows>
DEEPOPS_DEVICE void evaluate_tile(const ConvArguments<T>& args, const gpu::Shared<float>& tile, const Rows& rows,
                                  int first_column, const gpu::Shared<float>& affine, int at) {
  using Packs = TilePacks<T, kThreads, kColumns, kPitch>;
  constexpr int V = Packs::V;
  // Packs of the residual that are on their way at the same time; few where sums that are still to come fill the
  // registers, and no more than there are.
  constexpr int kAll = Rows::kRows / Packs::kStep;
  constexpr int kTogether = kColumns > 64 ? 1 : kColumns > 32 || kAll < 4 ? 2 : 4;
  static_assert(Rows::kRows % (kTogether * Packs::kStep) == 0);
  const int columns = args.problem.out_channels;
#pragma unroll 1
  for (int i = gpu::thread(); i < kColumns; i += kThreads) {
    const bool there = first_column + i < columns;
    affine.store(at + i, there ? gpu::load(args.scale + first_column + i) : 0.0f);
    affine.store(at + kColumns + i, there ? gpu::load(args.shift + first_column + i) : 0.0f);
  }
  gpu::barrier();
  if (first_column + Packs::column() >= columns) return;
  float scale[V], shift[V];
  load_sums(affine, at + Packs::column(), scale);
  load_sums(affine, at + kColumns + Packs::column(), shift);
#pragma unroll 1
  for (int first = Packs::row(); first < Rows::kRows; first += kTogether * Packs::kStep) {
    gpu::Pack<T> residual[kTogether] = {};
    if (args.residual) {
#pragma unroll
      for (int u = 0; u < kTogether; ++u) {
        const int row = first + u * Packs::kStep;
        if (rows.has(row)) residual[u] = Packs::output(rows, row, first_column, columns).load(args.residual);
      }
    }
#pragma unroll
    for (int u = 0; u < kTogether; ++u) {
      const int row = first + u * Packs::kStep;
      if (!rows.has(row)) continue;
      float z[V];
      load_sums(tile, Packs::at(row), z);
#pragma unroll
      for (int i = 0; i < V; ++i) z[i] = z[i] * scale[i] + shift[i];
      if (args.residual) {
#pragma unroll
        for (int i = 0; i < V; ++i) z[i] += gpu::widen(residual[u].value[i]);
      }
      with_activation(args.activation, args.negative_slope, [&](const auto& act) {
#pragma unroll
        for (int i = 0; i < V; ++i) z[i] = act.forward(z[i]);
      });
      gpu::Pack<T> y;
#pragma unroll
      for (int i = 0; i < V; ++i) y.value[i] = gpu::narrow<T>(z[i]);
      Packs::output(rows, row, first_column, columns).store(args.y, y);
    }
  }
}

// y = sum, which the tile holds rounded to T, and its statistics, for which there is room behind the tile.
template <class T, int kThreads, int kColumns, int kPitch = kColumns + kTilePad, class Rows>
DEEPOPS_DEVICE void keep_tile(const ConvArguments<T>& args, const gpu::Shared<T>& tile, const Rows& rows,
                              int first_column) {
  using Packs = TilePacks<T, kThreads, kColumns, kPitch>;
  const int columns = args.problem.out_channels;
  gpu::barrier();
  if (first_column + Packs::column() < columns) {
#pragma unroll 4
    for (int row = Packs::row(); row < Rows::kRows; row += Packs::kStep) {
      if (!rows.has(row)) continue;
      Packs::output(rows, row, first_column, columns).store(args.y, tile.load_pack(Packs::at(row)));
    }
  }
  column_statistics<kThreads, kColumns, kPitch>(args.statistics, tile, rows, first_column, columns);
}

// Bytes from the beginning of the tile on that finish_tile() needs.
template <ConvResult kind, int kThreads, int kRows, int kColumns>
inline constexpr int kFinishBytes =
    kind == ConvResult::evaluation ? 4 * (kRows * (kColumns + kTilePad) + 2 * kColumns)
                                   : 2 * kRows * (kColumns + kTilePad) + kStatisticsBytes<kThreads>;

// Either, for kRows consecutive output pixels from first_row on, a multiple of kRows. tile: of floats or of 16-bit T,
// at the beginning of dynamic shared memory.
template <class T, ConvResult kind, int kThreads, int kRows, int kColumns, class S>
DEEPOPS_DEVICE void finish_tile(const ConvArguments<T>& args, const gpu::Shared<S>& tile, int first_row,
                                int first_column) {
  const ConsecutiveRows<kRows> rows{first_row, args.problem.rows()};
  if constexpr (kind == ConvResult::evaluation) {
    evaluate_tile<T, kThreads, kColumns>(args, tile, rows, first_column, tile, kRows * (kColumns + kTilePad));
  } else {
    keep_tile<T, kThreads, kColumns>(args, tile, rows, first_column);
  }
}

}  // namespace deepops::isa_gpu
