// Sums of squares and scaling of gradients, compiled once per instruction set (cmake/CpuIsa.cmake).
#include "core/lanes.h"
#include "optim/grad_norm.h"

namespace deepops::DEEPOPS_ISA {
namespace {

// Each of 16 lanes is a sum in double; products of fp32 numbers are exact there.
template <class T>
optim::GradSquares squares_of(const T* g, int64_t n) {
  Lanes<double> squares(0.0), bad(0.0);
  const auto add = [&](const T* p) {
    const Lanes<double> x = widen(load_lanes(p));
    squares += x * x;
    bad += select((x - x) >= Lanes<double>(0.0), Lanes<double>(0.0), Lanes<double>(1.0));
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) add(g + i);
  if (i < n) {
    T tail[kLanes] = {};
    __builtin_memcpy(tail, g + i, size_t(n - i) * sizeof(T));
    add(tail);
  }
  return {sum_of_lanes(squares), sum_of_lanes(bad)};
}

template <class T>
void multiply(T* g, int64_t n, core::OpMath<T> factor) {
  using V = Lanes<core::OpMath<T>>;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store_lanes(g + i, V(load_lanes(g + i)) * V(factor));
  for (; i < n; ++i) store(g + i, load(g + i) * factor);
}

}  // namespace

optim::GradSquares grad_squares(const void* grad, core::DataType dtype, int64_t n) {
  optim::GradSquares result = {};
  DEEPOPS_DISPATCH_DTYPE(dtype, [&]<class T>() { result = squares_of(static_cast<const T*>(grad), n); })
  return result;
}

void grad_multiply(void* grad, core::DataType dtype, int64_t n, double factor) {
  DEEPOPS_DISPATCH_DTYPE(dtype, [&]<class T>() { multiply(static_cast<T*>(grad), n, core::OpMath<T>(factor)); })
}

}  // namespace deepops::DEEPOPS_ISA
