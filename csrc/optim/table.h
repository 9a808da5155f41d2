// StepTable: what an optimizer's step needs of Python's objects, as raw pointers (part of `_C`, no torch headers).
#pragma once
#include <pybind11/pybind11.h>

namespace deepops::optim {

// Finds the step functions that _ops.so exports. library: from dlopen().
void attach(void* library);

// Adds StepTable and ChunkPlan to the module.
void bind(pybind11::module_& module);

}  // namespace deepops::optim
