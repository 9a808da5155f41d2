// The two small GPU kernels of a batch that several processes share: one thread per channel.
#pragma once
#include "batch_norm_act/batch_norm_act_kernels.cuh"
#include "batch_norm_act/moments.h"

namespace deepops::isa_gpu {

template <class A>
struct Merge {
  const double* gathered;  // [parts][2 * C + 1], moments.h
  int parts, channels;
  A *mean, *invstd;  // [C]
  double* count;     // of values per channel in all parts
  Running<A> running;
  const int64_t* num_batches_tracked;  // with this batch; null: `factor` holds
  double factor, eps;                  // factor: momentum
};

// Statistics of all parts together, in the order of the parts; one thread more than channels stores the count.
template <class A>
DEEPOPS_KERNEL(kThreads, 1)
merge(Merge<A> args) {
  const int channel = gpu::block() * kThreads + gpu::thread();
  if (channel > args.channels) return;
  JoinedMoments joined;
  for (int part = 0; part < args.parts; ++part) {
    const double* const from = args.gathered + part * (2 * int64_t(args.channels) + 1);
    const bool counts = channel == args.channels;
    joined.add(gpu::load(from + 2 * int64_t(args.channels)), counts ? 0 : gpu::load(from + channel),
               counts ? 0 : gpu::load(from + args.channels + channel));
  }
  if (channel == args.channels) return gpu::store(args.count, joined.count);
  gpu::store(args.mean + channel, A(joined.mean));
  gpu::store(args.invstd + channel, joined.count == 0 ? A(0) : A(1 / DEEPOPS_LIBM(sqrt)(joined.variance + args.eps)));
  if (joined.count < 2) return;
  const double factor = args.num_batches_tracked ? 1.0 / double(gpu::load(args.num_batches_tracked)) : args.factor;
  args.running.learn(channel, {joined.mean, joined.variance}, joined.count / (joined.count - 1), factor);
}

template <class A>
struct MeanGradients {
  const double *sums, *count;  // [2 * C], [1]: of the whole batch
  const A* invstd;             // [C]
  A *mean_grad, *slope_grad;   // [C], for the backward kernel
  int channels;
};

template <class A>
DEEPOPS_KERNEL(kThreads)
mean_gradients(MeanGradients<A> args) {
  const int channel = gpu::block() * kThreads + gpu::thread();
  if (channel >= args.channels) return;
  const Sums sums{gpu::load(args.sums + channel), gpu::load(args.sums + args.channels + channel)};
  const double per_count = 1 / gpu::load(args.count), invstd = double(gpu::load(args.invstd + channel));
  gpu::store(args.mean_grad + channel, mean_gradient<A>(sums, per_count));
  gpu::store(args.slope_grad + channel, slope_gradient<A>(sums, per_count, invstd));
}

}  // namespace deepops::isa_gpu
