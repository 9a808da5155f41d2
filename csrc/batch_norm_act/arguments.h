// BatchNormActArguments: one look at all tensors of a call (part of `_C`, no torch headers).
#pragma once
#include <pybind11/pybind11.h>

namespace deepops {

// Adds BatchNormActArguments to the module.
void bind_batch_norm_act(pybind11::module_& module);

}  // namespace deepops
