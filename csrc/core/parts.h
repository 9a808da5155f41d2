// Parts of lanes: what stands at the end of a row.
//
// Compiled once per instruction set; include it from kernel files only.
#pragma once
#include "core/lanes.h"

namespace deepops::DEEPOPS_ISA {

template <class T>
using LanesOf = Lanes<core::OpMath<T>>;

// The first `count` of 16 values, 0 beyond.
template <class T>
LanesOf<T> load_part(const T* p, int64_t count) {
  if (count >= kLanes) return load_lanes(p);
  T values[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) values[i] = p[i];
  return load_lanes(values);
}

template <class T>
void store_part(T* p, const LanesOf<T>& value, int64_t count) {
  if (count >= kLanes) return store_lanes(p, value);
  T values[kLanes];
  store_lanes(values, value);
  for (int64_t i = 0; i < count; ++i) p[i] = values[i];
}

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace deepops::DEEPOPS_ISA
