// pybind11 module `_C`: what is not a tensor op and needs no torch. Tensor ops live in _ops.so (library.cpp).
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "batch_norm_act/arguments.h"
#include "core/memory_stats.h"
#include "optim/backends.h"
#include "optim/table.h"

namespace py = pybind11;

namespace {

const std::vector<std::string> kIsaNames = {"baseline", "avx2", "avx512"};  // by value of core::CpuIsa

// Functions that _ops.so exports (csrc/core/cpu_isa.h); _C has no link to it, because _C works without torch.
struct OpsLibrary {
  int (*cpu_isa)() = nullptr;
  int (*best_cpu_isa)() = nullptr;
  int (*set_cpu_isa)(int) = nullptr;
  long long (*parallel_regions)() = nullptr;
  deepops_memory_stats_result (*memory_stats)() = nullptr;
  void (*empty_cache)() = nullptr;
};
OpsLibrary ops;

template <class Function>
void find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  if (!function) throw std::runtime_error(std::string("_ops.so lacks the symbol ") + name);
}

// path: of a library that torch.ops.load_library() has loaded.
void* loaded(const std::string& path) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_NOLOAD);
  if (!library) throw std::runtime_error("not loaded: " + path);
  return library;
}

void attach_ops(const std::string& path) {
  void* library = loaded(path);
  find(library, "deepops_cpu_isa", ops.cpu_isa);
  find(library, "deepops_best_cpu_isa", ops.best_cpu_isa);
  find(library, "deepops_set_cpu_isa", ops.set_cpu_isa);
  find(library, "deepops_parallel_regions", ops.parallel_regions);
  find(library, "deepops_memory_stats", ops.memory_stats);
  find(library, "deepops_empty_cache", ops.empty_cache);
  deepops::optim::attach(library, "cpu");
}

void attach(const std::string& path, const std::string& backend) { deepops::optim::attach(loaded(path), backend); }

const OpsLibrary& attached() {
  if (!ops.cpu_isa) throw std::runtime_error("deepops: _ops.so is not loaded");
  return ops;
}

void set_cpu_isa(const std::string& name) {
  for (size_t isa = 0; isa < kIsaNames.size(); ++isa) {
    if (kIsaNames[isa] != name) continue;
    if (attached().set_cpu_isa(static_cast<int>(isa)) == 0) return;
    throw std::invalid_argument("isa: this machine has no '" + name + "'");
  }
  throw std::invalid_argument("isa: '" + name + "' is not one of baseline, avx2, avx512");
}

// The variants this machine can run, weakest first.
std::vector<std::string> cpu_isas() { return {kIsaNames.begin(), kIsaNames.begin() + attached().best_cpu_isa() + 1}; }

py::tuple memory_stats() {
  const deepops_memory_stats_result stats = attached().memory_stats();
  return py::make_tuple(stats.live, stats.kept, stats.mapped);
}

py::dict build_info() {
  py::dict info;
  info["version"] = DEEPOPS_VERSION;
  info["torch"] = DEEPOPS_TORCH_BUILD_VERSION;
  info["compiler"] = __VERSION__;
  info["build_type"] = DEEPOPS_BUILD_TYPE;
  info["cpu_isas"] = DEEPOPS_CPU_ISAS;
  info["cuda_archs"] = DEEPOPS_CUDA_ARCHS;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.def("build_info", &build_info, "Facts fixed when the binaries were built.");
  m.def("attach_ops", &attach_ops, py::arg("path"));
  m.def("attach", &attach, py::arg("path"), py::arg("backend"), "Take the steps of `backend` from this library.");
  m.def("cpu_isa", [] { return kIsaNames[attached().cpu_isa()]; }, "The instruction set the CPU kernels use now.");
  m.def("cpu_isas", &cpu_isas, "The instruction sets this machine can run, weakest first.");
  m.def("set_cpu_isa", &set_cpu_isa, py::arg("isa"), "Use this instruction set; for tests.");
  deepops::bind_batch_norm_act(m);
  deepops::optim::bind(m);
  m.def("memory_stats", &memory_stats,
        "Bytes in results, bytes kept for results to come, how often memory was mapped.");
  m.def("empty_cache", [] { attached().empty_cache(); }, "Give what is kept back to the system.");
  m.def("parallel_regions", [] { return attached().parallel_regions(); }, "Parallel regions entered so far.");
}
