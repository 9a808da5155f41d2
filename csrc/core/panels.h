// Sizes of weights packed into panels of 64 columns (packed_product.h), for those who allocate them too.
#pragma once
#include <cstdint>

namespace deepops {

inline constexpr int kPanelColumns = 64;

constexpr int64_t panels_of(int64_t columns) { return (columns + kPanelColumns - 1) / kPanelColumns; }

}  // namespace deepops
