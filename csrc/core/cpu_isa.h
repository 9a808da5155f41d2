// Instruction sets of the CPU kernels: which variants were compiled, which the machine has, which one is used.
//
// A kernel file is compiled once per variant (cmake/CpuIsa.cmake) into its own namespace. Callers pick with
//   const auto& kernels = core::choose(isa_baseline::f, isa_avx2::f, isa_avx512::f);
// or, shorter, DEEPOPS_CHOOSE_ISA(f).
#pragma once

namespace deepops::core {

enum class CpuIsa : int { baseline = 0, avx2 = 1, avx512 = 2 };

// The variant in use: the best this machine has, unless overridden.
CpuIsa cpu_isa();
// The best this machine has.
CpuIsa best_cpu_isa();

template <class T>
T choose(T baseline, [[maybe_unused]] T avx2, [[maybe_unused]] T avx512) {
  switch (cpu_isa()) {
    case CpuIsa::avx512:
      return avx512;
    case CpuIsa::avx2:
      return avx2;
    default:
      return baseline;
  }
}

}  // namespace deepops::core

#ifdef DEEPOPS_HAVE_X86_VARIANTS
#define DEEPOPS_CHOOSE_ISA(name) ::deepops::core::choose(&isa_baseline::name, &isa_avx2::name, &isa_avx512::name)
// Declares the same function in the namespace of every variant.
#define DEEPOPS_DECLARE_FOR_EACH_ISA(declaration) \
  namespace isa_baseline {                        \
  declaration                                     \
  }                                               \
  namespace isa_avx2 {                            \
  declaration                                     \
  }                                               \
  namespace isa_avx512 {                          \
  declaration                                     \
  }
#else
#define DEEPOPS_CHOOSE_ISA(name) (&isa_baseline::name)
#define DEEPOPS_DECLARE_FOR_EACH_ISA(declaration) \
  namespace isa_baseline {                        \
  declaration                                     \
  }
#endif

// Exported for `_C` (csrc/module.cpp), which finds them by name in the loaded _ops.so.
extern "C" {
__attribute__((visibility("default"))) int deepops_cpu_isa();
__attribute__((visibility("default"))) int deepops_best_cpu_isa();
// Returns 0, or -1 (and changes nothing) when this machine lacks it.
__attribute__((visibility("default"))) int deepops_set_cpu_isa(int isa);
// Parallel regions entered so far by deepops ops in this process: what tests count instead of timing.
__attribute__((visibility("default"))) long long deepops_parallel_regions();
}
