#include "core/cpu_isa.h"

#include <atomic>

#include "core/parallel.h"

namespace deepops::core {

std::atomic<long long> parallel_regions{0};

CpuIsa best_cpu_isa() {
#ifdef DEEPOPS_HAVE_X86_VARIANTS
  static const CpuIsa best = [] {
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return avx512 ? CpuIsa::avx512 : avx2 ? CpuIsa::avx2 : CpuIsa::baseline;
  }();
  return best;
#else
  return CpuIsa::baseline;
#endif
}

namespace {
std::atomic<CpuIsa>& current() {
  static std::atomic<CpuIsa> isa{best_cpu_isa()};
  return isa;
}
}  // namespace

CpuIsa cpu_isa() { return current().load(std::memory_order_relaxed); }

}  // namespace deepops::core

int deepops_cpu_isa() { return static_cast<int>(deepops::core::cpu_isa()); }

int deepops_best_cpu_isa() { return static_cast<int>(deepops::core::best_cpu_isa()); }

int deepops_set_cpu_isa(int isa) {
  if (isa < 0 || isa > deepops_best_cpu_isa()) return -1;
  deepops::core::current().store(static_cast<deepops::core::CpuIsa>(isa), std::memory_order_relaxed);
  return 0;
}

long long deepops_parallel_regions() { return deepops::core::parallel_regions.load(std::memory_order_relaxed); }
