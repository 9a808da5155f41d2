// GPU kernels of batch_norm_act, over either view of the data (planar.cuh, rows.cuh). As on the CPU:
//
//   statistics   mean and invstd from the sums of x - shift and of its square; running statistics
//   forward      y = act(z + residual), z = (x - mean) * scale + bias
//   reduce       gradients of weight and bias and two means, from the sums of g and of g * (x - mean)
//   backward     grad_x = scale * (g - mean_grad - (x - mean) * slope_grad), grad_residual = g
//
// Sums: a few terms in the type of arithmetic, then double; threads, blocks and pieces are added up in an order that
// the shape alone determines. The block that comes last adds the pieces.
#pragma once
#include "batch_norm_act/planar.cuh"
#include "batch_norm_act/rows.cuh"
#include "batch_norm_act/running.cuh"

namespace deepops::isa_gpu {

// Chunks whose loads are under way together. Fewer where there are several streams of 16-bit data, whose chunks fill
// more registers.
template <class View>
inline constexpr int kStatisticsUnroll = View::V == 1 ? 8 : 4;
template <class T>
inline constexpr int kUnroll = sizeof(T) == 4 ? 2 : 1;

// The sums of a block's threads: sum.template operator()<S, U>() adds up in S before it goes to double, U chunks at a
// time. exact: in double from the start, for few values per channel; speed does not matter then.
template <class A, int U, class Sum>
DEEPOPS_DEVICE auto sum_in(bool exact, const Sum& sum) {
  if constexpr (__is_same(A, double)) {
    return sum.template operator()<A, U>();
  } else {
    return exact ? sum.template operator()<double, 1>() : sum.template operator()<A, U>();
  }
}

// ---- sums of all pieces ---------------------------------------------------------------------------------------------

struct Pieces {
  double* partial;    // [tile][piece][2][columns]; with one piece unused
  unsigned* arrived;  // [tile], zeros
};

// True in the block that has the sums of all pieces, in its threads below view.columns().
template <class View>
DEEPOPS_DEVICE bool sum_pieces(const View& view, const Pieces& pieces, Sums& sums) {
  if (view.pieces == 1) return true;
  DEEPOPS_SHARED(double, shared_a, kThreads);
  DEEPOPS_SHARED(double, shared_b, kThreads);
  const int columns = view.columns(), thread = gpu::thread();
  double* const tile = pieces.partial + int64_t(view.tile()) * view.pieces * 2 * columns;
  if (thread < columns) {
    double* const mine = tile + int64_t(view.piece()) * 2 * columns + thread;
    gpu::store(mine, sums.a);
    gpu::store(mine + columns, sums.b);
  }
  if (!gpu::last_block(pieces.arrived + view.tile(), unsigned(view.pieces))) return false;

  const int column = thread % columns, first = thread / columns, step = kThreads / columns;
  sums = {0, 0};
#pragma unroll 4
  for (int piece = first; piece < view.pieces; piece += step) {
    const double* const from = tile + int64_t(piece) * 2 * columns + column;
    sums.a += gpu::load_fresh(from);
    sums.b += gpu::load_fresh(from + columns);
  }
  shared_a.store(thread, sums.a);
  shared_b.store(thread, sums.b);
  for (int half = step / 2; half > 0; half /= 2) {
    gpu::barrier();
    if (first >= half) continue;
    sums.a += shared_a.load(thread + half * columns);
    sums.b += shared_b.load(thread + half * columns);
    shared_a.store(thread, sums.a);
    shared_b.store(thread, sums.b);
  }
  return true;
}

// ---- statistics -----------------------------------------------------------------------------------------------------

template <class T>
struct Statistics {
  const T* x;
  BatchNormActShape shape;
  OpMath<T>*mean, *invstd;  // [C]
  Running<OpMath<T>> running;
  const int64_t* num_batches_tracked;  // before this batch; null: `factor` holds
  double factor, eps;                  // factor: momentum
  double count, per_count, unbiased;   // n, 1 / n, n / (n - 1)
  double per_sample;                   // 1 / shape.samples
  double* part;                        // [2 * C + 1] or null: for these alone, as in moments.h
  Pieces pieces;
};

// The mean of samples spread over the channel. Any finite value would be correct; one near the mean is accurate.
template <class T>
DEEPOPS_DEVICE OpMath<T> sample(const Statistics<T>& args, int channel) {
  const BatchNormActShape& shape = args.shape;
  double sum = 0;
#pragma unroll
  for (int s = 0; s < 8; ++s) {
    if (s < shape.samples)
      sum += double(gpu::widen(gpu::load(args.x + shape.sample_offset[s] + channel * shape.next_channel)));
  }
  // On the grid of the data, differences have few bits: rounding errors of equal values do not add up.
  const OpMath<T> mean = gpu::widen(gpu::narrow<T>(OpMath<T>(sum * args.per_sample)));
  return mean - mean == 0 ? mean : 0;  // not finite: any value does
}

// What becomes of the values that a sum has read, where another pass reads them again.
struct KeepNothing {
  template <class Chunks, class Values>
  DEEPOPS_DEVICE void operator()(const Chunks&, const Values&) const {}
};

// Adds x - shift and its square. S: the type of the differences. near: receives the shifts of the block's channels.
template <class S, int U, class T, class View, class Keep = KeepNothing>
DEEPOPS_DEVICE typename View::ThreadSums sum_squares(const Statistics<T>& args, const View& view,
                                                     const gpu::Shared<OpMath<T>>& near, const Keep& keep = {}) {
  constexpr int V = View::V;
  typename View::ThreadSums sums;
  const auto shift = view.template numbers<Shift<S>>([&](int channel) {
    const OpMath<T> found = sample(args, channel);
    near.store(View::slot(channel - view.channel(0)), found);
    return Shift<S>{S(found)};
  });
  view.template for_piece<U>([&](const Chunk<V>(&chunks)[U]) {
    Values<T, V> values[U];
#pragma unroll
    for (int u = 0; u < U; ++u) values[u] = fetch(args.x, chunks[u]);
    keep(chunks, values);
    sums.template add<S, U>([&](int u, int i, S& a, S& b) {
      const S d = chunks[u].has(i) ? S(gpu::widen(values[u].value[i])) - shift(i).near : S(0);
      a += d;
      b += d * d;
    });
  });
  return sums;
}

// Two passes in double over one channel, by a block, for values whose squares do not fit single precision.
template <class T, class View>
DEEPOPS_DEVICE Moments careful_moments(const Statistics<T>& args, const View& view, int channel) {
  DEEPOPS_SHARED(double, common, 1);
  double mean = 0, variance = 0;
  for (int pass = 0; pass < 2; ++pass) {
    double sum[1] = {0};
    view.for_channel(channel, [&](int64_t i) {
      const double value = double(gpu::widen(gpu::load(args.x + i)));
      sum[0] += (pass == 0 ? value : (value - mean) * (value - mean)) * args.per_count;
    });
    gpu::barrier();  // the last use of shared memory is over
    gpu::block_sum<kThreads>(sum);
    if (gpu::thread() == 0) common.store(0, sum[0]);
    gpu::barrier();
    (pass == 0 ? mean : variance) = common.load(0);
  }
  return {mean, variance};
}

// Takes the statistics of those channels of the block again whose squares overflowed, or that are not finite.
template <class T, class View>
DEEPOPS_DEVICE void repair(const Statistics<T>& args, const View& view, bool broken, Moments& moments) {
  DEEPOPS_SHARED(unsigned, masks, kWarps);
  const unsigned mask = gpu::ballot(broken);
  if (gpu::lane() == 0) masks.store(gpu::warp(), mask);
  gpu::barrier();
  for (int warp = 0; warp * gpu::kWarp < view.columns(); ++warp) {
    const unsigned found = masks.load(warp);
    for (int bit = 0; found >> bit != 0 && bit < gpu::kWarp; ++bit) {
      if (!(found >> bit & 1u)) continue;
      const int column = warp * gpu::kWarp + bit;
      const Moments careful = careful_moments(args, view, view.channel(column));
      if (gpu::thread() == column) moments = careful;
    }
  }
}

// By the block that has the sums of all pieces.
template <class T, class View>
DEEPOPS_DEVICE void finish_statistics(const Statistics<T>& args, const View& view, const gpu::Shared<OpMath<T>>& near,
                                      const Sums& sums) {
  using A = OpMath<T>;
  const int channel = view.channel(gpu::thread());
  const bool finishes = gpu::thread() < view.columns() && channel < view.channels;
  Moments moments{0, 0};
  if (finishes) {
    const double offset = sums.a * args.per_count;
    moments.mean = double(near.load(View::slot(channel - view.channel(0)))) + offset;
    moments.variance = sums.b * args.per_count - offset * offset;
    if (moments.variance < 0) moments.variance = 0;
  }
  repair(args, view, finishes && !(sums.b - sums.b == 0), moments);
  if (!finishes) return;

  if (args.part) {
    gpu::store(args.part + channel, moments.mean);
    gpu::store(args.part + view.channels + channel, moments.variance);
    if (channel == 0) gpu::store(args.part + 2 * int64_t(view.channels), args.count);
    return;
  }
  gpu::store(args.mean + channel, A(moments.mean));
  gpu::store(args.invstd + channel, A(1 / DEEPOPS_LIBM(sqrt)(moments.variance + args.eps)));
  if (!args.running.mean && !args.running.var) return;
  const double factor = args.num_batches_tracked ? 1.0 / double(gpu::load(args.num_batches_tracked) + 1) : args.factor;
  args.running.learn(channel, moments, args.unbiased, factor);
}

template <class T, class View>
DEEPOPS_KERNEL(kThreads, 2)
statistics(Statistics<T> args, View view) {
  using A = OpMath<T>;
  DEEPOPS_SHARED(A, near, View::kSlots);
  const auto mine = sum_in<A, kStatisticsUnroll<View>>(
      args.shape.exact, [&]<class S, int U>() { return sum_squares<S, U>(args, view, near); });
  Sums sums = view.block_sums(mine);
  if (sum_pieces(view, args.pieces, sums)) finish_statistics(args, view, near, sums);
}

// ---- forward --------------------------------------------------------------------------------------------------------

template <class T>
struct Forward {
  const T* x;
  const T* residual;  // or null
  T* y;
  AffineSource<OpMath<T>> source;
  Activation activation;
  double negative_slope;
  int64_t* num_batches_tracked;  // to be incremented, or null
};

template <class T, int V, int U, class Numbers>
DEEPOPS_DEVICE void forward_values(const Forward<T>& args, const Chunk<V> (&chunks)[U], const Values<T, V> (&x)[U],
                                   const Numbers& numbers) {
  using A = OpMath<T>;
  Values<T, V> residual[U];
  if (args.residual) {
#pragma unroll
    for (int u = 0; u < U; ++u) residual[u] = fetch(args.residual, chunks[u]);
  }
  A z[U][V];
#pragma unroll
  for (int u = 0; u < U; ++u) {
#pragma unroll
    for (int i = 0; i < V; ++i) z[u][i] = numbers(i)(gpu::widen(x[u].value[i]));
    if (args.residual) {
#pragma unroll
      for (int i = 0; i < V; ++i) z[u][i] += gpu::widen(residual[u].value[i]);
    }
  }
  with_activation(args.activation, args.negative_slope, [&](const auto& act) {
#pragma unroll
    for (int u = 0; u < U; ++u) {
#pragma unroll
      for (int i = 0; i < V; ++i) z[u][i] = act.forward(z[u][i]);
    }
  });
#pragma unroll
  for (int u = 0; u < U; ++u) put(args.y, chunks[u], z[u]);
}

template <class T, int V, int U, class Numbers>
DEEPOPS_DEVICE void forward_chunks(const Forward<T>& args, const Chunk<V> (&chunks)[U], const Numbers& numbers) {
  Values<T, V> x[U];
#pragma unroll
  for (int u = 0; u < U; ++u) x[u] = fetch(args.x, chunks[u]);
  forward_values(args, chunks, x, numbers);
}

template <class T, class View>
DEEPOPS_KERNEL(kThreads)
forward(Forward<T> args, View view) {
  if (args.num_batches_tracked && gpu::block() == 0 && gpu::thread() == 0)
    gpu::store(args.num_batches_tracked, gpu::load(args.num_batches_tracked) + 1);
  const auto affine_of = [&](int channel) { return args.source.at(channel); };
  view.template for_part<kUnroll<T>, Affine<OpMath<T>>>(
      affine_of, [&](const auto& chunks, const auto& numbers) { forward_chunks(args, chunks, numbers); });
}

// ---- backward -------------------------------------------------------------------------------------------------------

// What the statistics have to do with grad_x, of the sums of g and of g * (x - mean) over 1 / per_count values.
template <class A>
DEEPOPS_DEVICE A mean_gradient(const Sums& sums, double per_count) {
  return A(sums.a * per_count);
}
template <class A>
DEEPOPS_DEVICE A slope_gradient(const Sums& sums, double per_count, double invstd) {
  return A(sums.b * per_count * invstd * invstd);
}

template <class T>
struct Reduce {
  Gradient<T> gradient;
  AffineSource<OpMath<T>> source;
  OpMath<T>*mean_grad, *slope_grad;   // [C], for the backward kernel; unused with
  double* sums;                       // [2 * C], or null: the sums themselves
  OpMath<T>*grad_weight, *grad_bias;  // [C], or null
  double per_count;
  bool exact;  // every term goes to double
  Pieces pieces;
};

template <class S, int U, class T, class View, class Keep = KeepNothing>
DEEPOPS_DEVICE typename View::ThreadSums sum_gradients(const Reduce<T>& args, const View& view, const Keep& keep = {}) {
  using A = OpMath<T>;
  constexpr int V = View::V;
  typename View::ThreadSums sums;
  const auto numbers = view.template numbers<Affine<A>>([&](int channel) { return args.source.at(channel); });
  view.template for_piece<U>([&](const Chunk<V>(&chunks)[U]) {
    GradientValues<T, V, U> values;
    fetch(args.gradient, chunks, values);
    keep(chunks, values);
    A g[U][V], centered[U][V];
    gradient(args.gradient, chunks, values, numbers, g, centered);
    sums.template add<S, U>([&](int u, int i, S& a, S& b) {
      a += S(g[u][i]);
      b += S(g[u][i]) * S(centered[u][i]);
    });
  });
  return sums;
}

// By the block that has the sums of all pieces.
template <class T, class View>
DEEPOPS_DEVICE void finish_reduce(const Reduce<T>& args, const View& view, const Sums& sums) {
  using A = OpMath<T>;
  const int channel = view.channel(gpu::thread());
  if (gpu::thread() >= view.columns() || channel >= view.channels) return;
  const double invstd = double(gpu::load(args.source.invstd + channel));
  if (args.sums) {
    gpu::store(args.sums + channel, sums.a);
    gpu::store(args.sums + view.channels + channel, sums.b);
  } else {
    gpu::store(args.mean_grad + channel, mean_gradient<A>(sums, args.per_count));
    gpu::store(args.slope_grad + channel, slope_gradient<A>(sums, args.per_count, invstd));
  }
  if (args.grad_weight) gpu::store(args.grad_weight + channel, A(sums.b * invstd));
  if (args.grad_bias) gpu::store(args.grad_bias + channel, A(sums.a));
}

template <class T, class View>
DEEPOPS_KERNEL(kThreads, 2)
reduce(Reduce<T> args, View view) {
  const auto mine =
      sum_in<OpMath<T>, kUnroll<T>>(args.exact, [&]<class S, int U>() { return sum_gradients<S, U>(args, view); });
  Sums sums = view.block_sums(mine);
  if (sum_pieces(view, args.pieces, sums)) finish_reduce(args, view, sums);
}

template <class T>
struct Backward {
  Gradient<T> gradient;
  AffineSource<OpMath<T>> source;
  const OpMath<T>*mean_grad, *slope_grad;  // [C]; null where the statistics were given
  T *grad_x, *grad_residual;               // or null
};

template <class T, int V, int U, class Numbers>
DEEPOPS_DEVICE void backward_values(const Backward<T>& args, const Chunk<V> (&chunks)[U],
                                    const GradientValues<T, V, U>& values, const Numbers& numbers) {
  OpMath<T> g[U][V], centered[U][V];
  gradient(args.gradient, chunks, values, [&](int i) { return numbers(i).affine; }, g, centered);
#pragma unroll
  for (int u = 0; u < U; ++u) {
    if (args.grad_residual) put(args.grad_residual, chunks[u], g[u]);
    if (!args.grad_x) continue;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const auto number = numbers(i);
      if (args.mean_grad) g[u][i] = g[u][i] - number.mean_grad - centered[u][i] * number.slope_grad;
      g[u][i] = number.affine.scale * g[u][i];
    }
    put(args.grad_x, chunks[u], g[u]);
  }
}

template <class T, int V, int U, class Numbers>
DEEPOPS_DEVICE void backward_chunks(const Backward<T>& args, const Chunk<V> (&chunks)[U], const Numbers& numbers) {
  GradientValues<T, V, U> values;
  fetch(args.gradient, chunks, values);
  backward_values(args, chunks, values, numbers);
}

template <class T, class View>
DEEPOPS_KERNEL(kThreads, 2)
backward(Backward<T> args, View view) {
  using A = OpMath<T>;
  const auto numbers_of = [&](int channel) -> InputGrad<A> {
    if (!args.mean_grad) return {args.source.at(channel), A(0), A(0)};
    return {args.source.at(channel), gpu::load(args.mean_grad + channel), gpu::load(args.slope_grad + channel)};
  };
  view.template for_part<kUnroll<T>, InputGrad<A>>(
      numbers_of, [&](const auto& chunks, const auto& numbers) { backward_chunks(args, chunks, numbers); });
}

}  // namespace deepops::isa_gpu
