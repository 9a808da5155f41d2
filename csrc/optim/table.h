// StepTable: what an optimizer's step needs of Python's objects, as raw pointers (part of `_C`, no torch headers).
#pragma once
#include <pybind11/pybind11.h>

#include <string>

namespace deepops::optim {

// Finds the step functions of a backend: of "cpu" in _ops.so, of any other ("cuda", and "simt" in the tests) in a
// library of the GPU kernels. library: from dlopen().
void attach(void* library, const std::string& backend);

// Adds StepTable and ChunkPlan to the module.
void bind(pybind11::module_& module);

}  // namespace deepops::optim
