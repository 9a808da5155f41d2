// How the CPU kernels of batch_norm_act walk through a tensor: loads by type, per-channel numbers, the planar view and
// the rows view (geometry: batch_norm_act.h). What is computed at each place comes as an argument.
//
// Compiled once per instruction set; include it from kernel files only.
#pragma once
#include "batch_norm_act/batch_norm_act.h"
#include "core/lanes.h"
// after lanes.h, whose types the formulas are instantiated with
#include "batch_norm_act/batch_norm_act_math.h"

namespace deepops::DEEPOPS_ISA {

using Problem = BatchNormActProblem;
using Forward = BatchNormActForward;
using Backward = BatchNormActBackward;

// Each walk is a function of its own, so that the compiler spends its whole budget for inlining on one loop.
#define DEEPOPS_WALK __attribute__((noinline))
#define DEEPOPS_INLINE __attribute__((always_inline)) inline

inline constexpr int kChannelsAtOnce = 16;  // neighbouring planes that a reduction takes together
// Vectors side by side in the rows view of a reduction: as many as the registers hold, numbers and sums together.
inline constexpr int kReductionTiles = kVectorBytes == 64 ? 4 : 2;
inline constexpr int64_t kRowsAhead = 8;  // that a reduction of the rows view fetches

// ---- one value or 16 of them under one name -------------------------------------------------------------------------

template <class V>
struct Access {  // V = float or double
  template <class T>
  static V load(const T* p) {
    return DEEPOPS_ISA::load(p);
  }
  template <class T>
  static void store(T* p, const V& value) {
    DEEPOPS_ISA::store(p, value);
  }
};
template <class S>
struct Access<Lanes<S>> {
  template <class T>
  static Lanes<S> load(const T* p) {
    if constexpr (sizeof(S) > sizeof(core::OpMath<T>)) {
      return widen(load_lanes(p));
    } else {
      return load_lanes(p);
    }
  }
  template <class T>
  static void store(T* p, const Lanes<S>& value) {
    store_lanes(p, value);
  }
};

// A result of an elementwise pass. stream: past the caches, see batch_norm_act.h; single values stay where they are.
template <class T, class V>
void put(T* p, const V& value, bool stream) {
  if constexpr (__is_same(V, Lanes<T>)) {
    if (stream) return stream_lanes(p, value);
  }
  Access<V>::store(p, value);
}

template <class V>
V load_at(const void* base, int64_t index) {  // one per-channel number, or those of 16 columns
  return Access<V>::load(static_cast<const typename ScalarOf<V>::Type*>(base) + index);
}

// The mean of samples spread over each channel. Any finite value would be correct; one near the mean is accurate.
template <class T>
void sample(const Problem& p, const T* x, int64_t begin, int64_t end, double* shift) {
  for (int64_t c = begin; c < end; ++c) shift[c - begin] = 0;
  for (int64_t s = 0; s < p.samples; ++s) {
    const T* first = x + p.sample_offset[s];
    for (int64_t c = begin; c < end; ++c) shift[c - begin] += load(first + c * p.next_channel);
  }
  for (int64_t c = begin; c < end; ++c) {
    const double wide = shift[c - begin] / double(p.samples);
    T rounded;  // on the grid of the data, differences have few bits: rounding errors of equal values do not add up
    store(&rounded, core::OpMath<T>(wide));
    const double mean = p.exact ? wide : double(load(&rounded));
    shift[c - begin] = mean - mean == 0 ? mean : 0;  // not finite: any value does
  }
}

// Per-channel numbers of a pass: V = S for one channel, V = Lanes<S> for 16 columns, or one channel in all lanes.
template <class V>
struct Shift {
  V near;
  template <class Args>
  static Shift at(const Args& args, int64_t index) {
    return {load_at<V>(args.shift, index)};
  }
};

template <class V>
struct Affine {
  V mean, scale, bias;
  template <class Args>
  static Affine at(const Args& args, int64_t index) {
    return {load_at<V>(args.mean, index), load_at<V>(args.scale, index), load_at<V>(args.bias, index)};
  }
  V centered(const V& x) const { return x - mean; }
  V operator()(const V& x) const { return (x - mean) * scale + bias; }
};

template <class V>
struct InputGrad {
  Affine<V> affine;
  V mean_grad, slope_grad;
  static InputGrad at(const Backward& args, int64_t index) {
    return {Affine<V>::at(args, index), load_at<V>(args.mean_grad, index), load_at<V>(args.slope_grad, index)};
  }
};

template <class S>
Shift<Lanes<S>> broadcast(const Shift<S>& one) {
  return {Lanes<S>(one.near)};
}
template <class S>
Affine<Lanes<S>> broadcast(const Affine<S>& one) {
  return {Lanes<S>(one.mean), Lanes<S>(one.scale), Lanes<S>(one.bias)};
}
template <class S>
InputGrad<Lanes<S>> broadcast(const InputGrad<S>& one) {
  return {broadcast(one.affine), Lanes<S>(one.mean_grad), Lanes<S>(one.slope_grad)};
}

// ---- walking the planar view ----------------------------------------------------------------------------------------

inline int64_t plane_offset(const Problem& p, int64_t n, int64_t channel) {
  return (n * p.channels + channel) * p.inner;
}

// Two running sums of one channel: terms go to lanes of S, those after p.flush of them to lanes of double.
template <class S>
struct PlaneSums {
  Lanes<S> a = S(0), b = S(0);
  Lanes<double> wide_a = 0.0, wide_b = 0.0;
  int64_t terms = 0;

  void flush() {
    wide_a += widen(a);
    wide_b += widen(b);
    a = b = S(0);
    terms = 0;
  }
};

// Adds the two sums of one plane. add(numbers, offset, a, b) adds the two terms of 16 values. The last vector of a
// plane overlaps the one before it: there only the lanes that are `fresh` count. The plane `ahead` of this one is
// fetched meanwhile: it lies where the hardware does not look for it.
template <class S, class Numbers, class Add>
DEEPOPS_INLINE void sum_plane(const Problem& p, int64_t start, int64_t ahead, const Numbers& numbers, const Add& add,
                              const typename Lanes<S>::Mask& fresh, PlaneSums<S>& sums) {
  const int64_t whole = p.inner / kLanes * kLanes;
  for (int64_t i = 0; i < whole;) {
    if (sums.terms >= p.flush) sums.flush();
    const int64_t room = i + (p.flush - sums.terms) * kLanes, stop = room < whole ? room : whole;
    sums.terms += (stop - i) / kLanes;
    Lanes<S> a = sums.a, b = sums.b;
    for (; i < stop; i += kLanes) {
      add.fetch(start + i + ahead);
      add(numbers, start + i, a, b);
    }
    sums.a = a;
    sums.b = b;
  }
  if (whole == p.inner) return;
  Lanes<S> a(S(0)), b(S(0));
  add(numbers, start + p.inner - kLanes, a, b);
  sums.a += select(fresh, a, Lanes<S>(S(0)));
  sums.b += select(fresh, b, Lanes<S>(S(0)));
  ++sums.terms;
}

// Work items are channels, or pieces of channels. Several channels go together, sample by sample: their planes are
// neighbours in memory.
template <class S, template <class> class Numbers, class Args, class Add>
DEEPOPS_WALK void sum_planes(const Problem& p, const Args& args, int64_t begin, int64_t end, const Add& add) {
  const auto fresh = lane_numbers<S>() >= Lanes<S>(S(kLanes - p.inner % kLanes));
  const int64_t group = p.pieces == 1 ? kChannelsAtOnce : 1;
  for (int64_t item = begin; item < end; item += group) {
    const int64_t count = end - item < group ? end - item : group, piece = item % p.pieces, channel = item / p.pieces;
    const int64_t first = piece * p.batch / p.pieces, last = (piece + 1) * p.batch / p.pieces;
    PlaneSums<S> sums[kChannelsAtOnce];
    for (int64_t n = first; n < last; ++n) {
      // The same channel of the next sample, or of the next channels' first sample.
      const int64_t ahead =
          n + 1 < last ? p.channels * p.inner : plane_offset(p, first, channel + count) - plane_offset(p, n, channel);
      for (int64_t k = 0; k < count; ++k) {
        const auto numbers = broadcast(Numbers<S>::at(args, channel + k));
        sum_plane<S>(p, plane_offset(p, n, channel + k), ahead, numbers, add, fresh, sums[k]);
      }
    }
    for (int64_t k = 0; k < count; ++k) {
      sums[k].flush();
      args.sums[2 * (item + k)] = sum_of_lanes(sums[k].wide_a);
      args.sums[2 * (item + k) + 1] = sum_of_lanes(sums[k].wide_b);
    }
  }
}

// each(numbers, offset) handles 16 values of a plane. The last vector overlaps the one before it and writes the same.
//
// Work items are planes, channel by channel; whole channels go sample by sample, as above. From the last to the first:
// what the pass before this one touched last is still in the cache.
template <class S, template <class> class Numbers, class Args, class Each>
DEEPOPS_WALK void for_planes(const Problem& p, const Args& args, int64_t begin, int64_t end, const Each& each_) {
  const Each each = each_;  // a copy that no store can alias, so that it stays in registers; as the next line
  const int64_t batch = p.batch, channels = p.channels, inner = p.inner;
  const auto plane = [&](int64_t n, int64_t channel) __attribute__((always_inline)) {
    const auto numbers = broadcast(Numbers<S>::at(args, channel));
    const int64_t start = (n * channels + channel) * inner, last = start + inner - kLanes;
    for (int64_t i = start; i < last + kLanes; i += kLanes) each(numbers, i < last ? i : last);
  };
  if (begin % batch == 0 && end % batch == 0) {
    for (int64_t n = batch - 1; n >= 0; --n)
      for (int64_t channel = begin / batch; channel < end / batch; ++channel) plane(n, channel);
  } else {
    for (int64_t item = end - 1; item >= begin; --item) plane(item % batch, item / batch);
  }
}

// ---- walking the rows view ------------------------------------------------------------------------------------------

struct RowPiece {
  int64_t first, last;  // rows
};
inline RowPiece row_piece(const Problem& p, int64_t item) {
  const int64_t first = item * p.rows_per_piece, last = first + p.rows_per_piece;
  return {first, last < p.rows ? last : p.rows};
}

// Rows go in small groups, columns in tiles of a few vectors, so that the numbers of a tile stay in registers.
// tile<tiles>(row, count, column) handles one of them.
template <int tiles, class Tile>
DEEPOPS_INLINE void for_tiles(const Problem& p, int64_t row, int64_t last, int64_t group, const Tile& tile) {
  for (; row < last; row += group) {
    const int64_t count = last - row < group ? last - row : group;
    int64_t column = 0;
    for (; column + tiles * kLanes <= p.columns; column += tiles * kLanes)
      tile.template operator()<tiles>(row, count, column);
    for (; column < p.columns; column += kLanes) tile.template operator()<1>(row, count, column);
  }
}

template <class S, int tiles, template <class> class Numbers, class Args>
void load_numbers(const Args& args, int64_t column, Numbers<Lanes<S>> (&numbers)[tiles]) {
  for (int t = 0; t < tiles; ++t) numbers[t] = Numbers<Lanes<S>>::at(args, column + t * kLanes);
}

template <class S, int tiles, template <class> class Numbers, class Args, class Add>
DEEPOPS_WALK void sum_rows(const Problem& p, const Args& args, int64_t begin, int64_t end, const Add& add) {
  for (int64_t item = begin; item < end; ++item) {
    double* sums = args.sums + item * 2 * p.columns;
    for (int64_t j = 0; j < 2 * p.columns; ++j) sums[j] = 0;
    if (item == p.pieces) {  // the incomplete row, value by value
      for (int64_t j = 0; j < p.tail; ++j) {
        S a = 0, b = 0;
        add(Numbers<S>::at(args, j), p.rows * p.columns + j, a, b);
        sums[j] = a;
        sums[j + p.columns] = b;
      }
      continue;
    }
    const RowPiece piece = row_piece(p, item);
    for_tiles<tiles>(p, piece.first, piece.last, p.flush,
                     [&]<int width>(int64_t row, int64_t count, int64_t column) __attribute__((always_inline)) {
                       Lanes<S> a[width], b[width];
                       Numbers<Lanes<S>> numbers[width];
                       load_numbers<S>(args, column, numbers);
                       for (int t = 0; t < width; ++t) a[t] = b[t] = Lanes<S>(S(0));
                       // Fetched ahead: the same columns some rows on, at the end the first rows of the next tile.
                       const bool last_tile = column + width * kLanes >= p.columns;
                       const int64_t wrap = last_tile ? -column : width * kLanes - count * p.columns;
                       for (int64_t r = row; r < row + count; ++r) {
                         const int64_t ahead = kRowsAhead * p.columns + (r + kRowsAhead < row + count ? 0 : wrap);
                         _Pragma("GCC unroll 8") for (int t = 0; t < width; ++t) {
                           const int64_t i = r * p.columns + column + t * kLanes;
                           add.fetch(i + ahead);
                           add(numbers[t], i, a[t], b[t]);
                         }
                       }
                       for (int t = 0; t < width; ++t) {
                         double *sum_a = sums + column + t * kLanes, *sum_b = sum_a + p.columns;
                         store_lanes(sum_a, load_lanes(sum_a) + widen(a[t]));
                         store_lanes(sum_b, load_lanes(sum_b) + widen(b[t]));
                       }
                     });
  }
}

template <class S, template <class> class Numbers, class Args, class Each>
DEEPOPS_WALK void for_rows(const Problem& p, const Args& args, int64_t begin, int64_t end, const Each& each_) {
  const Each each = each_;  // see for_planes
  const int64_t columns = p.columns;
  for (int64_t item = end - 1; item >= begin; --item) {  // backwards: see for_planes
    if (item == p.pieces) {
      for (int64_t j = 0; j < p.tail; ++j) each(Numbers<S>::at(args, j), p.rows * columns + j);
      continue;
    }
    const RowPiece piece = row_piece(p, item);
    for (int64_t row = piece.first, stop; row < piece.last; row = stop) {
      stop = row + p.rows_at_once < piece.last ? row + p.rows_at_once : piece.last;
      int64_t column = 0;
      for (; column + 2 * kLanes <= columns; column += 2 * kLanes) {  // two vectors side by side: more hinder fetching
        const auto left = Numbers<Lanes<S>>::at(args, column), right = Numbers<Lanes<S>>::at(args, column + kLanes);
        for (int64_t i = row * columns + column; i < stop * columns; i += columns) {
          each(left, i);
          each(right, i + kLanes);
        }
      }
      if (column == columns) continue;
      const auto numbers = Numbers<Lanes<S>>::at(args, column);
      for (int64_t i = row * columns + column; i < stop * columns; i += columns) each(numbers, i);
    }
  }
}

// The same over whichever view the problem has.
template <class S, int tiles, template <class> class Numbers, class Args, class Add>
void sum(const Problem& p, const Args& args, int64_t begin, int64_t end, const Add& add) {
  p.planar ? sum_planes<S, Numbers>(p, args, begin, end, add) : sum_rows<S, tiles, Numbers>(p, args, begin, end, add);
}
template <class S, template <class> class Numbers, class Args, class Each>
void for_all(const Problem& p, const Args& args, int64_t begin, int64_t end, const Each& each) {
  p.planar ? for_planes<S, Numbers>(p, args, begin, end, each) : for_rows<S, Numbers>(p, args, begin, end, each);
}

}  // namespace deepops::DEEPOPS_ISA
