// The optimizers' part of `_C`: what a step needs of Python's objects, as raw pointers (no torch headers).
#pragma once
#include <pybind11/pybind11.h>

namespace deepops::optim {

// Adds StepTable, GradList, ChunkPlan and what goes with them to the module.
void bind(pybind11::module_& module);

void bind_step_table(pybind11::module_& module);
void bind_grad_list(pybind11::module_& module);

}  // namespace deepops::optim
