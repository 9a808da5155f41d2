// What the CPU kernels of pointwise_bn_act for either layout share: activations with two slopes, panels, sums.
//
// Compiled once per instruction set; include it from kernel files only.
#pragma once
#include "pointwise_bn_act/tiles.h"
// after lanes.h, whose types the formulas are instantiated with
#include "batch_norm_act/batch_norm_act_math.h"

namespace deepops::DEEPOPS_ISA {

// ---- activations with two slopes ------------------------------------------------------------------------------------

// Where the slope is the flat one; elsewhere it is 1.
template <class V>
auto flat(const Relu&, const V& u) {
  return u <= V(0.0f);
}
template <class V>
auto flat(const Relu6&, const V& u) {
  return (u <= V(0.0f)) | (u >= V(6.0f));
}
template <class V>
auto flat(const LeakyRelu&, const V& u) {
  return u <= V(0.0f);
}
template <class Act, class V>
V flat_part(const Act&, const V&) {
  return V(0.0f);
}
template <class V>
V flat_part(const LeakyRelu& act, const V& g) {
  return g * constant<V>(act.negative_slope);
}
template <class Act>
inline constexpr bool kTwoSlopes = requires(const Act& act, Lanes<float> u) { flat(act, u); };
template <class Act>
inline constexpr bool kOneSlope = __is_same(Act, Identity);

// ---- panels ---------------------------------------------------------------------------------------------------------

// each.operator()<lanes>(first column) for panels of `slots` columns.
template <class S, class Each>
DEEPOPS_INLINE void for_panels(int64_t slots, const Each& each) {
  for (int64_t first = 0; first < slots; first += TileShape<S>::kColumns)
    with_lanes<TileShape<S>::kLanesAtOnce>((slots - first) / kLanes, [&]<int lanes>() __attribute__((always_inline)) {
      each.template operator()<lanes>(first);
    });
}

// ---- conversions ----------------------------------------------------------------------------------------------------

inline Lanes<float> to_lanes_of(const Lanes<float>& value, float) { return value; }
inline Lanes<double> to_lanes_of(const Lanes<double>& value, double) { return value; }
inline Lanes<double> to_lanes_of(const Lanes<float>& value, double) { return widen(value); }

inline Lanes<float> narrow(const Lanes<float>& value, float) { return value; }
inline Lanes<double> narrow(const Lanes<double>& value, double) { return value; }
inline Lanes<float> narrow(const Lanes<double>& value, float) {
  Lanes<float> result;
  for (int lane = 0; lane < kLanes; ++lane) result.set(lane, float(value[lane]));
  return result;
}

// ---- sums -----------------------------------------------------------------------------------------------------------

// The `size` sums of an item, 0.
inline double* clear(double* all, int64_t item, int64_t size) {
  double* const sums = all + item * size;
  for (int64_t i = 0; i < size; ++i) sums[i] = 0;
  return sums;
}

template <class S>
void add_to(double* sums, const Lanes<S>& terms) {
  store_lanes(sums, load_lanes(sums) + widen(terms));
}

template <class S>
Lanes<S> zero(int, int) {
  return Lanes<S>(S(0));
}

// sums [1 + slots][slots] += those of `rows` rows of `block` [rows][slots], and of the products of each pair of
// columns. A pair comes once: columns from c on, and those of the same lanes.
inline void add_moments(const double* block, int64_t slots, int64_t rows, double* sums) {
  constexpr int64_t kRows = TileShape<double>::kRows;
  for (int64_t column = 0; column < slots; column += kLanes) {
    Lanes<double> sum = load_lanes(sums + column);
    for (int64_t t = 0; t < rows; ++t) sum += load_lanes(block + t * slots + column);
    store_lanes(sums + column, sum);
    for (int64_t c = 0; c < column + kLanes; c += kRows) {
      double* const to = sums + (1 + c) * slots + column;
      multiply_tile<double, 1, true>(
          block + c, slots, block + column, slots, kLanes, rows, [&](int r, int) { return load_lanes(to + r * slots); },
          [&](int r, int, const Lanes<double>& value) { store_lanes(to + r * slots, value); });
    }
  }
}

// ---- run-time choices to template arguments -------------------------------------------------------------------------

template <class Call>
void with_type(const PointwiseProblem& p, const Call& call) {
  p.dtype == core::DataType::f64 ? call.template operator()<double>() : call.template operator()<float>();
}

}  // namespace deepops::DEEPOPS_ISA
