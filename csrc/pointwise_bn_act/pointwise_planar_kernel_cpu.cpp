// CPU kernels of pointwise_bn_act for contiguous data; compiled once per instruction set, raw pointers only.
//
// The passes of pointwise_bn_act_kernel_cpu.cpp with lanes along the pixels of an image. 32 pixels of all channels of x
// stay in the first-level cache, centred, as [C][32]; all products but one have rows of W' as the other factor. Sums
// over pixels need x the other way round: sums of lanes would have to be added up for each pair of channels, and x is
// the smaller factor, so its block is transposed.
#include "core/lane_order.h"
#include "pointwise_bn_act/blocks.h"

namespace deepops::DEEPOPS_ISA {
namespace {

using Problem = PointwiseProblem;
using Arguments = PointwiseArguments;
constexpr int64_t kPixels = Problem::kPixels;
constexpr int64_t kChain = 16;  // pixels of a sum in single precision; those of a block are then added up
static_assert(kLanes == Problem::kLanes && kPixels % kChain == 0);

// Tiles are of 16 channels or a part of them, so that no tile reaches beyond the padding.
template <class S>
struct PlanarTile {
  static constexpr int kRows = TileShape<S>::kRows == 6 ? 4 : TileShape<S>::kRows;
  static constexpr int kLanesAtOnce = TileShape<S>::kLanesAtOnce > 1 ? 2 : 1;
  static_assert(kLanes % kRows == 0);
};

// Neighbouring pixels of an image.
struct Place {
  int64_t image, pixel, count;

  // Of one channel of a tensor that has `channels` of them.
  int64_t at(const Problem& p, int64_t channels, int64_t channel) const {
    return (image * channels + channel) * p.inner + pixel;
  }
  // The word with the bits of the first 16 of them, of channel 0; those of the next channel come next.
  int64_t word(const Problem& p) const { return (image * p.words_of_plane() + pixel / kLanes) * p.channels; }
};

// each(place) for the blocks of an item.
template <class Each>
DEEPOPS_INLINE void for_places(const Problem& p, int64_t item, const Each& each) {
  for (int64_t block = p.first_block(item), last = p.first_block(item + 1); block < last; ++block) {
    const int64_t pixel = block % p.blocks_of_image() * kPixels;
    each(Place{block / p.blocks_of_image(), pixel, least(kPixels, p.inner - pixel)});
  }
}

// each.operator()<lanes>(first pixel) for what a tile takes at once of the pixels of a block.
template <class S, class Each>
DEEPOPS_INLINE void for_pixels(int64_t count, const Each& each) {
  constexpr int kMost = PlanarTile<S>::kLanesAtOnce;
  for (int64_t first = 0; first < count; first += kMost * kLanes)
    with_lanes<kMost>((count - first + kLanes - 1) / kLanes,
                      [&]<int lanes>() __attribute__((always_inline)) { each.template operator()<lanes>(first); });
}

template <class S>
DEEPOPS_INLINE void fetch(const S* pixels) {
  constexpr int64_t kLine = 64 / sizeof(S);
  _Pragma("GCC unroll 4") for (int64_t t = 0; t < kPixels; t += kLine) __builtin_prefetch(pixels + t, 0, 2);
}

// x - center of a block, in type A, as [input slots][32]; what there is none of is 0. center: or null, for 0.
template <class S, class A>
void load_block(const Problem& p, const void* x, const A* center, const Place& place, A* block) {
  for (int64_t c = 0; c < p.input_slots(); ++c) {
    const int64_t count = c < p.inputs ? place.count : 0;
    const S* const from = static_cast<const S*>(x) + place.at(p, p.inputs, count ? c : 0);
    const Lanes<A> middle(center && count ? center[c] : A(0));
    if (count) fetch(from + kPixels);
    for (int64_t t = 0; t < kPixels; t += kLanes, block += kLanes) {
      Lanes<A> value(A(0));
      if (t < count) value = to_lanes_of(load_part(from + t, count - t), A()) - middle;
      if (t < count && t + kLanes > count) value = first_of(value, count - t);
      store_lanes(block, value);
    }
  }
}

// ---- the passes -----------------------------------------------------------------------------------------------------

template <class S>
void moments(const Problem& p, const Arguments& args, void* workspace, int64_t begin, int64_t end) {
  const int64_t slots = p.input_slots();
  double* const rows = static_cast<double*>(workspace);  // [32][input slots]
  S* const block = reinterpret_cast<S*>(rows + kPixels * slots);
  S* const across = block + kPixels * slots;
  for (int64_t item = begin; item < end; ++item) {
    double* const sums = clear(args.moments, item, p.moments_of_item());
    for_places(p, item, [&](const Place& place) {
      load_block<S, S>(p, args.x, nullptr, place, block);
      transpose(block, slots, kPixels, across);
      for (int64_t t = 0; t < place.count; ++t)
        for (int64_t c = 0; c < slots; c += kLanes)
          store_lanes(rows + t * slots + c, widen(load_lanes(across + t * slots + c)) - load_lanes(args.shift + c));
      add_moments(rows, slots, place.count, sums);
    });
  }
}

template <class S, class Act>
void forward(const Problem& p, const Arguments& args, void* workspace, int64_t begin, int64_t end, const Act& act) {
  constexpr int kRows = PlanarTile<S>::kRows;
  const int64_t slots = p.input_slots();
  S* const block = static_cast<S*>(workspace);
  const S *const bias = static_cast<const S*>(args.bias), *const weight = static_cast<const S*>(args.backward_weight);
  for (int64_t item = begin; item < end; ++item)
    for_places(p, item, [&](const Place& place) {
      load_block<S, S>(p, args.x, static_cast<const S*>(args.center), place, block);
      for (int64_t k = 0; k < p.channels; k += kRows) {
        S* const y = static_cast<S*>(args.y) + place.at(p, p.channels, k);
        uint16_t* const bits = args.bits ? args.bits + place.word(p) + k : nullptr;
        for_pixels<S>(place.count, [&]<int lanes>(int64_t first) __attribute__((always_inline)) {
          multiply_tile<S, lanes, false, kRows>(weight + k * slots, slots, block + first, kPixels, kLanes, p.inputs,
                                                zero<S>,
                                                [&](int r, int j, const Lanes<S>& sum) __attribute__((always_inline)) {
                                                  if (k + r >= p.channels) return;
                                                  const Lanes<S> u = sum + Lanes<S>(bias[k + r]);
                                                  const int64_t pixel = first + j * kLanes;
                                                  S* const to = y + r * p.inner + pixel;
                                                  if (args.stream) {
                                                    stream_lanes(to, act.forward(u));
                                                  } else {
                                                    store_part(to, act.forward(u), place.count - pixel);
                                                  }
                                                  if constexpr (kTwoSlopes<Act>)
                                                    if (bits)
                                                      bits[pixel / kLanes * p.channels + r] = bits_of<S>(flat(act, u));
                                                });
        });
      }
    });
  if (args.stream) finish_streaming();
}

// What the backward works on: a block of pixels, a panel of channels of g.
template <class S>
struct Piece {
  Place place;
  int64_t first, count;  // channels
  const S* block;        // x - center, [input slots][32]
  const S* across;       // [32][input slots]
  S* g;                  // [48][32]
  double* lane_sums;     // of g, [slots][16]
  double* products;      // of g and x - center, [slots][input slots]
};

// g of a panel, and its sums.
template <class S, class Act>
DEEPOPS_INLINE void panel_of_g(const Problem& p, const Arguments& args, const Piece<S>& piece, const Act& act) {
  constexpr int kRows = PlanarTile<S>::kRows;
  const Place& place = piece.place;
  const S* const grad_y = static_cast<const S*>(args.grad_y) + place.at(p, p.channels, piece.first);
  // g of channel k, which joins its sum over the pixels.
  const auto take = [&](int64_t k, int64_t pixel, const Lanes<S>& sum, Lanes<S>& total) __attribute__((always_inline)) {
    const S* const at = grad_y + k * p.inner + pixel;
    __builtin_prefetch(at + kPixels, 0, 2);
    Lanes<S> g = load_part(at, place.count - pixel);
    if constexpr (kTwoSlopes<Act>) {
      const uint16_t bits = args.bits[place.word(p) + pixel / kLanes * p.channels + piece.first + k];
      g = select(mask_of<S>(bits), flat_part(act, g), g);
    } else if constexpr (!kOneSlope<Act>) {
      g = act.backward(g, sum + Lanes<S>(static_cast<const S*>(args.bias)[piece.first + k]));
    }
    total += g;
    store_lanes(piece.g + k * kPixels + pixel, g);
  };
  double* const lane_sums = piece.lane_sums + piece.first * kLanes;
  if constexpr (kTwoSlopes<Act> || kOneSlope<Act>) {
    for (int64_t k = 0; k < piece.count; ++k) {
      Lanes<S> total(S(0));
      for (int64_t pixel = 0; pixel < place.count; pixel += kLanes) take(k, pixel, Lanes<S>(S(0)), total);
      add_to(lane_sums + k * kLanes, total);
    }
  } else {
    const S* const weight = static_cast<const S*>(args.backward_weight) + piece.first * p.input_slots();
    for (int64_t k = 0; k < piece.count; k += kRows)
      for_pixels<S>(place.count, [&]<int lanes>(int64_t pixel) __attribute__((always_inline)) {
        Lanes<S> total[kRows];
        for (int r = 0; r < kRows; ++r) total[r] = Lanes<S>(S(0));
        multiply_tile<S, lanes, false, kRows>(weight + k * p.input_slots(), p.input_slots(), piece.block + pixel,
                                              kPixels, kLanes, p.inputs, zero<S>,
                                              [&](int r, int j, const Lanes<S>& sum) __attribute__((always_inline)) {
                                                if (k + r < piece.count) take(k + r, pixel + j * kLanes, sum, total[r]);
                                              });
        for (int r = 0; r < kRows && k + r < piece.count; ++r) add_to(lane_sums + (k + r) * kLanes, total[r]);
      });
  }
}

// The sums of g^T (x - center), in chains: their rounding errors are those of short sums.
template <class S, int lanes>
DEEPOPS_INLINE void add_products(const Problem& p, const Piece<S>& piece, int64_t column) {
  constexpr int kRows = PlanarTile<S>::kRows;
  const int64_t slots = p.input_slots();
  for (int64_t k = 0; k < piece.count; k += kRows) {
    Lanes<S> sum[kRows][lanes];
    for (int64_t t = 0; t < piece.place.count; t += kChain)
      multiply_tile<S, lanes, false, kRows>(
          piece.g + k * kPixels + t, kPixels, piece.across + t * slots + column, slots, kLanes, kChain, zero<S>,
          [&](int r, int j, const Lanes<S>& part)
              __attribute__((always_inline)) { sum[r][j] = t == 0 ? part : sum[r][j] + part; });
    double* const to = piece.products + (piece.first + k) * slots + column;
    for (int r = 0; r < kRows && k + r < piece.count; ++r)
      for (int j = 0; j < lanes; ++j) add_to(to + r * slots + j * kLanes, sum[r][j]);
  }
}

// to [input slots][32] += W'^T g.
template <class S>
DEEPOPS_INLINE void add_to_grad_x(const Problem& p, const Arguments& args, const Piece<S>& piece, S* to) {
  constexpr int kRows = PlanarTile<S>::kRows;
  const int64_t slots = p.input_slots();
  const S* const weight = static_cast<const S*>(args.backward_weight) + piece.first * slots;
  for (int64_t c = 0; c < p.inputs; c += kRows)
    for_pixels<S>(piece.place.count, [&]<int lanes>(int64_t pixel) __attribute__((always_inline)) {
      multiply_tile<S, lanes, true, kRows>(weight + c, slots, piece.g + pixel, kPixels, kLanes, piece.count, zero<S>,
                                           [&](int r, int j, const Lanes<S>& sum) __attribute__((always_inline)) {
                                             S* const sums = to + (c + r) * kPixels + pixel + j * kLanes;
                                             store_lanes(sums, piece.first ? load_lanes(sums) + sum : sum);
                                           });
    });
}

template <class S, class Act>
void backward(const Problem& p, const Arguments& args, void* workspace, int64_t begin, int64_t end, const Act& act) {
  const int64_t slots = p.input_slots();
  double* const lane_sums = static_cast<double*>(workspace);
  S* const block = reinterpret_cast<S*>(lane_sums + p.slots() * kLanes);
  S *const across = block + kPixels * slots, *const grad_x = across + kPixels * slots;
  S* const g = grad_x + kPixels * slots;
  for (int64_t item = begin; item < end; ++item) {
    double* const sums = clear(args.sums, item, p.sums_of_item());
    clear(lane_sums, 0, p.slots() * kLanes);
    for_places(p, item, [&](const Place& place) {
      load_block<S, S>(p, args.x, static_cast<const S*>(args.center), place, block);
      transpose(block, slots, kPixels, across);
      for (int64_t first = 0; first < p.channels; first += kWidestPanel) {
        const int64_t count = least(kWidestPanel, p.channels - first);
        const Piece<S> piece{place, first, count, block, across, g, lane_sums, sums + p.slots()};
        panel_of_g(p, args, piece, act);
        for_panels<S>(slots, [&]<int lanes>(int64_t column)
                                 __attribute__((always_inline)) { add_products<S, lanes>(p, piece, column); });
        if (args.grad_x) add_to_grad_x(p, args, piece, grad_x);
      }
      if (!args.grad_x) return;
      for (int64_t c = 0; c < p.inputs; ++c) {
        S* const to = static_cast<S*>(args.grad_x) + place.at(p, p.inputs, c);
        for (int64_t t = 0; t < place.count; t += kLanes)
          store_part(to + t, load_lanes(grad_x + c * kPixels + t), place.count - t);
      }
    });
    for (int64_t k = 0; k < p.channels; ++k) sums[k] = sum_of_lanes(load_lanes(lane_sums + k * kLanes));
  }
}

// A: in which the product with `slope` is computed.
template <class S, class A>
void finish(const Problem& p, const Arguments& args, void* workspace, int64_t begin, int64_t end) {
  constexpr int kRows = PlanarTile<A>::kRows;
  const int64_t slots = p.input_slots();
  A* const block = static_cast<A*>(workspace);
  const A *const slope = static_cast<const A*>(args.slope), *const constant = static_cast<const A*>(args.constant);
  for (int64_t item = begin; item < end; ++item)
    for_places(p, item, [&](const Place& place) {
      load_block<S, A>(p, args.x, static_cast<const A*>(args.center), place, block);
      for (int64_t c = 0; c < p.inputs; c += kRows) {
        S* const grad_x = static_cast<S*>(args.grad_x) + place.at(p, p.inputs, c);
        for_pixels<A>(place.count, [&]<int lanes>(int64_t first) __attribute__((always_inline)) {
          multiply_tile<A, lanes, true, kRows>(slope + c, slots, block + first, kPixels, kLanes, p.inputs, zero<A>,
                                               [&](int r, int j, const Lanes<A>& sum) __attribute__((always_inline)) {
                                                 if (c + r >= p.inputs) return;
                                                 const int64_t pixel = first + j * kLanes, left = place.count - pixel;
                                                 S* const at = grad_x + r * p.inner + pixel;
                                                 const Lanes<A> value = to_lanes_of(load_part(at, left), A()) -
                                                                        Lanes<A>(constant[c + r]) - sum;
                                                 store_part(at, narrow(value, S()), left);
                                               });
        });
      }
    });
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

const PointwiseKernels pointwise_planar_kernels = {moments_any, forward_any, backward_any, finish_any};

}  // namespace deepops::DEEPOPS_ISA
