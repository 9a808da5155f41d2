#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <vector>

#include "optim/backends.h"
#include "optim/plan.h"
#include "optim/table.h"

namespace py = pybind11;

namespace deepops::optim {
namespace {

using Stretch = std::tuple<int64_t, int64_t, int64_t, int64_t>;

std::vector<Stretch> stretches(const ChunkPlan& plan, int64_t first, int64_t last) {
  std::vector<Stretch> result;
  for (int64_t item = first; item < last; ++item) {
    plan.for_each(item, item + 1,
                  [&](int64_t tensor, int64_t begin, int64_t end) { result.emplace_back(item, tensor, begin, end); });
  }
  return result;
}

}  // namespace

void bind(py::module_& m) {
  m.def(
      "is_dense",
      [](const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
        return is_dense(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data());
      },
      py::arg("sizes"), py::arg("strides"), "Whether a tensor fills its memory without gaps or overlaps.");
  m.def("has_backend", &has_backend, py::arg("backend"), "Whether a loaded library takes steps on this backend.");
  py::class_<ChunkPlan>(m, "ChunkPlan",
                        "How the elements of many tensors are divided into work items (csrc/optim/plan.h).")
      .def(py::init<const std::vector<int64_t>&, int64_t>(), py::arg("sizes"), py::arg("chunk") = kCpuChunk)
      .def_property_readonly("chunk", &ChunkPlan::chunk)
      .def_property_readonly("items", &ChunkPlan::items)
      .def_property_readonly("slots", &ChunkPlan::slots)
      .def("slot", &ChunkPlan::slot, py::arg("tensor"), py::arg("begin"))
      .def("stretches", &stretches, py::arg("first"), py::arg("last"),
           "(item, tensor, begin, end) for every stretch of elements in items [first, last).");
  bind_step_table(m);
  bind_grad_list(m);
}

}  // namespace deepops::optim
