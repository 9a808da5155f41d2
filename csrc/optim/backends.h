// The functions of each backend that take steps, found by name in the loaded libraries (part of `_C`, no torch
// headers).
#pragma once
#include <string>

#include "optim/grad_norm.h"
#include "optim/step.h"

namespace deepops::optim {

using StepFunction = void (*)(const StepCall*);

struct GradFunctions {
  void (*norm)(const StepCall*, GradNorm*, GradSquares*);
  StepFunction clip;
};

// Finds the functions of a backend: of "cpu" in _ops.so, of any other ("cuda", and "simt" in the tests) in a library of
// the GPU kernels. library: from dlopen().
void attach(void* library, const std::string& backend);

bool has_backend(const std::string& backend);
StepFunction find_step(const std::string& kernel, const std::string& backend);
GradFunctions find_grad_functions(const std::string& backend);

// A plan for these tensors on this backend.
ChunkPlan plan_for(const std::vector<int64_t>& sizes, const std::string& backend);

}  // namespace deepops::optim
