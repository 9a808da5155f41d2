// StepTable: what an optimizer's step needs of Python's objects, as raw pointers.
#include "optim/table.h"

#include <pybind11/stl.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "core/tensor_facts.h"
#include "optim/backends.h"

namespace py = pybind11;

namespace deepops::optim {
namespace {

using core::TensorReader;
using core::TensorView;

// Everything a step needs that stays the same from one step to the next, and the check that it did.
//
// Measured on 1000 tensors, one thread, interleaved: the same facts gathered in Python 1.10 ms, the boxed op `adam`
// with its lists 1.84 ms (kernel included), collect() with all its checks 0.44 ms, and 0.52 ms with the kernel.
//
// Holds borrowed references only (and gradients, while a step runs): the Python object that owns the table keeps its
// parameters, states and dictionaries alive, where the garbage collector can see them.
class StepTable {
 public:
  // kernel: "adam", ...; backend: which library takes the step ("cpu", "cuda", ...).
  // groups: the `params` list of each param group; state: the optimizer's whole state.
  // entries: for each parameter, in order, (parameter, group, own, names, tensors):
  //   own      its dictionary in `state`; None: nothing of it is there
  //   names    keys into `own` of the step counter, the states in the kernel's order and the master weights (kSlots in
  //            all), None for what is not there or not in `own`; None: not for the kernel
  //   tensors  likewise, the tensors; (): the parameter has no state yet and waits for its first gradient
  // The parameter and these were found fit for the kernel, all are on one device.
  // seed: of stochastic rounding; None: round to nearest.
  StepTable(const std::string& kernel, const std::string& backend, py::handle tensor_type, py::tuple groups,
            py::dict state, py::tuple entries, py::object seed)
      : reader_(tensor_type),
        grad_name_(PyUnicode_InternFromString("grad")),
        backend_(backend),
        run_(find_step(kernel, backend)),
        grad_functions_(find_grad_functions(backend)) {
    if (!seed.is_none()) rounding_ = {true, seed.cast<uint64_t>()};
    for (py::handle params : groups) {
      groups_.emplace_back();
      for (py::handle param : params) groups_.back().push_back(param.ptr());
    }
    for (const auto& [key, value] : state) state_.emplace_back(key.ptr(), value.ptr());
    entries_.reserve(entries.size());
    for (py::handle entry : entries) add(entry);
    sizes_.assign(rows_.size(), 0);
    make_plan();
    grads_.assign(rows_.size(), nullptr);
  }
  StepTable(const StepTable&) = delete;
  ~StepTable() {
    release();
    Py_DECREF(grad_name_);
  }

  // Takes over the gradients of this step. None: something changed, the table is of no use any more. Otherwise the
  // entries that have a gradient the kernel cannot take as it is; they are left out unless set_grad() is called.
  py::object collect(py::handle groups, py::handle state) {
    release();
    if (!same_groups(groups) || !same_state(state)) return py::none();
    py::list odd;
    for (size_t i = 0; i < entries_.size(); ++i) {
      if (i + kAhead < entries_.size()) prefetch(entries_[i + kAhead]);
      const Entry& entry = entries_[i];
      if (Py_TYPE(entry.param) != entry.type) return py::none();
      PyObject* grad = PyObject_GetAttr(entry.param, grad_name_);
      if (!grad) throw py::error_already_set();
      const bool has_grad = grad != Py_None;
      if (has_grad && entry.row >= 0) {
        grads_[entry.row] = grad;  // kept alive until the step is over
      } else {
        Py_DECREF(grad);
      }
      if (entry.row < 0) {
        if (has_grad && entry.waits) return py::none();
        if (has_grad) odd.append(i);
        continue;
      }
      if (!same_tensors(entry)) return py::none();
      if (has_grad && !use(entry, grad)) odd.append(i);
    }
    return odd;
  }

  // Gives entry `index` this gradient in place of its own.
  void set_grad(size_t index, py::object grad) {
    Entry& entry = entries_.at(index);
    if (entry.row < 0) throw std::invalid_argument("index: this parameter is not for the kernel");
    Py_XDECREF(grads_[entry.row]);
    grads_[entry.row] = grad.inc_ref().ptr();
    if (!use(entry, grad.ptr())) throw std::invalid_argument("grad: does not have the layout of its parameter");
  }

  // One pass over the gradients that collect() has found. Addresses on the rows' device: out: a GradNorm; grad_scale: a
  // float; row_norms: a GradSquares per row; 0: none.
  void norm(uintptr_t out, uintptr_t grad_scale, uintptr_t row_norms) {
    StepCall step = call({});
    step.scaling.grad_scale = reinterpret_cast<const float*>(grad_scale);
    py::gil_scoped_release release_gil;
    grad_functions_.norm(&step, reinterpret_cast<GradNorm*>(out), reinterpret_cast<GradSquares*>(row_norms));
  }

  // Takes the step. hyper: for each group a tuple of numbers, () for one that has nothing for the kernel. scaling: the
  // members of Scaling, pointers as addresses, or None. facts: address of a RowFacts per row, or 0. Returns the
  // parameters that were changed.
  py::list run(py::tuple hyper, py::object scaling, uintptr_t facts) {
    const std::vector<double> numbers = hyper_blocks(hyper);
    StepCall step = call(numbers);
    step.group_count = static_cast<int64_t>(hyper.size());
    step.facts = reinterpret_cast<RowFacts*>(facts);
    if (!scaling.is_none()) {
      const auto [grad_scale, found_inf, norm, max_norm, skip_non_finite, write_grads] =
          scaling.cast<std::tuple<uintptr_t, uintptr_t, uintptr_t, double, bool, bool>>();
      step.scaling = {reinterpret_cast<const float*>(grad_scale),
                      reinterpret_cast<const float*>(found_inf),
                      reinterpret_cast<const GradNorm*>(norm),
                      max_norm,
                      skip_non_finite,
                      write_grads};
      if (write_grads) step.scaling.write_grads = !grads_overlap(rows_.data(), step.row_count);
    }
    {
      py::gil_scoped_release release_gil;
      run_(&step);
    }
    py::list params;
    for (const Entry& entry : entries_) {
      if (entry.row >= 0 && rows_[entry.row].active) params.append(py::handle(entry.param));
    }
    release();
    return params;
  }

  std::vector<size_t> entry_of_row() const {
    std::vector<size_t> result(rows_.size());
    for (size_t i = 0; i < entries_.size(); ++i) {
      if (entries_[i].row >= 0) result[entries_[i].row] = i;
    }
    return result;
  }

 private:
  // A parameter, its step counter or a state tensor.
  struct Tracked {
    PyObject* tensor;
    PyObject* name;   // its key in Entry::own; null: it is not there
    TensorView view;  // as it was; sizes and strides, within torch's own object, are worth a prefetch and never read
  };

  struct Entry {
    PyObject* param;
    PyTypeObject* type;
    PyObject* own = nullptr;  // its state dictionary
    int row = -1;             // -1: not for the kernel now
    bool waits = false;       // for its first gradient
    bool is_complex = false;
    size_t first = 0;  // in tracked_: the parameter, the step counter, the states, the master weights
    size_t count = 0;
    size_t dimensions = 0;  // in dimensions_: the parameter's sizes, then its strides
  };

  static constexpr size_t kSlots = 2 + Row::kStates;  // the step counter, the states, the master weights

  void add(py::handle description) {
    const auto [param, group, own, names, tensors] =
        description.cast<std::tuple<py::object, int32_t, py::object, py::object, py::tuple>>();
    Entry entry;
    entry.param = param.ptr();
    entry.type = Py_TYPE(param.ptr());
    entry.waits = tensors.empty() && !names.is_none();
    if (!tensors.empty()) {
      if (!own.is_none()) entry.own = own.ptr();
      entry.row = static_cast<int>(rows_.size());
      Row row;
      row.group = group;
      row.number = static_cast<int32_t>(entries_.size());
      track(entry, row, names, tensors);
      rows_.push_back(row);
    }
    entries_.push_back(entry);
  }

  void make_plan() { plan_ = plan_for(sizes_, backend_); }

  StepCall call(const std::vector<double>& hyper) {
    bool changed = false;
    for (size_t i = 0; i < rows_.size(); ++i) {
      const int64_t size = rows_[i].active ? rows_[i].numel : 0;
      changed |= sizes_[i] != size;
      sizes_[i] = size;
    }
    if (changed) make_plan();
    StepCall step = {rows_.data(), static_cast<int64_t>(rows_.size()), &plan_, hyper.data(), 0, device_index_,
                     &memory_};
    step.rounding = rounding_;
    return step;
  }

  // Blocks of equal size, one per group, zeros for ().
  static std::vector<double> hyper_blocks(py::tuple hyper) {
    size_t width = 0;
    for (py::handle group : hyper) width = std::max(width, py::len(group));
    std::vector<double> numbers(width * hyper.size());
    double* block = numbers.data();
    for (py::handle group : hyper) {
      double* next = block;
      for (py::handle number : py::reinterpret_borrow<py::tuple>(group)) {
        *next = PyFloat_AsDouble(number.ptr());
        if (*next++ == -1 && PyErr_Occurred()) throw py::error_already_set();
      }
      block += width;
    }
    return numbers;
  }

  TensorView read(py::handle tensor, py::handle name) {
    TensorView view;
    if (!reader_.read(tensor.ptr(), view)) throw std::invalid_argument("tensors: no plain memory");
    tracked_.push_back({tensor.ptr(), name.is_none() ? nullptr : name.ptr(), view});
    return view;
  }

  // Fills in what is known of the tensors of one entry.
  void track(Entry& entry, Row& row, py::tuple names, py::tuple tensors) {
    entry.first = tracked_.size();
    const TensorView param = read(entry.param, py::none());
    if (!part_type(param, row.dtype) || !is_dense(param.dims, param.sizes, param.strides)) {
      throw std::invalid_argument("tensors: the parameter has a dtype or strides the kernels do not take");
    }
    if (names.size() != kSlots || tensors.size() != kSlots) {
      throw std::invalid_argument("tensors: expected a step counter, 3 states and master weights, None for none");
    }
    entry.dimensions = dimensions_.size();
    dimensions_.insert(dimensions_.end(), param.sizes, param.sizes + param.dims);
    dimensions_.insert(dimensions_.end(), param.strides, param.strides + param.dims);
    if (rows_.empty()) device_index_ = param.device_index;
    entry.is_complex = param.is_complex();
    row.param = param.begin();
    row.numel = param.numel() * (entry.is_complex ? 2 : 1);
    row.step = static_cast<float*>(read(tensors[0], names[0]).begin());
    row.state_dtype = row.dtype;
    for (size_t i = 1; i < kSlots; ++i) {
      if (tensors[i].is_none()) continue;
      const TensorView view = read(tensors[i], names[i]);
      if (!view.same_place(param) || !view.same_strides(param)) {
        throw std::invalid_argument("tensors: a state differs from its parameter");
      }
      if (i < kSlots - 1) {
        row.state[i - 1] = view.begin();
        if (!part_type(view, row.state_dtype)) throw std::invalid_argument("tensors: dtype of a state");
      } else {
        row.master = view.begin();
        row.master_kind = view.type_bits == 32 ? Master::full : Master::low_half;
      }
    }
    entry.count = tracked_.size() - entry.first;
  }

  TensorView param_view(const Entry& entry) const {
    TensorView view = tracked_[entry.first].view;
    view.sizes = dimensions_.data() + entry.dimensions;
    view.strides = view.sizes + view.dims;
    return view;
  }

  // A step comes after a forward and a backward pass, which have filled the caches with other things; what is read of
  // torch's objects below lies a few cache lines around these addresses.
  void prefetch(const Entry& entry) const {
    __builtin_prefetch(entry.own);
    for (size_t i = entry.first; i < entry.first + entry.count; ++i) {
      __builtin_prefetch(tracked_[i].tensor);
      const char* near = reinterpret_cast<const char*>(tracked_[i].view.sizes);
      __builtin_prefetch(near - 64);
      __builtin_prefetch(near);
      __builtin_prefetch(near + 64);
    }
  }

  bool same_groups(py::handle groups) const {
    if (static_cast<size_t>(PyList_GET_SIZE(groups.ptr())) != groups_.size()) return false;
    for (size_t g = 0; g < groups_.size(); ++g) {
      PyObject* params = PyDict_GetItemString(PyList_GET_ITEM(groups.ptr(), g), "params");
      if (!params || !PyList_Check(params)) return false;
      if (static_cast<size_t>(PyList_GET_SIZE(params)) != groups_[g].size()) return false;
      for (size_t i = 0; i < groups_[g].size(); ++i) {
        if (PyList_GET_ITEM(params, i) != groups_[g][i]) return false;
      }
    }
    return true;
  }

  bool same_state(py::handle state) const {
    if (!PyDict_Check(state.ptr()) || static_cast<size_t>(PyDict_GET_SIZE(state.ptr())) != state_.size()) return false;
    PyObject *key, *value;
    Py_ssize_t position = 0;
    for (size_t i = 0; PyDict_Next(state.ptr(), &position, &key, &value); ++i) {
      if (key != state_[i].first || value != state_[i].second) return false;
    }
    return true;
  }

  // Whether the parameter and its states are still the same objects on the same memory.
  bool same_tensors(const Entry& entry) const {
    const TensorView param = param_view(entry);
    for (size_t i = entry.first; i < entry.first + entry.count; ++i) {
      const Tracked& known = tracked_[i];
      TensorView view;
      if (known.name && PyDict_GetItemWithError(entry.own, known.name) != known.tensor) return false;
      if (!reader_.read(known.tensor, view) || view.begin() != known.view.begin()) return false;
      const bool step = i == entry.first + 1;  // on memory of our own, all else cannot change
      if (!step && (!view.same_place(param) || !view.same_dtype(known.view) || !view.same_strides(param))) return false;
    }
    return true;
  }

  // Puts the gradient into the row, if the kernel can take it as it is.
  bool use(const Entry& entry, PyObject* grad) {
    const TensorView param = param_view(entry);
    Row& row = rows_[entry.row];
    TensorView view;
    if (Py_TYPE(grad) != reader_.type() || !reader_.read(grad, view)) return false;
    if (!view.same_kind(param) || !view.same_strides(param)) return false;
    // Memory of zeros that does not exist; a gradient that is the parameter itself.
    if (row.numel > 0 && (!view.data || view.begin() == row.param)) return false;
    // A lazily negated tensor (the imaginary part of a conjugate) has strides of 2: only one element can hide that.
    if (row.numel == 1 && py::handle(grad).attr("is_neg")().cast<bool>()) return false;
    if (entry.is_complex) {  // a lazily conjugated one looks like any other
      for (const char* lazy : {"is_conj", "is_neg"}) {
        if (py::handle(grad).attr(lazy)().cast<bool>()) return false;
      }
    }
    row.grad = view.begin();
    row.active = true;
    return true;
  }

  void release() {
    for (PyObject*& grad : grads_) Py_CLEAR(grad);
    for (Row& row : rows_) row.active = false;
  }

  static constexpr size_t kAhead = 2;  // entries

  TensorReader reader_;
  PyObject* grad_name_;
  std::string backend_;
  StepFunction run_;
  GradFunctions grad_functions_;
  Rounding rounding_ = {};
  int32_t device_index_ = 0;
  std::unique_ptr<StepMemory> memory_;  // what run_ keeps
  std::vector<std::vector<PyObject*>> groups_;
  std::vector<std::pair<PyObject*, PyObject*>> state_;
  std::vector<Entry> entries_;
  std::vector<Tracked> tracked_;
  std::vector<int64_t> dimensions_;
  std::vector<Row> rows_;
  std::vector<PyObject*> grads_;  // by row
  std::vector<int64_t> sizes_;    // by row, what plan_ was made for
  ChunkPlan plan_;
};

}  // namespace

void bind_step_table(py::module_& m) {
  py::class_<StepTable>(m, "StepTable", "The tensors of an optimizer's step (csrc/optim/table.cpp).")
      .def(py::init<const std::string&, const std::string&, py::handle, py::tuple, py::dict, py::tuple, py::object>(),
           py::arg("kernel"), py::arg("backend"), py::arg("tensor_type"), py::arg("groups"), py::arg("state"),
           py::arg("entries"), py::arg("seed") = py::none())
      .def_property_readonly("rows", &StepTable::entry_of_row,
                             "The entry of each row, in the order of facts and norms.")
      .def("collect", &StepTable::collect, py::arg("groups"), py::arg("state"))
      .def("set_grad", &StepTable::set_grad, py::arg("index"), py::arg("grad"))
      .def("norm", &StepTable::norm, py::arg("out"), py::arg("grad_scale") = 0, py::arg("row_norms") = 0)
      .def("run", &StepTable::run, py::arg("hyper"), py::arg("scaling") = py::none(), py::arg("facts") = 0);
}

}  // namespace deepops::optim
