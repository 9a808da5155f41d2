// The passes of batch_norm_act in one launch each way, for data that stays on the chip: every block takes its share
// into shared memory while it adds it up, waits for the sums of its channels, and then works on what it has.
//
// The same sums in the same order as by two launches with these pieces. The block that comes last of those that share a
// tile adds the pieces and gives the others a signal; there is no other waiting, and none at all with one piece.
#pragma once
#include "batch_norm_act/batch_norm_act_kernels.cuh"

namespace deepops::isa_gpu {

template <class T, int V>
struct KeptType {
  using Type = gpu::Pack<T>;
};
template <class T>
struct KeptType<T, 1> {
  using Type = T;
};

// A block's chunks of `streams` tensors in shared memory; a thread sees its own alone. Slots are
// numbered in the order of View::for_piece(), which does not depend on U.
template <class T, int V>
struct Kept {
  using Type = typename KeptType<T, V>::Type;
  gpu::Shared<Type> memory;
  int streams;
  DEEPOPS_DEVICE int at(int slot, int stream) const { return (slot * streams + stream) * kThreads + gpu::thread(); }
  // What is not there at all has no slot.
  template <int U>
  DEEPOPS_DEVICE void store(int slot, int stream, const Chunk<V> (&chunks)[U], const Values<T, V> (&values)[U],
                            gpu::Here here = DEEPOPS_HERE) const {
#pragma unroll
    for (int u = 0; u < U; ++u)
      if (chunks[u].valid) memory.store(at(slot + u, stream), __builtin_bit_cast(Type, values[u]), here);
  }
  template <int U>
  DEEPOPS_DEVICE void load(int slot, int stream, const Chunk<V> (&chunks)[U], Values<T, V> (&values)[U],
                           gpu::Here here = DEEPOPS_HERE) const {
#pragma unroll
    for (int u = 0; u < U; ++u) {
      values[u] = {};
      if (chunks[u].valid) values[u] = __builtin_bit_cast(Values<T, V>, memory.load(at(slot + u, stream), here));
    }
  }
};

// What the blocks of a launch have to tell each other; zeros.
struct Signals {
  unsigned* ready;     // [tile]: its sums are there
  unsigned* finished;  // tiles
};

// The last block of a tile has finished it; the others go on when they see its results.
template <class View>
DEEPOPS_DEVICE void meet(const View& view, const Signals& signals, bool last) {
  if (view.pieces == 1) return gpu::barrier();
  last ? gpu::give_signal(signals.ready + view.tile()) : gpu::wait_for_signal(signals.ready + view.tile());
}

template <class T, class View>
DEEPOPS_KERNEL(kThreads, 2)
persistent_forward(Statistics<T> statistics, Forward<T> args, View view, int tiles, Signals signals) {
  using A = OpMath<T>;
  constexpr int V = View::V, kU = kUnroll<T>;
  DEEPOPS_SHARED(A, near, View::kSlots);
  const Kept<T, V> kept{gpu::dynamic_shared<typename KeptType<T, V>::Type>(), 1};
  int slot = 0;
  const auto mine = sum_in<A, kStatisticsUnroll<View>>(statistics.shape.exact, [&]<class S, int U>() {
    return sum_squares<S, U>(statistics, view, near, [&](const auto& chunks, const auto& x) {
      kept.store(slot, 0, chunks, x);
      slot += U;
    });
  });
  Sums sums = view.block_sums(mine);
  const bool last = sum_pieces(view, statistics.pieces, sums);
  if (last) finish_statistics(statistics, view, near, sums);
  meet(view, signals, last);
  // The batch is counted when all tiles have seen the number before it.
  if (last && args.num_batches_tracked && gpu::last_block(signals.finished, unsigned(tiles)) && gpu::thread() == 0)
    gpu::store(args.num_batches_tracked, gpu::load(args.num_batches_tracked) + 1);

  const auto numbers = view.template numbers<Affine<A>>([&](int channel) { return args.source.fresh(channel); });
  slot = 0;
  view.template for_piece<kU>([&](const Chunk<V>(&chunks)[kU]) {
    Values<T, V> x[kU];
    kept.load(slot, 0, chunks, x);
    slot += kU;
    forward_values(args, chunks, x, numbers);
  });
}

template <class T, class View>
DEEPOPS_KERNEL(kThreads, 2)
persistent_backward(Reduce<T> reduce, Backward<T> args, View view, Signals signals) {
  using A = OpMath<T>;
  constexpr int V = View::V, kU = kUnroll<T>;
  const Kept<T, V> kept{gpu::dynamic_shared<typename KeptType<T, V>::Type>(), args.gradient.kept ? 3 : 2};
  int slot = 0;
  const auto mine = sum_in<A, kU>(reduce.exact, [&]<class S, int U>() {
    return sum_gradients<S, U>(reduce, view, [&](const auto& chunks, const auto& values) {
      kept.store(slot, 0, chunks, values.from_grad_y);
      kept.store(slot, 1, chunks, values.from_x);
      if (args.gradient.kept) kept.store(slot, 2, chunks, values.from_kept);
      slot += U;
    });
  });
  Sums sums = view.block_sums(mine);
  const bool last = sum_pieces(view, reduce.pieces, sums);
  if (last) finish_reduce(reduce, view, sums);
  meet(view, signals, last);

  const auto numbers = view.template numbers<InputGrad<A>>([&](int channel) -> InputGrad<A> {
    return {args.source.at(channel), gpu::load_fresh(args.mean_grad + channel),
            gpu::load_fresh(args.slope_grad + channel)};
  });
  slot = 0;
  view.template for_piece<kU>([&](const Chunk<V>(&chunks)[kU]) {
    GradientValues<T, V, kU> values;
    kept.load(slot, 0, chunks, values.from_grad_y);
    kept.load(slot, 1, chunks, values.from_x);
    if (args.gradient.kept) kept.load(slot, 2, chunks, values.from_kept);
    slot += kU;
    backward_values(args, chunks, values, numbers);
  });
}

}  // namespace deepops::isa_gpu
