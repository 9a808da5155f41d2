#include "optim/backends.h"

#include <dlfcn.h>

#include <map>
#include <stdexcept>
#include <utility>

namespace deepops::optim {
namespace {

const char* const kKernels[] = {"adam", "sgd", "rmsprop"};
const std::string kCpu = "cpu";

std::map<std::pair<std::string, std::string>, StepFunction> step_functions;  // by kernel and backend
std::map<std::string, GradFunctions> grad_functions;                         // by backend

template <class Function>
void find(void* library, const std::string& name, const std::string& backend, Function& function) {
  const std::string symbol = "deepops_" + name + (backend == kCpu ? "" : "_cuda");
  function = reinterpret_cast<Function>(dlsym(library, symbol.c_str()));
  if (!function) throw std::runtime_error("the library for '" + backend + "' lacks the symbol " + symbol);
}

}  // namespace

void attach(void* library, const std::string& backend) {
  for (const std::string kernel : kKernels) {
    find(library, kernel + "_step", backend, step_functions[{kernel, backend}]);
  }
  GradFunctions& grads = grad_functions[backend];
  find(library, "grad_norm", backend, grads.norm);
  find(library, "grad_clip", backend, grads.clip);
}

bool has_backend(const std::string& backend) { return grad_functions.count(backend) != 0; }

StepFunction find_step(const std::string& kernel, const std::string& backend) {
  const auto found = step_functions.find({kernel, backend});
  if (found == step_functions.end()) {
    throw std::invalid_argument("kernel: there is no '" + kernel + "' for '" + backend + "'");
  }
  return found->second;
}

GradFunctions find_grad_functions(const std::string& backend) {
  const auto found = grad_functions.find(backend);
  if (found == grad_functions.end()) throw std::invalid_argument("backend: there are no kernels for '" + backend + "'");
  return found->second;
}

ChunkPlan plan_for(const std::vector<int64_t>& sizes, const std::string& backend) {
  return ChunkPlan(sizes, backend == kCpu ? kCpuChunk : gpu_chunk(sizes));
}

}  // namespace deepops::optim
