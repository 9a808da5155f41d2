// What an optimizer's formula ("rule") and the code that runs it over many tensors know of each other.
//
// A rule is a struct in <rule>.h:
//   kName         "adam"
//   Hyper         hyper-parameters of a param group as doubles, in the order in which Python hands them over
//   Group         `hyper` and what the host makes of it once; a multiple of 16 bytes
//   Scalars       what is the same for all elements of a tensor in one step, in double
//   kStateSets    which of a row's states the formula uses, as bits, one entry per form of it
//   states(hyper) the entry for these hyper-parameters
//   fill(group, hyper, known)  the host makes the group; known: it was made before, for group.hyper
// and its mathematics is Math<Rule> in <rule>_math.h, for host and device:
//   Factors<T>                 Scalars in the type the arithmetic is done in
//   rounded<T>(scalars)        ... made of them
//   scalars(group, t, factor)  for step t, from 1; factor: of the gradients
//   element<states>(p, g, s, factors)  one element, or 16 of them
#pragma once
#include "core/cpu_isa.h"
#include "core/host_device.h"
#include "optim/row.h"
#include "optim/scaling.h"

namespace deepops::optim {

// n elements of one tensor, all streams in one dtype.
struct Chunk {
  void* param;
  void* grad;
  void* state[Row::kStates];  // null: not used
  int64_t n;
  core::DataType dtype;
};

// ... and in several dtypes, with all that goes beyond the formula.
struct MixedChunk : Chunk {
  core::DataType state_dtype;
  void* master;
  Master master_kind;
  bool update;         // false: only `facts`, nothing is written
  bool write_grads;    // grad <- grad * grad_factor
  double grad_factor;  // part of the scalars too
  bool stochastic;
  uint64_t seed;
  float step;
  int32_t number;
  int64_t begin;    // place of the first element in the tensor
  RowFacts* facts;  // null: not wanted; else they are added up there
};

// The kernels of one rule and one instruction set. states: an entry of Rule::kStateSets.
template <class Rule>
struct RuleKernels {
  typename Rule::Scalars (*scalars)(const typename Rule::Group& group, float t, double grad_factor);
  void (*update)(const Chunk& chunk, int states, const typename Rule::Scalars& scalars);
  void (*update_mixed)(const MixedChunk& chunk, int states, const typename Rule::Scalars& scalars);
};

// call.operator()<s>() for the entry s of Rule::kStateSets that `states` is.
#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
template <class Rule, int i = 0, class Call>
DEEPOPS_HD void with_states(int states, const Call& call) {
  constexpr int kCount = sizeof Rule::kStateSets / sizeof Rule::kStateSets[0], kStates = Rule::kStateSets[i];
  if constexpr (i + 1 < kCount) {
    if (states != kStates) return with_states<Rule, i + 1>(states, call);
  }
  call.template operator()<kStates>();
}

}  // namespace deepops::optim

namespace deepops::DEEPOPS_ISA {
template <class Rule>
struct Math;
}
