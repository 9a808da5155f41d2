// Batch statistics of the columns of a matrix that is computed tile by tile: part of the launch that computes it.
//
// A tile's mean and variance per column are taken of what is stored, by two passes over shared memory, and go to global
// memory. The block that comes last of a group of row tiles merges those of the group, the one that comes last of all
// groups of a column tile merges the groups: about the square root of the number of row tiles each. Every sum is taken
// in an order that the shape alone determines.
#pragma once
#include "batch_norm_act/running.cuh"
#include "core/gpu.cuh"
// after gpu.cuh, which says for what all else is compiled
#include "batch_norm_act/moments.h"

namespace deepops::isa_gpu {

struct ColumnStatistics {
  float *mean, *invstd;  // [columns]
  Running<float> running;
  int64_t* num_batches_tracked;  // or null: raised by the very last block
  bool cumulative;               // the average of all batches; else `factor`, the momentum
  double factor, eps;

  int row_tiles, column_tiles, log_group;  // 1 << log_group row tiles are a group
  double* partial;                         // [row_tiles][2][columns]: means, biased variances
  double* merged;                          // [groups][3][columns]: the same of groups, and counts
  unsigned* arrived;                       // [groups][column_tiles], [column_tiles], [1]: zeros

  DEEPOPS_HD int groups() const { return (row_tiles + (1 << log_group) - 1) >> log_group; }
};

// Bytes of dynamic shared memory behind the tile in which the threads of a block tell each other what they have found.
// Named arrays would come on top of what the kernel had for its sums, and take the place of a block.
template <int kThreads>
inline constexpr int kStatisticsBytes = 3 * kThreads * int(sizeof(double));

// The threads of a block, as kParts rows of kColumns: each has a column, and every kParts-th of what there is for it.
// kTileBytes: of the tile, behind which they tell each other.
template <int kThreads, int kColumns, int kTileBytes>
struct ColumnThreads {
  static_assert(kThreads % kColumns == 0 && kTileBytes % sizeof(double) == 0);
  static constexpr int kParts = kThreads / kColumns;

  DEEPOPS_DEVICE static int column() { return gpu::thread() % kColumns; }
  DEEPOPS_DEVICE static int part() { return gpu::thread() / kColumns; }

  // The values of all parts of this thread's column, in order: each(a, b, c).
  template <class Each>
  DEEPOPS_DEVICE void gather(double a, double b, double c, const Each& each) const {
    const auto memory = gpu::dynamic_shared<double>();
    constexpr int kFirst = kTileBytes / int(sizeof(double));
    gpu::barrier();  // what was here has been read
    memory.store(kFirst + gpu::thread(), a);
    memory.store(kFirst + kThreads + gpu::thread(), b);
    memory.store(kFirst + 2 * kThreads + gpu::thread(), c);
    gpu::barrier();
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      const int at = kFirst + p * kColumns + column();
      each(memory.load(at), memory.load(kThreads + at), memory.load(2 * kThreads + at));
    }
  }
};

// ---- of a tile ------------------------------------------------------------------------------------------------------

// Adds value - center and its square over the rows of this thread. A few terms at a time are added up in single
// precision, unless that is too coarse (`exact`: the tile is all there is, and small) or overflows.
template <class Threads, int kPitch, class T, class Rows>
DEEPOPS_DEVICE void add_differences(const gpu::Shared<T>& tile, const Rows& rows, float center, bool exact, double& sum,
                                    double& squares) {
  constexpr int kTerms = 8;
  const auto terms = [&]<class S>(int first, S& a, S& b) {
#pragma unroll
    for (int i = 0; i < kTerms; ++i) {
      const int row = first + i * Threads::kParts;
      if (row >= Rows::kRows || !rows.has(row)) continue;
      const S d = S(gpu::widen(tile.load(row * kPitch + Threads::column()))) - S(center);
      a += d;
      b += d * d;
    }
  };
#pragma unroll 1
  for (int first = Threads::part(); first < Rows::kRows; first += kTerms * Threads::kParts) {
    float a = 0, b = 0;
    terms(first, a, b);
    double whole_a = double(a), whole_b = double(b);
    if (exact || !(b - b == 0)) {
      whole_a = whole_b = 0;
      terms(first, whole_a, whole_b);
    }
    sum += whole_a;
    squares += whole_b;
  }
}

template <int kPitch, class Threads, class T, class Rows>
DEEPOPS_DEVICE Moments tile_moments(const Threads& threads, const gpu::Shared<T>& tile, const Rows& rows, bool exact) {
  const double per_count = 1 / double(rows.count(rows.tile()));
  float center = gpu::widen(tile.load(Threads::column()));  // row 0 is always there
  double offset = 0, square = 0;
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {
    // On the grid of the data, differences have few bits: their sums are hardly rounded.
    center = gpu::widen(gpu::narrow<T>(float(double(center) + offset)));
    if (!(center - center == 0)) center = 0;  // not finite: any value does, and NaN or infinity comes from the sums
    double sum = 0, squares = 0;
    add_differences<Threads, kPitch>(tile, rows, center, exact, sum, squares);
    offset = square = 0;
    threads.gather(sum, squares, 0, [&](double a, double b, double) {
      offset += a;
      square += b;
    });
    offset *= per_count;
    square *= per_count;
  }
  const double variance = square - offset * offset;
  return {double(center) + offset, variance < 0 ? 0 : variance};
}

// ---- of all tiles ---------------------------------------------------------------------------------------------------

// Merges parts [first, last): part_of(i) returns the JoinedMoments of one of them.
template <class Threads, class PartOf>
DEEPOPS_DEVICE JoinedMoments merge_parts(const Threads& threads, int first, int last, const PartOf& part_of) {
  JoinedMoments mine, all;
#pragma unroll 1
  for (int i = first + Threads::part(); i < last; i += Threads::kParts) {
    const JoinedMoments part = part_of(i);
    mine.add(part.count, part.mean, part.variance);
  }
  threads.gather(mine.count, mine.mean, mine.variance,
                 [&](double count, double mean, double variance) { all.add(count, mean, variance); });
  return all;
}

// By one thread of each column.
DEEPOPS_DEVICE void store_statistics(const ColumnStatistics& args, int column, const JoinedMoments& all) {
  gpu::store(args.mean + column, float(all.mean));
  gpu::store(args.invstd + column, float(1 / DEEPOPS_LIBM(sqrt)(all.variance + args.eps)));
  if (!args.running.mean && !args.running.var) return;
  const double factor = args.cumulative ? 1 / double(gpu::load(args.num_batches_tracked) + 1) : args.factor;
  args.running.learn(column, {all.mean, all.variance}, all.count / (all.count - 1), factor);
}

// tile: the values as they are stored, with kPitch of them from row to row; complete, with a barrier after. It lies at
// the beginning of dynamic shared memory, with kStatisticsBytes behind it that nobody needs any more. All threads of
// the block must call. columns: of the matrix.
template <int kThreads, int kColumns, int kPitch, class T, class Rows>
DEEPOPS_DEVICE void column_statistics(const ColumnStatistics& args, const gpu::Shared<T>& tile, const Rows& rows,
                                      int first_column, int columns) {
  constexpr int kTileBytes = Rows::kRows * kPitch * int(sizeof(T));
  using Threads = ColumnThreads<kThreads, kColumns, kTileBytes>;
  constexpr int64_t kExactBelow = 256;  // values per column: above, roundings of single terms average out
  const Threads threads;
  const int column = first_column + Threads::column(), column_tile = first_column / kColumns;
  const bool there = column < columns, stores = there && Threads::part() == 0;

  const Moments found = tile_moments<kPitch>(threads, tile, rows, rows.all() <= kExactBelow);
  if (stores) {
    double* const to = args.partial + int64_t(rows.tile()) * 2 * columns + column;
    gpu::store(to, found.mean);
    gpu::store(to + columns, found.variance);
  }
  const int groups = args.groups(), group = rows.tile() >> args.log_group;
  const int first = group << args.log_group;
  const int last = group + 1 == groups ? args.row_tiles : first + (1 << args.log_group);
  unsigned* const arrived_columns = args.arrived + groups * args.column_tiles;
  if (!gpu::last_block(args.arrived + group * args.column_tiles + column_tile, unsigned(last - first))) return;

  JoinedMoments all = merge_parts(threads, first, last, [&](int tile_index) -> JoinedMoments {
    if (!there) return {};
    const double* const from = args.partial + int64_t(tile_index) * 2 * columns + column;
    return {double(rows.count(tile_index)), gpu::load_fresh(from), gpu::load_fresh(from + columns)};
  });
  if (groups > 1) {
    if (stores) {
      double* const to = args.merged + int64_t(group) * 3 * columns + column;
      gpu::store(to, all.count);
      gpu::store(to + columns, all.mean);
      gpu::store(to + 2 * columns, all.variance);
    }
    if (!gpu::last_block(arrived_columns + column_tile, unsigned(groups))) return;
    all = merge_parts(threads, 0, groups, [&](int i) -> JoinedMoments {
      if (!there) return {};
      const double* const from = args.merged + int64_t(i) * 3 * columns + column;
      return {gpu::load_fresh(from), gpu::load_fresh(from + columns), gpu::load_fresh(from + 2 * columns)};
    });
  }
  if (stores) store_statistics(args, column, all);
  // All have read the counter before it is raised.
  if (args.num_batches_tracked && gpu::last_block(arrived_columns + args.column_tiles, unsigned(args.column_tiles)) &&
      gpu::thread() == 0)
    gpu::store(args.num_batches_tracked, gpu::load(args.num_batches_tracked) + 1);
}

}  // namespace deepops::isa_gpu
