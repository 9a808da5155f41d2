#include "batch_norm_act/arguments.h"

#include "core/tensor_facts.h"

namespace py = pybind11;

namespace deepops {
namespace {

using core::DataType;
using core::TensorReader;
using core::TensorView;

// Whether the memory is filled in the order of the given dimensions, innermost first.
template <class Order>
bool is_dense(const TensorView& view, const Order& order) {
  int64_t expected = 1;
  for (int32_t i = 0; i < view.dims; ++i) {
    const int32_t d = order(i);
    if (view.sizes[d] != 1 && view.strides[d] != expected) return false;
    expected *= view.sizes[d];
  }
  return true;
}

bool is_contiguous(const TensorView& view) {
  return is_dense(view, [&](int32_t i) { return view.dims - 1 - i; });
}

bool is_channels_last(const TensorView& view) {  // [N, C, ...]: C, then the last dimension up to the third, then N
  const int32_t dims = view.dims;
  if (dims != 4 && dims != 5) return false;
  return is_dense(view, [&](int32_t i) { return i == 0 ? 1 : i == dims - 1 ? 0 : dims - i; });
}

// Answers in one call what takes Python 8 us to find out: that nothing is wrong with a call or has to be converted.
class BatchNormActArguments {
 public:
  BatchNormActArguments(py::handle tensor_type, py::handle parameter_type)
      : reader_(tensor_type), parameter_type_(reinterpret_cast<PyTypeObject*>(parameter_type.ptr())) {}

  // True: the compiled ops take all of these as they are. False: somebody has to look closer.
  bool fit(py::handle x, py::handle residual, py::handle weight, py::handle bias, py::handle running_mean,
           py::handle running_var, py::handle num_batches_tracked, bool training) const {
    TensorView data;
    DataType type;
    if (!read(x, data) || data.dims < 2 || !core::data_type(data, type)) return false;
    if (!is_contiguous(data) && !is_channels_last(data)) return false;
    const int64_t channels = data.sizes[1], count = data.numel();
    if (count == 0 || (training && count == channels)) return false;
    if (!residual.is_none() && !same_layout(residual, x)) return false;
    const int bits = type == DataType::f64 ? 64 : 32;
    for (py::handle vector : {weight, bias, running_mean, running_var})
      if (!vector.is_none() && !is_vector(vector, channels, bits)) return false;
    if (!training) return !running_mean.is_none() && !running_var.is_none();
    return num_batches_tracked.is_none() || is_counter(num_batches_tracked);
  }

  // Whether `a` has the sizes, strides, dtype and device of `b`.
  bool same_layout(py::handle a, py::handle b) const {
    TensorView of_a, of_b;
    return read(a, of_a) && read(b, of_b) && of_a.same_kind(of_b) && of_a.same_strides(of_b);
  }

 private:
  static constexpr int kDLCPU = 1, kDLInt = 0, kDLFloat = 2;

  bool read(py::handle tensor, TensorView& view) const {  // subclasses may mean anything by their memory
    const PyTypeObject* type = Py_TYPE(tensor.ptr());
    if (type != reader_.type() && type != parameter_type_) return false;
    return reader_.read(tensor.ptr(), view) && view.device_type == kDLCPU && view.data;
  }

  bool is_vector(py::handle tensor, int64_t size, int bits) const {
    TensorView view;
    return read(tensor, view) && view.dims == 1 && view.sizes[0] == size && (size == 1 || view.strides[0] == 1) &&
           view.type_code == kDLFloat && view.type_bits == bits;
  }

  bool is_counter(py::handle tensor) const {
    TensorView view;
    return read(tensor, view) && view.numel() == 1 && view.type_code == kDLInt && view.type_bits == 64;
  }

  TensorReader reader_;
  PyTypeObject* parameter_type_;
};

}  // namespace

void bind_batch_norm_act(py::module_& m) {
  using A = BatchNormActArguments;
  py::class_<A>(m, "BatchNormActArguments", "One look at all tensors of a call (csrc/batch_norm_act/arguments.h).")
      .def(py::init<py::handle, py::handle>(), py::arg("tensor_type"), py::arg("parameter_type"))
      .def("fit", &A::fit, py::arg("x"), py::arg("residual"), py::arg("weight"), py::arg("bias"),
           py::arg("running_mean"), py::arg("running_var"), py::arg("num_batches_tracked"), py::arg("training"))
      .def("same_layout", &A::same_layout, py::arg("a"), py::arg("b"));
}

}  // namespace deepops
