// Sums of squares and scaling of gradients, compiled once per instruction set (cmake/CpuIsa.cmake).
#include "core/lanes.h"
#include "optim/squares_cpu.h"

namespace deepops::DEEPOPS_ISA {
namespace {

template <class T>
optim::GradSquares squares_of(const T* g, int64_t n) {
  SquaresInLanes squares;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) squares.add(widen(load_lanes(g + i)));
  if (i < n) {
    T tail[kLanes] = {};
    __builtin_memcpy(tail, g + i, size_t(n - i) * sizeof(T));
    squares.add(widen(load_lanes(tail)));
  }
  return squares.sum();
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
