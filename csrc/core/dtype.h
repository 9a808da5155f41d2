// Element types of the raw-pointer kernels. The kernels never include torch headers: an inline function of those,
// compiled for AVX-512, could be the copy the linker keeps for everybody.
#pragma once
#include <cstdint>

#include "core/host_device.h"

namespace deepops::core {

enum class DataType : int { f32, f64, f16, bf16 };

struct Half {  // IEEE binary16
  uint16_t bits;
};
struct BFloat16 {  // upper half of an IEEE binary32
  uint16_t bits;
};

// The type arithmetic is done in.
template <class T>
struct OpMathOf {
  using Type = float;
};
template <>
struct OpMathOf<double> {
  using Type = double;
};
template <class T>
using OpMath = typename OpMathOf<T>::Type;

DEEPOPS_HD constexpr int64_t size_of(DataType type) {
  return type == DataType::f64 ? 8 : type == DataType::f32 ? 4 : 2;
}

}  // namespace deepops::core

// Runs `...` (a lambda taking a type tag) with the C++ type of `data_type`: DEEPOPS_DISPATCH_DTYPE(t, [&]<class T>()
// {})
#define DEEPOPS_DISPATCH_DTYPE(data_type, ...)             \
  switch (data_type) {                                     \
    case ::deepops::core::DataType::f32:                   \
      (__VA_ARGS__).template operator()<float>();          \
      break;                                               \
    case ::deepops::core::DataType::f64:                   \
      (__VA_ARGS__).template operator()<double>();         \
      break;                                               \
    case ::deepops::core::DataType::f16:                   \
      (__VA_ARGS__).template operator()<core::Half>();     \
      break;                                               \
    case ::deepops::core::DataType::bf16:                  \
      (__VA_ARGS__).template operator()<core::BFloat16>(); \
      break;                                               \
  }
