// Adam on the CPU, compiled once per instruction set (cmake/CpuIsa.cmake).
#include "core/lanes.h"
#include "optim/adam.h"
#include "optim/adam_math.h"
#include "optim/step_kernel_cpu.h"

namespace deepops::DEEPOPS_ISA {

// By hand: GCC turns a loop over __builtin_fmaf into scalar instructions.
#if defined(__AVX512F__)
inline __m512 multiply_add_part(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
inline __m512d multiply_add_part(__m512d a, __m512d b, __m512d c) { return _mm512_fmadd_pd(a, b, c); }
#elif defined(__FMA__)
inline __m256 multiply_add_part(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
inline __m256d multiply_add_part(__m256d a, __m256d b, __m256d c) { return _mm256_fmadd_pd(a, b, c); }
#endif

#ifdef __FMA__
template <class S>
Lanes<S> fused_multiply_add(const Lanes<S>& a, const Lanes<S>& b, Lanes<S> c) {
  constexpr int kParts = Lanes<S>::kParts;
  DEEPOPS_FOR_PARTS(p) c.part[p] = multiply_add_part(a.part[p], b.part[p], c.part[p]);
  return c;
}
#endif

const optim::RuleKernels<optim::Adam> adam_kernels = make_kernels<optim::Adam>();

}  // namespace deepops::DEEPOPS_ISA
