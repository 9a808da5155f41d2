// Sizes of packed weights of gates: in a panel of 64 columns (core/packed_product.h) lie 16 hidden units, with their
// columns of i, f, g and o side by side, so that the sums of a row are all that the gate arithmetic of these units
// needs.
#pragma once
#include "core/panels.h"

namespace deepops {

inline constexpr int kPanelUnits = kPanelColumns / 4;

constexpr int64_t unit_blocks_of(int64_t hidden) { return (hidden + kPanelUnits - 1) / kPanelUnits; }

}  // namespace deepops
