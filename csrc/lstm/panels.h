// Sizes of weights packed into panels of 64 columns (packed_product.h), for those who allocate them too.
#pragma once
#include <cstdint>

namespace deepops {

inline constexpr int kPanelColumns = 64, kPanelUnits = kPanelColumns / 4;

constexpr int64_t panels_of(int64_t columns) { return (columns + kPanelColumns - 1) / kPanelColumns; }
constexpr int64_t unit_blocks_of(int64_t hidden) { return (hidden + kPanelUnits - 1) / kPanelUnits; }

}  // namespace deepops
