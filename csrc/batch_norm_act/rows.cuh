// The way of the GPU kernels through data whose channels are neighbours: a matrix [R, C].
//
// A block works on a tile of columns and a range of rows, a thread on the V columns of one chunk in every so many of
// these rows, so that it reads the numbers of its channels once.
#pragma once
#include "batch_norm_act/chunks.cuh"

namespace deepops::isa_gpu {

template <class T, int V_>  // V: elements of a pack, or 1 where rows or streams do not lie on 16-byte boundaries
struct Rows {
  static constexpr int V = V_;
  static constexpr int kLogLanes = V > 1 ? 3 : 5;  // threads side by side, at most: 128 bytes of packs
  static constexpr int kColumns = V << kLogLanes;  // at most
  // Where the number of a column of the tile lies in shared memory: such that neither neighbouring columns, which are
  // stored together, nor the same element of neighbouring chunks, which are loaded together, share a bank.
  static constexpr int kSlots = kColumns;
  DEEPOPS_DEVICE static int slot(int column) {
    const int i = column % V;
    return (i << kLogLanes) + (column / V ^ i / 4 * 4);
  }
  using ThreadSums = ManyChannelSums<V>;

  int64_t rows;   // R
  int channels;   // C
  int log_lanes;  // threads side by side in a tile
  int tiles;      // of columns
  int64_t rows_per_block;
  int pieces;  // blocks that share a tile

  DEEPOPS_DEVICE int tile() const { return gpu::block() % tiles; }
  DEEPOPS_DEVICE int piece() const { return gpu::block() / tiles; }
  DEEPOPS_DEVICE int lane() const { return gpu::thread() & ((1 << log_lanes) - 1); }
  DEEPOPS_DEVICE int columns() const { return V << log_lanes; }
  DEEPOPS_DEVICE int first_channel() const { return tile() * columns(); }
  // Of the sum that thread `column` gets from block_sums(); there may be no such channel.
  DEEPOPS_DEVICE int channel(int column) const {
    return first_channel() + (column & ((1 << log_lanes) - 1)) * V + (column >> log_lanes);
  }
  // each(index) for all elements of a channel, a block together.
  template <class Each>
  DEEPOPS_DEVICE void for_channel(int channel, const Each& each) const {
#pragma unroll 1
    for (int64_t row = gpu::thread(); row < rows; row += kThreads) each(row * channels + channel);
  }

  // make(channel) of every element of a chunk, as a function of its number. All threads must call.
  template <class Number, class Make>
  DEEPOPS_DEVICE auto numbers(const Make& make) const {
    using A = typename MemberOf<Number>::Type;
    DEEPOPS_SHARED(A, memory, sizeof(Number) / sizeof(A) * kSlots);
    const Staged<A, Number, kSlots> staged{memory};
    const int mine = first_channel() + gpu::thread();
    if (gpu::thread() < columns() && mine < channels) staged.store(slot(gpu::thread()), make(mine));
    gpu::barrier();
    Array<Number, V> found{};
    if (first_channel() + lane() * V < channels) {
#pragma unroll
      for (int i = 0; i < V; ++i) found.value[i] = staged.load(slot(lane() * V + i));
    }
    return [found](int i) { return found.value[i]; };
  }

  template <int U, class Each>
  DEEPOPS_DEVICE void for_piece(const Each& each) const {
    const int column = first_channel() + lane() * V;
    if (column >= channels) return;
    const int64_t first = piece() * rows_per_block;
    const int64_t last = first + rows_per_block < rows ? first + rows_per_block : rows;
    const int step = kThreads >> log_lanes;
#pragma unroll 1  // the compiler's unrolling would cost a division for the number of turns
    for (int64_t row = first + (gpu::thread() >> log_lanes); row < last; row += U * step) {
      Chunk<V> chunks[U];
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const int64_t at = row + u * step;
        chunks[u] = {at * channels + column, 1, at < last ? Chunk<V>::kAll : 0u};
      }
      each(chunks);
    }
  }

  // The block's sums of channel(t), in thread t < columns(): over the threads of a warp, then over warps, in order.
  DEEPOPS_DEVICE Sums block_sums(const ThreadSums& sums) const {
    DEEPOPS_SHARED(double, memory, 2 * kWarps * kColumns);
    ThreadSums warp_sums = sums;
    for (int mask = gpu::kWarp / 2; mask >= 1 << log_lanes; mask /= 2) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        warp_sums.a[i] += gpu::shuffle_xor(warp_sums.a[i], mask);
        warp_sums.b[i] += gpu::shuffle_xor(warp_sums.b[i], mask);
      }
    }
    if (gpu::lane() < 1 << log_lanes) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const int at = gpu::warp() * kColumns + (i << log_lanes) + lane();
        memory.store(at, warp_sums.a[i]);
        memory.store(kWarps * kColumns + at, warp_sums.b[i]);
      }
    }
    gpu::barrier();
    Sums total{0, 0};
    if (gpu::thread() < columns()) {
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        total.a += memory.load(w * kColumns + gpu::thread());
        total.b += memory.load((kWarps + w) * kColumns + gpu::thread());
      }
    }
    return total;
  }

  template <int U, class Number, class Make, class Each>
  DEEPOPS_DEVICE void for_part(const Make& make, const Each& each) const {
    const auto of_channels = numbers<Number>(make);
    for_piece<U>([&](const Chunk<V>(&chunks)[U]) { each(chunks, of_channels); });
  }
};

}  // namespace deepops::isa_gpu
