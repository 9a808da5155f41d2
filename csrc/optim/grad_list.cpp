// GradList: a list of gradients for the kernels of csrc/optim/grad_norm.h, without an optimizer.
#include <pybind11/stl.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/tensor_facts.h"
#include "optim/backends.h"
#include "optim/table.h"

namespace py = pybind11;

namespace deepops::optim {
namespace {

class GradList {
 public:
  // grads: on one device, each filling its memory, in the dtypes of the kernels.
  GradList(const std::string& backend, py::handle tensor_type, py::list grads)
      : grads_(grads), functions_(find_grad_functions(backend)) {
    const core::TensorReader reader(tensor_type);
    std::vector<int64_t> sizes;
    for (py::handle grad : grads) {
      core::TensorView view;
      Row row;
      if (!reader.read(grad.ptr(), view) || !part_type(view, row.dtype) ||
          !is_dense(view.dims, view.sizes, view.strides)) {
        throw std::invalid_argument("grads: a tensor has a dtype or strides the kernels do not take");
      }
      if (rows_.empty()) device_index_ = view.device_index;
      row.grad = view.begin();
      row.numel = view.numel() * (view.is_complex() ? 2 : 1);
      row.active = true;
      rows_.push_back(row);
      sizes.push_back(row.numel);
    }
    plan_ = plan_for(sizes, backend);
  }

  bool overlap() const { return grads_overlap(rows_.data(), static_cast<int64_t>(rows_.size())); }

  // out: address of a GradNorm on the gradients' device; row_norms: of a GradSquares per gradient, or 0.
  void norm(uintptr_t out, uintptr_t row_norms) {
    const StepCall step = call();
    py::gil_scoped_release release_gil;
    functions_.norm(&step, reinterpret_cast<GradNorm*>(out), reinterpret_cast<GradSquares*>(row_norms));
  }

  // Scales the gradients so that the norm that norm() found is max_norm at most; norm: the address it was given.
  void clip(uintptr_t norm, double max_norm) {
    StepCall step = call();
    step.scaling.norm = reinterpret_cast<const GradNorm*>(norm);
    step.scaling.max_norm = max_norm;
    py::gil_scoped_release release_gil;
    functions_.clip(&step);
  }

 private:
  StepCall call() {
    return {rows_.data(), static_cast<int64_t>(rows_.size()), &plan_, nullptr, 0, device_index_, &memory_};
  }

  py::list grads_;  // kept alive
  GradFunctions functions_;
  int32_t device_index_ = 0;
  std::vector<Row> rows_;
  ChunkPlan plan_;
  std::unique_ptr<StepMemory> memory_;
};

}  // namespace

void bind_grad_list(py::module_& m) {
  py::class_<GradList>(m, "GradList", "Gradients whose norm is taken (csrc/optim/grad_list.cpp).")
      .def(py::init<const std::string&, py::handle, py::list>(), py::arg("backend"), py::arg("tensor_type"),
           py::arg("grads"))
      .def_property_readonly("overlap", &GradList::overlap, "Whether gradients have memory in common.")
      .def("norm", &GradList::norm, py::arg("out"), py::arg("row_norms") = 0)
      .def("clip", &GradList::clip, py::arg("norm"), py::arg("max_norm"));
}

}  // namespace deepops::optim
