// Packing of the weights of gates.
//
// Compiled once per instruction set; include it from kernel files only.
#pragma once
#include "core/packed_product.h"
#include "lstm/panels.h"

namespace deepops::DEEPOPS_ISA {

inline constexpr int kGates = kPanelLanes;
static_assert(kPanelUnits == kLanes);

// weight [4 * hidden, size], rows from `row` on of all `rows` of the panels: packed [unit blocks][rows][4][16]. Two
// weights can lie one below the other, as if their inputs were one. Units beyond the last are 0.
template <class T, class S>
void pack_gates(const T* weight, int64_t hidden, int64_t size, S* packed, int64_t row, int64_t rows) {
  for (int64_t unit = 0; unit < hidden; unit += kLanes)
    for (int64_t gate = 0; gate < kGates; ++gate) {
      S* const to = packed + unit * kGates * rows + row * kPanel + gate * kLanes;
      const int64_t valid = hidden - unit < kLanes ? hidden - unit : kLanes;
      for (int64_t k = 0; valid < kLanes && k < size; ++k) store_lanes(to + k * kPanel, Lanes<S>(S(0)));
      transpose(weight + (gate * hidden + unit) * size, size, valid, size, to, int64_t(kPanel));
    }
}

}  // namespace deepops::DEEPOPS_ISA
