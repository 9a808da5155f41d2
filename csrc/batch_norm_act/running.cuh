// What batch statistics leave behind on the GPU: the running statistics.
#pragma once
#include "core/gpu.cuh"

namespace deepops::isa_gpu {

struct Moments {
  double mean, variance;  // biased
};

template <class A>
struct Running {
  A *mean, *var;  // [C], or null
  // What a batch of n values per channel does to them. unbiased: n / (n - 1); factor: momentum.
  DEEPOPS_DEVICE void learn(int channel, const Moments& batch, double unbiased, double factor) const {
    const auto replace = [&](A* running, double value) {
      if (!running) return;
      gpu::store(running + channel, A((1 - factor) * double(gpu::load(running + channel)) + factor * value));
    };
    replace(mean, batch.mean);
    replace(var, unbiased * batch.variance);
  }
};

}  // namespace deepops::isa_gpu
