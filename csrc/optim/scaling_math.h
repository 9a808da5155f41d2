// The arithmetic of clipping, of stochastic rounding and of master weights in two halves: for host and device.
#pragma once
#include <cstdint>

#include "core/host_device.h"
#include "optim/scaling.h"

namespace deepops::DEEPOPS_ISA {

// torch.nn.utils.clip_grad_norm_'s factor: max_norm / (norm + 1e-6), at most 1; NaN stays.
DEEPOPS_HD double clip_factor(double squares, double inverse_scale, double max_norm) {
  const double norm = DEEPOPS_LIBM(sqrt)(squares) * inverse_scale;
  const double factor = max_norm / (norm + 1e-6);
  return factor >= 1 ? 1 : factor;
}

// What the scaling of a step comes to.
struct Scaled {
  bool skips;
  double grad_factor;
};

// load: reads from where the pointers point to.
template <class Load>
DEEPOPS_HD Scaled scaled(const optim::Scaling& s, const Load& load) {
  const bool found_inf = s.found_inf && load(s.found_inf) != 0;
  const bool non_finite = s.skip_non_finite && load(&s.norm->non_finite) != 0;
  double factor = s.grad_scale ? 1 / double(load(s.grad_scale)) : 1;
  if (s.max_norm > 0) factor *= clip_factor(load(&s.norm->squares), factor, s.max_norm);
  return {found_inf || non_finite, factor};
}

// ---- random numbers -------------------------------------------------------------------------------------------------

// U: uint32_t or a vector of them. A bijection all of whose output bits depend on all input bits (constants: Chris
// Wellons, "Prospecting for Hash Functions", 2018, lowbias32).
template <class U>
DEEPOPS_HD U scrambled(U x) {
  x = x ^ (x >> 16);
  x = x * 0x7feb352du;
  x = x ^ (x >> 15);
  x = x * 0x846ca68bu;
  return x ^ (x >> 16);
}

// The random numbers of one tensor in one step: a function of the seed, the step that is taken, the parameter's number
// and the place of the element alone, so that they do not depend on how the work is divided.
struct Noise {
  uint32_t first, second;

  // stream: 0 for the parameter, 1 ... for its states.
  DEEPOPS_HD static Noise of(uint64_t seed, float step, int32_t number) {
    const uint32_t low = scrambled(uint32_t(seed) ^ scrambled(uint32_t(seed >> 32) + 0x9e3779b9u));
    const uint32_t place = scrambled(uint32_t(number) ^ low);
    return {scrambled(place + __builtin_bit_cast(uint32_t, step)), place};
  }

  // 16 random bits for each of `index`, the lower 32 bits of elements' places; high: their upper ones.
  template <class U>
  DEEPOPS_HD U bits(U index, uint32_t high, uint32_t stream) const {
    return scrambled(scrambled(index ^ first) + (second + 0x9e3779b9u * (stream + 4 * high))) >> 16;
  }
};

// fp32 bits to bf16 bits by adding a random fraction of the last place: up with the probability of the part cut off.
// random: below 2^16. Infinities stay and NaN is the quiet 0x7fc0.
template <class U>
DEEPOPS_HD U stochastic_bfloat16_bits(U bits, U random) {
  const auto is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const U rounded = (bits + random) >> 16;
  return is_nan ? U{} + 0x7fc0u : rounded;
}

// ---- a master weight in two halves ----------------------------------------------------------------------------------

// The upper half is the number rounded to bf16 (to nearest even); the lower one has the bits that this cut off, and is
// 0x8000 or more where it rounded up, so that join() gives back the very number. 2^32 numbers go into 2^32 pairs, but
// 65537 of them round to each even half and 65535 to each odd one; so the one that lies midway above an even half is
// moved down to its neighbour, by 2^-24 of its size at most. Infinities are exact, NaN is 0x7fc00000.
template <class U>
struct Halves {
  U high, low;
};

template <class U>
DEEPOPS_HD Halves<U> split(U bits) {
  const auto is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const auto midway_above_even = (bits & 0x1ffffu) == 0x8000u;
  const U kept = midway_above_even ? bits - 1u : bits;
  const U high = (kept + 0x8000u) >> 16;  // to nearest: what is midway now is above an odd half
  return {is_nan ? U{} + 0x7fc0u : high, is_nan ? U{} : kept & 0xffffu};
}

template <class U>
DEEPOPS_HD U join(U high, U low) {
  const auto rounded_up = low >= 0x8000u;
  return ((rounded_up ? high - 1u : high) << 16) | low;
}

}  // namespace deepops::DEEPOPS_ISA
