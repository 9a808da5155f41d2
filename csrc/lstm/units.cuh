// What the GPU kernels of lstm share: V neighbouring units of a row that a thread takes at once, where a row of the
// batch stands in its sequence, random masks.
#pragma once
#include "core/gpu.cuh"
// after gpu.cuh, which says for what the formulas are compiled
#include "lstm/lstm_math.h"

namespace deepops::isa_gpu::lstm {

using core::OpMath;

// ---- units ----------------------------------------------------------------------------------------------------------

// V units of a stream: of a pack on a 16-byte boundary, or one.
template <class T, int V>
struct Units {
  T value[V];
  DEEPOPS_DEVICE OpMath<T> at(int i) const { return gpu::widen(value[i]); }
  DEEPOPS_DEVICE void set(int i, OpMath<T> wide) { value[i] = gpu::narrow<T>(wide); }
};

template <int V, class T>
DEEPOPS_DEVICE Units<T, V> load(const T* p, gpu::Here here = DEEPOPS_HERE) {
  if constexpr (V == 1) {
    return {{gpu::load(p, here)}};
  } else {
    static_assert(V == gpu::Pack<T>::kSize);
    return __builtin_bit_cast(Units<T, V>, gpu::load_pack(p, here));
  }
}
// p[at], ...; zeros where there is no such stream.
template <int V, class T>
DEEPOPS_DEVICE Units<T, V> load_if(const T* p, int64_t at, gpu::Here here = DEEPOPS_HERE) {
  return p ? load<V>(p + at, here) : Units<T, V>{};
}
template <class T, int V>
DEEPOPS_DEVICE void store(T* p, const Units<T, V>& units, gpu::Here here = DEEPOPS_HERE) {
  if constexpr (V == 1) {
    gpu::store(p, units.value[0], here);
  } else {
    gpu::store_pack(p, __builtin_bit_cast(gpu::Pack<T>, units), here);
  }
}

// Sums that stay from step to step are of wider type than the data: of a chunk of V units they are kParts packs, which
// lie `size / kParts` apart in a row of `size`, so that neighbouring threads access neighbouring packs.
template <class A, int V>
struct Sums {
  static constexpr int kPack = V == 1 ? 1 : gpu::Pack<A>::kSize;
  static constexpr int kParts = V / kPack;
  // row: the first of its sums. They become term, or grow by it.
  DEEPOPS_DEVICE static void add(A* row, int size, int unit, bool adds, const A (&term)[V],
                                 gpu::Here here = DEEPOPS_HERE) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      A* const p = row + part * (size / kParts) + unit / kParts;
      Units<A, kPack> sum = load_if<kPack>(adds ? p : nullptr, 0, here);
#pragma unroll
      for (int i = 0; i < kPack; ++i) sum.value[i] += term[part * kPack + i];
      store(p, sum, here);
    }
  }
};
// Where the sum of a unit lies in its row.
DEEPOPS_DEVICE int place_of_sum(int unit, int size, int pack, int parts) {
  const int chunk = pack * parts, part = unit % chunk / pack;
  return part * (size / parts) + unit / chunk * pack + unit % pack;
}

// ---- rows -----------------------------------------------------------------------------------------------------------

// Where a row stands at a step.
struct RowState {
  bool runs;    // its sequence has this step
  bool starts;  // at its first step: the state before is h0, c0
  bool ends;    // at its last one: the state after is h_n, c_n
  bool empty;   // it has no steps
  bool before;  // its first step is next in the order of the backward, or was the last one
};

struct StepPlace {
  int batch, hidden, state;  // B, H, R
  int64_t steps, t;          // t: -1 or `steps` after the backward's last step
  bool reverse;
  const int64_t* lengths;  // [B] or null

  DEEPOPS_DEVICE RowState row(int b) const {
    int64_t length = lengths ? gpu::load(lengths + b) : steps;
    length = length < 0 ? 0 : length < steps ? length : steps;
    const int64_t first = reverse ? length - 1 : 0, last = reverse ? 0 : length - 1;
    const bool runs = t >= 0 && t < length;
    return {runs, runs && t == first, runs && t == last, length == 0, t == (reverse ? length : -1)};
  }
  // The first step of the loop, in either direction of it.
  DEEPOPS_DEVICE bool opens(bool backward) const { return t == (reverse == backward ? 0 : steps - 1); }
};

// ---- random masks ---------------------------------------------------------------------------------------------------

struct Draws {
  const int64_t* seed;                               // [1], or null: nothing is drawn
  uint32_t step;                                     // its number in the counter
  uint64_t zoneout_h, zoneout_c, recurrent_dropout;  // thresholds
  double scale;                                      // of what recurrent dropout keeps

  // Bit i: it happens to unit `column + i` of row `row`.
  template <int V>
  DEEPOPS_DEVICE unsigned bits(LstmStream stream, uint64_t threshold, int row, int column) const {
    if (!seed || threshold == 0) return 0;
    const uint64_t key = uint64_t(gpu::load(seed));
    unsigned bits = 0;
#pragma unroll 1
    for (int group = 0; group < (V + 3) / 4; ++group) {
      const LstmWords words = lstm_random_words(key, uint32_t(column / 4 + group), uint32_t(row), step, stream);
      unsigned four = 0;
#pragma unroll
      for (int w = 0; w < 4; ++w) four |= unsigned(lstm_happens(words.word[w], threshold)) << w;
      bits |= V >= 4 ? four << (4 * group) : four >> (column % 4) & ((1u << V) - 1);
    }
    return bits;
  }
};

// Values that lstm_zoneout() and lstm_dropped() take, from bit i.
template <class A>
DEEPOPS_DEVICE A stays(unsigned bits, int i) {
  return A(bits >> i & 1u);
}
template <class A>
DEEPOPS_DEVICE A kept(const Draws& draws, unsigned bits, int i) {
  return bits >> i & 1u ? A(0) : A(draws.scale);
}

// ---- blocks that take a row -----------------------------------------------------------------------------------------

inline constexpr int kRowThreads = 256;   // of a block that takes a row
inline constexpr int kFlatThreads = 128;  // of one that takes what comes: there are few units, and many processors

// Sums over the block, in all threads of it.
template <int n, class A>
DEEPOPS_DEVICE void block_totals(A (&value)[n]) {
  gpu::block_sum<kRowThreads>(value);
  DEEPOPS_SHARED(A, totals, n);
#pragma unroll
  for (int i = 0; i < n; ++i)
    if (gpu::thread() == 0) totals.store(i, value[i]);
  gpu::barrier();
#pragma unroll
  for (int i = 0; i < n; ++i) value[i] = totals.load(i);
}

}  // namespace deepops::isa_gpu::lstm
