// CPU kernels of pointwise_bn_act for channels_last; compiled once per instruction set, raw pointers only.
//
//   moments    sums of x - shift and of its products, in double from the start
//   forward    y = act((x - center) W'^T + b')
//   backward   g = grad_y act'(..), a panel at a time; from it sum g, P = (x - center)^T g and g W'
//   finish     grad_x = g W' - constant - (x - center) slope
//
// A pass goes through the rows of its items block by block: 24 rows of x, centred and padded, stay in the first-level
// cache, and so does the panel of g that comes from them. Sums in single precision are those of one block.
#include "pointwise_bn_act/pointwise_bn_act.h"

#include "pointwise_bn_act/blocks.h"

namespace deepops::DEEPOPS_ISA {
namespace {

using Problem = PointwiseProblem;
using Arguments = PointwiseArguments;
constexpr int64_t kBlock = Problem::kBlock;
static_assert(kLanes == Problem::kLanes);

// ---- the walk -------------------------------------------------------------------------------------------------------

// each(first row, rows) for the blocks of an item.
template <class Each>
DEEPOPS_INLINE void for_blocks(const Problem& p, int64_t item, const Each& each) {
  for (int64_t row = p.first_row(item), last = p.first_row(item + 1); row < last; row += kBlock)
    each(row, least(kBlock, last - row));
}

// x - center of a block, in type A, as [24][input slots]; what there is none of is 0.
template <class S, class A>
void load_block(const Problem& p, const void* x, const A* center, int64_t row, int64_t count, A* block) {
  const S* from = static_cast<const S*>(x) + row * p.inputs;
  for (int64_t t = 0; t < kBlock; ++t, from += p.inputs)
    for (int64_t c = 0; c < p.inputs; c += kLanes, block += kLanes) {
      const Lanes<A> value =
          t < count ? to_lanes_of(load_part(from + c, p.inputs - c), A()) - load_lanes(center + c) : Lanes<A>(A(0));
      store_lanes(block, value);
    }
}

// ---- the passes -----------------------------------------------------------------------------------------------------

template <class S>
void moments(const Problem& p, const Arguments& args, void* workspace, int64_t begin, int64_t end) {
  double* const block = static_cast<double*>(workspace);
  for (int64_t item = begin; item < end; ++item) {
    double* const sums = clear(args.moments, item, p.moments_of_item());
    for_blocks(p, item, [&](int64_t row, int64_t count) {
      load_block<S, double>(p, args.x, args.shift, row, count, block);
      add_moments(block, p.input_slots(), kBlock, sums);
    });
  }
}

template <class S, class Act>
void forward(const Problem& p, const Arguments& args, void* workspace, int64_t begin, int64_t end, const Act& act) {
  constexpr int64_t kRows = TileShape<S>::kRows;
  const int64_t slots = p.input_slots(), words = p.bits_per_row();
  S* const block = static_cast<S*>(workspace);
  const S* const bias = static_cast<const S*>(args.bias);
  const auto panel = [&]<int lanes>(int64_t row, int64_t count, int64_t first) __attribute__((always_inline)) {
    const S* const weight = static_cast<const S*>(args.forward_weight) + first * p.inputs;
    for (int64_t top = 0; top < count; top += kRows) {
      S* const y = static_cast<S*>(args.y) + (row + top) * p.channels + first;
      uint16_t* const bits = args.bits ? args.bits + (row + top) * words + first / kLanes : nullptr;
      multiply_tile<S, lanes, false>(block + top * slots, slots, weight, kLanes, p.inputs * kLanes, p.inputs, zero<S>,
                                     [&](int r, int j, const Lanes<S>& sum) __attribute__((always_inline)) {
                                       if (top + r >= count) return;
                                       const Lanes<S> u = sum + load_lanes(bias + first + j * kLanes);
                                       S* const to = y + r * p.channels + j * kLanes;
                                       if (args.stream) {
                                         stream_lanes(to, act.forward(u));
                                       } else {
                                         store_part(to, act.forward(u), p.channels - first - j * kLanes);
                                       }
                                       if constexpr (kTwoSlopes<Act>)
                                         if (bits) bits[r * words + j] = bits_of<S>(flat(act, u));
                                     });
    }
  };
  for (int64_t item = begin; item < end; ++item)
    for_blocks(p, item, [&](int64_t row, int64_t count) {
      load_block<S, S>(p, args.x, static_cast<const S*>(args.center), row, count, block);
      for_panels<S>(p.slots(), [&]<int lanes>(int64_t first) __attribute__((always_inline)) {
        panel.template operator()<lanes>(row, count, first);
      });
    });
  if (args.stream) finish_streaming();
}

// What the backward works on: a block of rows, a panel of columns.
template <class S>
struct Piece {
  int64_t row, count, first;
  const S* block;  // x - center, [24][input slots]
  S* g;            // [24][48]
  double* sums;    // of the item
};

// g of a panel, and its sums.
template <class S, int lanes, class Act>
DEEPOPS_INLINE void panel_of_g(const Problem& p, const Arguments& args, const Piece<S>& piece, const Act& act) {
  constexpr int64_t kRows = TileShape<S>::kRows;
  const int64_t words = p.bits_per_row(), first = piece.first;
  const S* const bias = static_cast<const S*>(args.bias);
  for (int64_t top = 0; top < kBlock; top += kRows) {
    const int64_t row = piece.row + top;
    const S* const grad_y = static_cast<const S*>(args.grad_y) + row * p.channels + first;
    Lanes<S> total[lanes];
    for (int j = 0; j < lanes; ++j) total[j] = Lanes<S>(S(0));
    const auto take = [&](int r, int j, const Lanes<S>& sum) __attribute__((always_inline)) {
      Lanes<S> g(S(0));
      if (top + r < piece.count) {
        const S* const at = grad_y + r * p.channels + j * kLanes;
        __builtin_prefetch(at + kBlock * p.channels, 0, 2);
        g = load_part(at, p.channels - first - j * kLanes);
        if constexpr (kTwoSlopes<Act>) {
          g = select(mask_of<S>(args.bits[(row + r) * words + first / kLanes + j]), flat_part(act, g), g);
        } else if constexpr (!kOneSlope<Act>) {
          g = act.backward(g, sum + load_lanes(bias + first + j * kLanes));
        }
        total[j] += g;
      }
      store_lanes(piece.g + (top + r) * kWidestPanel + j * kLanes, g);
    };
    if constexpr (kTwoSlopes<Act> || kOneSlope<Act>) {
      for (int r = 0; r < kRows; ++r) {
        _Pragma("GCC unroll 4") for (int j = 0; j < lanes; ++j) take(r, j, Lanes<S>(S(0)));
      }
    } else {
      const S* const weight = static_cast<const S*>(args.forward_weight) + first * p.inputs;
      multiply_tile<S, lanes, false>(piece.block + top * p.input_slots(), p.input_slots(), weight, kLanes,
                                     p.inputs * kLanes, p.inputs, zero<S>, take);
    }
    for (int j = 0; j < lanes; ++j) add_to(piece.sums + first + j * kLanes, total[j]);
  }
}

// The sums of (x - center)^T g, in two chains: their rounding errors are those of sums half as long.
template <class S, int lanes>
DEEPOPS_INLINE void add_products(const Problem& p, const Piece<S>& piece) {
  constexpr int64_t kHalf = kBlock / 2;
  const int64_t slots = p.input_slots();
  Lanes<S> first[TileShape<S>::kRows][lanes];
  for (int64_t c = 0; c < p.inputs; c += TileShape<S>::kRows) {
    double* const to = piece.sums + (1 + c) * p.slots() + piece.first;
    multiply_tile<S, lanes, true>(piece.block + c, slots, piece.g, kWidestPanel, kLanes, kHalf, zero<S>,
                                  [&](int r, int j, const Lanes<S>& sum)
                                      __attribute__((always_inline)) { first[r][j] = sum; });
    multiply_tile<S, lanes, true>(piece.block + kHalf * slots + c, slots, piece.g + kHalf * kWidestPanel, kWidestPanel,
                                  kLanes, kHalf, zero<S>,
                                  [&](int r, int j, const Lanes<S>& sum) __attribute__((always_inline)) {
                                    if (c + r < p.inputs) add_to(to + r * p.slots() + j * kLanes, first[r][j] + sum);
                                  });
  }
}

// to [24][input slots] += g W', columns from `column` on.
template <class S, int lanes>
DEEPOPS_INLINE void add_to_grad_x(const Problem& p, const Arguments& args, const Piece<S>& piece, int64_t columns,
                                  int64_t column, S* to) {
  const int64_t slots = p.input_slots();
  const S* const weight = static_cast<const S*>(args.backward_weight) + piece.first * slots + column;
  for (int64_t top = 0; top < piece.count; top += TileShape<S>::kRows) {
    S* const at = to + top * slots + column;
    multiply_tile<S, lanes, false>(piece.g + top * kWidestPanel, kWidestPanel, weight, slots, kLanes, columns, zero<S>,
                                   [&](int r, int j, const Lanes<S>& sum) __attribute__((always_inline)) {
                                     S* const sums = at + r * slots + j * kLanes;
                                     store_lanes(sums, load_lanes(sums) + sum);
                                   });
  }
}

template <class S, class Act>
void backward(const Problem& p, const Arguments& args, void* workspace, int64_t begin, int64_t end, const Act& act) {
  const int64_t slots = p.input_slots();
  S* const g = static_cast<S*>(workspace);
  S* const grad_x = g + kBlock * kWidestPanel;
  S* const block = grad_x + kBlock * slots;
  for (int64_t item = begin; item < end; ++item) {
    double* const sums = clear(args.sums, item, p.sums_of_item());
    for_blocks(p, item, [&](int64_t row, int64_t count) {
      load_block<S, S>(p, args.x, static_cast<const S*>(args.center), row, count, block);
      for (int64_t i = 0; i < kBlock * slots; ++i) grad_x[i] = 0;
      for_panels<S>(p.slots(), [&]<int lanes>(int64_t first) __attribute__((always_inline)) {
        const Piece<S> piece{row, count, first, block, g, sums};
        panel_of_g<S, lanes>(p, args, piece, act);
        add_products<S, lanes>(p, piece);
        if (!args.grad_x) return;
        for_panels<S>(slots, [&]<int columns>(int64_t column) __attribute__((always_inline)) {
          add_to_grad_x<S, columns>(p, args, piece, lanes * kLanes, column, grad_x);
        });
      });
      if (!args.grad_x) return;
      S* to = static_cast<S*>(args.grad_x) + row * p.inputs;
      for (int64_t t = 0; t < count; ++t, to += p.inputs)
        for (int64_t c = 0; c < p.inputs; c += kLanes)
          store_part(to + c, load_lanes(grad_x + t * slots + c), p.inputs - c);
    });
  }
}

// A: in which the product with `slope` is computed.
template <class S, class A>
void finish(const Problem& p, const Arguments& args, void* workspace, int64_t begin, int64_t end) {
  constexpr int64_t kRows = TileShape<A>::kRows;
  const int64_t slots = p.input_slots();
  A* const block = static_cast<A*>(workspace);
  const A *const slope = static_cast<const A*>(args.slope), *const constant = static_cast<const A*>(args.constant);
  for (int64_t item = begin; item < end; ++item)
    for_blocks(p, item, [&](int64_t row, int64_t count) {
      load_block<S, A>(p, args.x, static_cast<const A*>(args.center), row, count, block);
      for_panels<A>(slots, [&]<int lanes>(int64_t first) __attribute__((always_inline)) {
        for (int64_t top = 0; top < count; top += kRows) {
          S* const grad_x = static_cast<S*>(args.grad_x) + (row + top) * p.inputs + first;
          multiply_tile<A, lanes, false>(block + top * slots, slots, slope + first, slots, kLanes, p.inputs, zero<A>,
                                         [&](int r, int j, const Lanes<A>& sum) __attribute__((always_inline)) {
                                           if (top + r >= count) return;
                                           S* const at = grad_x + r * p.inputs + j * kLanes;
                                           const int64_t left = p.inputs - first - j * kLanes;
                                           const Lanes<A> number = load_lanes(constant + first + j * kLanes);
                                           const Lanes<A> value = to_lanes_of(load_part(at, left), A()) - number - sum;
                                           store_part(at, narrow(value, S()), left);
                                         });
        }
      });
    });
}

template <bool transposed>
void product_of(const double* a, const double* b, double* to, int64_t rows, int64_t columns, int64_t size) {
  for (int64_t row = 0; row < rows; row += TileShape<double>::kRows)
    for (int64_t column = 0; column < columns; column += kLanes)
      multiply_tile<double, 1, transposed>(
          a + row * (transposed ? 1 : size), transposed ? rows : size, b + column, columns, kLanes, size, zero<double>,
          [&](int r, int, const Lanes<double>& sum) { store_lanes(to + (row + r) * columns + column, sum); });
}

// ---- run-time choices to template arguments -------------------------------------------------------------------------

void moments_any(const Problem& p, const Arguments& args, void* workspace, int64_t begin, int64_t end) {
  with_type(p, [&]<class S>() { moments<S>(p, args, workspace, begin, end); });
}

void forward_any(const Problem& p, const Arguments& args, void* workspace, int64_t begin, int64_t end) {
  with_type(p, [&]<class S>() {
    with_activation(p.activation, p.negative_slope,
                    [&](const auto& act) { forward<S>(p, args, workspace, begin, end, act); });
  });
}

void backward_any(const Problem& p, const Arguments& args, void* workspace, int64_t begin, int64_t end) {
  with_type(p, [&]<class S>() {
    with_activation(p.activation, p.negative_slope,
                    [&](const auto& act) { backward<S>(p, args, workspace, begin, end, act); });
  });
}

void finish_any(const Problem& p, const Arguments& args, void* workspace, int64_t begin, int64_t end) {
  with_type(p, [&]<class S>() {
    args.exact ? finish<S, double>(p, args, workspace, begin, end) : finish<S, S>(p, args, workspace, begin, end);
  });
}

}  // namespace

const PointwiseKernels pointwise_kernels = {moments_any, forward_any, backward_any, finish_any};

void pointwise_product(const double* a, bool transposed, const double* b, double* to, int64_t rows, int64_t columns,
                       int64_t size) {
  transposed ? product_of<true>(a, b, to, rows, columns, size) : product_of<false>(a, b, to, rows, columns, size);
}

}  // namespace deepops::DEEPOPS_ISA
