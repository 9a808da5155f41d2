// GPU kernels of depthwise_bn_act. A thread takes one channel of one position at a time, a warp 32 neighbouring
// channels.
//
// Sums are taken in double, by pieces of positions: `partial` sums per piece, and a second launch that adds them up in
// their order.
#pragma once
#include "core/gpu.cuh"
#include "depthwise_bn_act/depthwise_bn_act.h"
// after gpu.cuh, which says for what the formulas are compiled
#include "batch_norm_act/batch_norm_act_math.h"

namespace deepops::isa_gpu {

using core::OpMath;

inline constexpr int kThreads = 256;
inline constexpr int kWarps = kThreads / gpu::kWarp;

// ---- z --------------------------------------------------------------------------------------------------------------

template <class T>
struct Input {
  DepthwiseShape shape;
  const T* x;       // [N, H, W, C]
  const T* filter;  // [C, R, S]

  // Where tap (r, s) of an output reads, relative to channel 0; -1 in the padding.
  DEEPOPS_DEVICE int64_t read_at(int64_t position, int64_t r, int64_t s) const {
    const int64_t image = position / shape.inner, row = position % shape.inner / shape.out_width;
    const int64_t y = row * shape.stride_y - shape.top + r * shape.dilation_y;
    const int64_t x_at = position % shape.out_width * shape.stride_x - shape.left + s * shape.dilation_x;
    if (y < 0 || y >= shape.height || x_at < 0 || x_at >= shape.width) return -1;
    return ((image * shape.height + y) * shape.width + x_at) * shape.channels;
  }

  // Row by row: sums of sums are more accurate than one long sum.
  DEEPOPS_DEVICE T z(int64_t position, int64_t channel) const {
    T sum = 0;
    const T* weight = filter + channel * shape.filter_size();
#pragma unroll 1
    for (int64_t r = 0; r < shape.filter_height; ++r) {
      T row = 0;
#pragma unroll 1
      for (int64_t s = 0; s < shape.filter_width; ++s) {
        const int64_t at = read_at(position, r, s);
        if (at >= 0) row += gpu::load(x + at + channel) * gpu::load(weight + r * shape.filter_width + s);
      }
      sum += row;
    }
    return sum;
  }
};

template <class T>
struct Vectors {
  const T *mean, *invstd;
  const T *weight, *bias;  // or null

  DEEPOPS_DEVICE T scale(int64_t channel) const {
    const T invstd_here = gpu::load(invstd + channel);
    return weight ? gpu::load(weight + channel) * invstd_here : invstd_here;
  }
  DEEPOPS_DEVICE T affine(T centered, int64_t channel) const {
    return centered * scale(channel) + (bias ? gpu::load(bias + channel) : T(0));
  }
};

// ---- sums over positions --------------------------------------------------------------------------------------------

struct Sums {
  double a, b;
};

// Block `piece * tiles + tile` adds up term(position, channel) over the positions of its piece, for 32 channels.
struct Partition {
  int64_t positions, channels;
  int tiles, pieces;
  double* partial;  // [pieces][2][channels]

  template <class Term>
  DEEPOPS_DEVICE void add(const Term& term) const {
    const int tile = gpu::block() % tiles, piece = gpu::block() / tiles;
    const int64_t channel = int64_t(tile) * gpu::kWarp + gpu::lane();
    const int64_t last = (piece + 1) * positions / pieces;
    Sums sums{0, 0};
    if (channel < channels) {
#pragma unroll 1
      for (int64_t position = piece * positions / pieces + gpu::warp(); position < last; position += kWarps)
        term(position, channel, sums);
    }
    DEEPOPS_SHARED(double, memory, 2 * kThreads);
    memory.store(gpu::thread(), sums.a);
    memory.store(kThreads + gpu::thread(), sums.b);
    gpu::barrier();
    if (gpu::thread() >= gpu::kWarp || channel >= channels) return;
    Sums total{0, 0};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      total.a += memory.load(w * gpu::kWarp + gpu::lane());
      total.b += memory.load(kThreads + w * gpu::kWarp + gpu::lane());
    }
    gpu::store(partial + 2 * piece * channels + channel, total.a);
    gpu::store(partial + (2 * piece + 1) * channels + channel, total.b);
  }

  DEEPOPS_DEVICE Sums total(int64_t channel) const {
    Sums sums{0, 0};
#pragma unroll 1
    for (int64_t piece = 0; piece < pieces; ++piece) {
      sums.a += gpu::load(partial + 2 * piece * channels + channel);
      sums.b += gpu::load(partial + (2 * piece + 1) * channels + channel);
    }
    return sums;
  }
};

// ---- forward --------------------------------------------------------------------------------------------------------

template <class T>
DEEPOPS_DEVICE double shift_of(const Input<T>& input, int64_t channel) {  // one value of z: near enough for double
  const double value = input.z(input.shape.count() / 2, channel);
  return value - value == 0 ? value : 0;
}

template <class T>
DEEPOPS_KERNEL(kThreads, 1)
depthwise_statistics(Input<T> input, Partition partition) {
  const int64_t channel = int64_t(gpu::block() % partition.tiles) * gpu::kWarp + gpu::lane();
  const double shift = channel < partition.channels ? shift_of(input, channel) : 0;
  partition.add([&](int64_t position, int64_t c, Sums& sums) {
    const double d = double(input.z(position, c)) - shift;
    sums.a += d;
    sums.b += d * d;
  });
}

template <class T>
struct Learnt {
  T *mean, *invstd;
  T *running_mean, *running_var;  // or null
  int64_t* num_batches_tracked;   // or null; counted up by channel 0 of a launch of its own
  double factor, eps;
  bool cumulative;  // factor is one over the number of batches
};

DEEPOPS_KERNEL(1) depthwise_count(int64_t* num_batches_tracked) {
  gpu::store(num_batches_tracked, gpu::load(num_batches_tracked) + 1);
}

template <class T>
DEEPOPS_KERNEL(kThreads, 1)
depthwise_finish_statistics(Input<T> input, Partition partition, Learnt<T> learnt) {
  const int64_t channel = int64_t(gpu::block()) * kThreads + gpu::thread();
  if (channel >= partition.channels) return;
  const double count = double(partition.positions);
  const Sums sums = partition.total(channel);
  const double offset = sums.a / count, mean = shift_of(input, channel) + offset;
  const double spread = sums.b / count - offset * offset, variance = spread < 0 ? 0 : spread;
  const double factor = learnt.cumulative ? 1 / double(gpu::load(learnt.num_batches_tracked)) : learnt.factor;
  gpu::store(learnt.mean + channel, T(mean));
  gpu::store(learnt.invstd + channel, T(1 / DEEPOPS_LIBM(sqrt)(variance + learnt.eps)));
  const auto update = [&](T* running, double value) {
    if (running) gpu::store(running + channel, T((1 - factor) * gpu::load(running + channel) + factor * value));
  };
  update(learnt.running_mean, mean);
  update(learnt.running_var, variance * (count / (count - 1)));
}

template <class T>
DEEPOPS_KERNEL(kThreads)
depthwise_forward(Input<T> input, Vectors<T> vectors, T* y) {
  const DepthwiseShape& p = input.shape;
  const int64_t index = int64_t(gpu::block()) * kThreads + gpu::thread();
  if (index >= p.count() * p.channels) return;
  const int64_t channel = index % p.channels;
  const T z = vectors.affine(input.z(index / p.channels, channel) - gpu::load(vectors.mean + channel), channel);
  with_activation(p.activation, p.negative_slope, [&](const auto& act) { gpu::store(y + index, act.forward(z)); });
}

// ---- backward -------------------------------------------------------------------------------------------------------

template <class T>
struct Gradient {  // g = grad_y * act'(..)
  Input<T> input;
  Vectors<T> vectors;
  const T* grad_y;

  DEEPOPS_DEVICE T at(int64_t position, int64_t channel, T& centered) const {
    centered = input.z(position, channel) - gpu::load(vectors.mean + channel);
    const T z = vectors.affine(centered, channel), grad = gpu::load(grad_y + position * input.shape.channels + channel);
    T g = 0;
    with_activation(input.shape.activation, input.shape.negative_slope,
                    [&](const auto& act) { g = act.backward(grad, z); });
    return g;
  }
};

template <class T>
DEEPOPS_KERNEL(kThreads, 1)
depthwise_reduce(Gradient<T> gradient, Partition partition) {
  partition.add([&](int64_t position, int64_t channel, Sums& sums) {
    T centered;
    const T g = gradient.at(position, channel, centered);
    sums.a += double(g);
    sums.b += double(g) * double(centered);
  });
}

template <class T>
DEEPOPS_KERNEL(kThreads)
depthwise_finish_reduce(Partition partition, const T* invstd, T* mean_grad, T* slope_grad, T* grad_weight,
                        T* grad_bias) {
  const int64_t channel = int64_t(gpu::block()) * kThreads + gpu::thread();
  if (channel >= partition.channels) return;
  const double count = double(partition.positions), scale = double(gpu::load(invstd + channel));
  const Sums sums = partition.total(channel);
  gpu::store(mean_grad + channel, T(sums.a / count));
  gpu::store(slope_grad + channel, T(sums.b / count * scale * scale));
  if (grad_weight) gpu::store(grad_weight + channel, T(sums.b * scale));
  if (grad_bias) gpu::store(grad_bias + channel, T(sums.a));
}

template <class T>
DEEPOPS_KERNEL(kThreads)
depthwise_grad_z(Gradient<T> gradient, const T* mean_grad, const T* slope_grad, T* grad_z) {
  const int64_t index = int64_t(gpu::block()) * kThreads + gpu::thread(), channels = gradient.input.shape.channels;
  if (index >= gradient.input.shape.count() * channels) return;
  const int64_t channel = index % channels;
  T centered;
  const T g = gradient.at(index / channels, channel, centered);
  const T inner = g - gpu::load(mean_grad + channel) - centered * gpu::load(slope_grad + channel);
  gpu::store(grad_z + index, gradient.vectors.scale(channel) * inner);
}

template <class T>
DEEPOPS_KERNEL(kThreads)
depthwise_grad_x(DepthwiseShape p, const T* grad_z, const T* filter, T* grad_x) {
  const int64_t index = int64_t(gpu::block()) * kThreads + gpu::thread();
  if (index >= p.batch * p.height * p.width * p.channels) return;
  const int64_t channel = index % p.channels, position = index / p.channels;
  const int64_t x = position % p.width, y = position / p.width % p.height, image = position / p.width / p.height;
  T sum = 0;
#pragma unroll 1
  for (int64_t r = 0; r < p.filter_height; ++r) {
    const int64_t at_y = y + p.top - r * p.dilation_y;
    if (at_y < 0 || at_y % p.stride_y != 0 || at_y / p.stride_y >= p.out_height) continue;
#pragma unroll 1
    for (int64_t s = 0; s < p.filter_width; ++s) {
      const int64_t at_x = x + p.left - s * p.dilation_x;
      if (at_x < 0 || at_x % p.stride_x != 0 || at_x / p.stride_x >= p.out_width) continue;
      const int64_t output = (image * p.out_height + at_y / p.stride_y) * p.out_width + at_x / p.stride_x;
      sum += gpu::load(grad_z + output * p.channels + channel) *
             gpu::load(filter + (channel * p.filter_height + r) * p.filter_width + s);
    }
  }
  gpu::store(grad_x + index, sum);
}

// The sums of one tap; `partition.partial` is that tap's.
template <class T>
DEEPOPS_KERNEL(kThreads, 1)
depthwise_grad_filter(Input<T> input, const T* grad_z, Partition partition, int64_t r, int64_t s) {
  partition.add([&](int64_t position, int64_t channel, Sums& sums) {
    const int64_t at = input.read_at(position, r, s);
    if (at < 0) return;
    sums.a += double(gpu::load(grad_z + position * input.shape.channels + channel)) *
              double(gpu::load(input.x + at + channel));
  });
}

template <class T>
DEEPOPS_KERNEL(kThreads)
depthwise_finish_filter(Partition partition, int64_t tap, int64_t taps, T* grad_filter) {
  const int64_t channel = int64_t(gpu::block()) * kThreads + gpu::thread();
  if (channel < partition.channels) gpu::store(grad_filter + channel * taps + tap, T(partition.total(channel).a));
}

}  // namespace deepops::isa_gpu
