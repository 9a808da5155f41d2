// CPU kernels of depthwise_bn_act; compiled once per instruction set, raw pointers only.
//
//   statistics   sums of z - shift and of its square, in single-precision lanes that go to double after a strip
//   forward      y = act((z - mean) * scale + bias)
//   reduce       sums of g and of g * (z - mean), g = grad_y * act'(..)
//   gradients    grad_z = scale * (g - mean_grad - (z - mean) * slope_grad), row by row into a ring; from its rows
//                grad_x, and the sums of grad_z * x that are the gradient of the filter
//
// A pass goes through the rows of its items, in a row tile by tile, in a tile strip by strip: z of a strip stays in the
// first-level cache, the rows of x that the filter spans in the second. The rows that come next are fetched meanwhile:
// the steps from column to column are too long for the hardware to see.
#include "depthwise_bn_act/depthwise_bn_act.h"

#include "depthwise_bn_act/rows.h"
// after lanes.h, whose types the formulas are instantiated with
#include "batch_norm_act/batch_norm_act_math.h"

namespace deepops::DEEPOPS_ISA {
namespace {

using Problem = DepthwiseProblem;
using Forward = DepthwiseForward;
using Backward = DepthwiseBackward;
using Workspace = DepthwiseWorkspace;
using core::OpMath;

constexpr int64_t kStrip = 32;  // columns; additions in single precision of a statistic, and of a filter's gradient
constexpr int64_t kGradientFlush = 8;  // of the sums of g, whose terms cancel

template <class S>
Lanes<S> numbers_at(const void* numbers, int64_t slot) {
  return load_lanes(static_cast<const S*>(numbers) + slot);
}

// ---- taps -----------------------------------------------------------------------------------------------------------

// Of output row `row`: offsets from the first channel of a tile of an image of x.
Taps taps_of_z(const Problem& p, int64_t row, Tap* storage) {
  Taps taps{storage};
  for (int64_t r = 0; r < p.filter_height; ++r) {
    const int64_t y = row * p.stride_y - p.top + r * p.dilation_y;
    if (y < 0 || y >= p.height) continue;
    // Without dilation every stride_x-th tap is of one run.
    const int64_t runs = p.dilation_x == 1 ? least(p.stride_x, p.filter_width) : p.filter_width;
    for (int64_t run = 0; run < runs; ++run)
      for (int64_t s = run; s < p.filter_width; s += runs) {
        const int64_t x = s * p.dilation_x - p.left;
        const int64_t weight = (r * p.filter_width + s) * kLanes;
        taps.add({(y * p.width + x) * p.channels, weight, up(-x, p.stride_x), up(p.width - x, p.stride_x)}, s > run);
      }
  }
  return taps;
}

// Of row `row` of grad_x, columns phase, phase + stride, ...: offsets in a tile of the ring.
Taps taps_of_grad_x(const Problem& p, int64_t row, int64_t phase, Tap* storage) {
  Taps taps{storage};
  for (int64_t r = 0; r < p.filter_height; ++r) {
    const int64_t y = row + p.top - r * p.dilation_y;
    if (y < 0 || y % p.stride_y != 0 || y / p.stride_y >= p.out_height) continue;
    const int64_t ring_row = y / p.stride_y % p.ring_rows;
    bool same_run = false;
    for (int64_t s = p.filter_width - 1; s >= 0; --s) {
      const int64_t x = phase + p.left - s * p.dilation_x;
      if (x % p.stride_x != 0) continue;
      const int64_t from = x / p.stride_x;
      const int64_t weight = (r * p.filter_width + s) * kLanes;
      taps.add({(ring_row * p.out_width + from) * kLanes, weight, -from, p.out_width - from}, same_run);
      same_run = p.dilation_x == 1;
    }
  }
  return taps;
}

// ---- the walk -------------------------------------------------------------------------------------------------------

struct Item {
  int64_t first_image, last_image, first_row, last_row;
  Item(const Problem& p, int64_t item)
      : first_image(item / p.row_blocks * p.batch / p.image_groups),
        last_image((item / p.row_blocks + 1) * p.batch / p.image_groups),
        first_row(item % p.row_blocks * p.out_height / p.row_blocks),
        last_row((item % p.row_blocks + 1) * p.out_height / p.row_blocks) {}
};

// 16 channels of neighbouring outputs of a row.
struct Strip {
  int64_t image, row, tile, begin, end;
  int64_t channel, slot;  // the first
  int64_t at;             // of `begin` in y
};

// Fetches what the next row will need and this one did not, for the second-level cache: the first is too small for a
// row of all channels. In the last row of an image that is the next image, which follows it in memory.
template <class D>
DEEPOPS_INLINE void fetch_ahead(const Problem& p, const D* image, const Strip& strip) {
  const int64_t bottom = (strip.row + 1) * p.stride_y - p.top + (p.filter_height - 1) * p.dilation_y;
  const int64_t first = most(0, strip.begin * p.stride_x - p.left);
  const int64_t last = least(p.width, strip.end * p.stride_x);
  for (int64_t y = most(0, bottom - p.stride_y + 1); y <= bottom; ++y) {
    const D* at = image + (y * p.width + first) * p.channels;
    for (int64_t x = first; x < last; ++x, at += p.channels) __builtin_prefetch(at, 0, 2);
  }
}

// each(strip) for the strips of a row.
template <class Each>
DEEPOPS_INLINE void for_strips(const Problem& p, int64_t image, int64_t row, const Each& each) {
  for (int64_t tile = 0; tile < p.tiles; ++tile) {
    const int64_t channel = p.first_channel(tile);
    for (int64_t begin = 0; begin < p.out_width; begin += kStrip) {
      const int64_t end = least(begin + kStrip, p.out_width);
      const int64_t at = ((image * p.out_height + row) * p.out_width + begin) * p.channels + channel;
      each(Strip{image, row, tile, begin, end, channel, tile * kLanes, at});
    }
  }
}

// each(strip, z) for the strips of a row; z is [32][16].
template <class D, class Each>
DEEPOPS_INLINE void for_row(const Problem& p, const void* x, const void* filter, int64_t image, int64_t row,
                            const Taps& taps, const Each& each) {
  using S = OpMath<D>;
  alignas(64) S z[kStrip * kLanes];
  const D* const data = static_cast<const D*>(x) + image * p.height * p.width * p.channels;
  for_strips(p, image, row, [&](const Strip& strip) __attribute__((always_inline)) {
    const S* const weights = static_cast<const S*>(filter) + strip.tile * p.filter_size() * kLanes;
    fetch_ahead(p, data + strip.channel, strip);
    convolve(data + strip.channel, p.stride_x * p.channels, weights, taps, strip.begin, strip.end, z, kLanes);
    each(strip, z);
  });
}

// each(image, row) for the rows of an item.
template <class Each>
DEEPOPS_INLINE void for_rows(const Problem& p, int64_t index, const Each& each) {
  const Item item(p, index);
  for (int64_t image = item.first_image; image < item.last_image; ++image)
    for (int64_t row = item.first_row; row < item.last_row; ++row) each(image, row);
}

template <class D, class Each>
void for_item(const Problem& p, const void* x, const void* filter, const Workspace& workspace, int64_t index,
              const Each& each) {
  for_rows(p, index, [&](int64_t image, int64_t row) {
    for_row<D>(p, x, filter, image, row, taps_of_z(p, row, workspace.taps), each);
  });
}

template <class S>
void add_to(double* sums, const Lanes<S>& terms) {
  store_lanes(sums, load_lanes(sums) + widen(terms));
}

double* clear_sums(const Problem& p, double* all, int64_t item) {
  double* const sums = all + item * 2 * p.slots();
  for (int64_t i = 0; i < 2 * p.slots(); ++i) sums[i] = 0;
  return sums;
}

// ---- the passes -----------------------------------------------------------------------------------------------------

constexpr int64_t kSamples = 8;

template <class D>
void sample(const Problem& p, const Forward& args, const Workspace& workspace, double* shift) {
  using S = OpMath<D>;
  const int64_t count = p.count(), samples = least(count, kSamples);
  for (int64_t i = 0; i < p.slots(); ++i) shift[i] = 0;
  for (int64_t k = 0; k < samples; ++k) {
    const int64_t at = k * count / samples, image = at / p.inner, row = at % p.inner / p.out_width;
    const Taps taps = taps_of_z(p, row, workspace.taps);
    const D* const data = static_cast<const D*>(args.x) + image * p.height * p.width * p.channels;
    for (int64_t tile = 0; tile < p.tiles; ++tile) {
      const S* const filter = static_cast<const S*>(args.filter) + tile * p.filter_size() * kLanes;
      const int64_t column = at % p.out_width;
      S z[kLanes];
      convolve(data + p.first_channel(tile), p.stride_x * p.channels, filter, taps, column, column + 1, z, kLanes);
      add_to(shift + tile * kLanes, load_lanes(z));
    }
  }
  for (int64_t i = 0; i < p.slots(); ++i) {
    const double wide = shift[i] / double(samples), mean = p.exact ? wide : double(S(wide));
    shift[i] = mean - mean == 0 ? mean : 0;  // not finite: any value does
  }
}

// A: in which terms are taken, double where their rounding would show.
template <class D, class A>
void statistics(const Problem& p, const Forward& args, const Workspace& workspace, int64_t begin, int64_t end) {
  using S = OpMath<D>;
  for (int64_t item = begin; item < end; ++item) {
    double* const sums = clear_sums(p, args.sums, item);
    for_item<D>(p, args.x, args.filter, workspace, item, [&](const Strip& strip, const S* z) {
      const Lanes<A> shift = numbers_at<A>(args.shift, strip.slot);
      Lanes<A> a(A(0)), b(A(0));
      for (int64_t j = 0; j < strip.end - strip.begin; ++j) {
        Lanes<A> d;
        if constexpr (sizeof(A) > sizeof(S)) {
          d = widen(load_lanes(z + j * kLanes)) - shift;
        } else {
          d = load_lanes(z + j * kLanes) - shift;
        }
        a += d;
        b += d * d;
      }
      add_to(sums + strip.slot, a);
      add_to(sums + p.slots() + strip.slot, b);
      if (!args.in_place) return;
      D* y = static_cast<D*>(args.y) + strip.at;
      for (int64_t j = 0; j < strip.end - strip.begin; ++j, y += p.channels) store_lanes(y, load_lanes(z + j * kLanes));
    });
  }
}

// From z in y, which is left there. The last tile finds channels that the one before it has finished.
template <class S, class Act>
void forward_in_place(const Problem& p, const Forward& args, int64_t begin, int64_t end, const Act& act) {
  const auto fresh = lane_numbers<S>() >= Lanes<S>(S(p.tiles * kLanes - p.channels));
  for (int64_t item = begin; item < end; ++item)
    for_rows(p, item, [&](int64_t image, int64_t row) {
      for_strips(p, image, row, [&](const Strip& strip) {
        const Lanes<S> mean = numbers_at<S>(args.mean, strip.slot), scale = numbers_at<S>(args.scale, strip.slot);
        const Lanes<S> bias = numbers_at<S>(args.bias, strip.slot);
        const bool overlaps = strip.tile + 1 == p.tiles && p.channels % kLanes != 0;
        S* y = static_cast<S*>(args.y) + strip.at;
        for (int64_t j = strip.begin; j < strip.end; ++j, y += p.channels) {
          __builtin_prefetch(y + p.out_width * p.channels, 1, 2);
          const Lanes<S> z = load_lanes(y), result = act.forward((z - mean) * scale + bias);
          store_lanes(y, overlaps ? select(fresh, result, z) : result);
        }
      });
    });
}

template <class D, class Act>
void forward(const Problem& p, const Forward& args, const Workspace& workspace, int64_t begin, int64_t end,
             const Act& act) {
  using S = OpMath<D>;
  if constexpr (sizeof(D) == sizeof(S))
    if (args.in_place) return forward_in_place<S>(p, args, begin, end, act);
  for (int64_t item = begin; item < end; ++item)
    for_item<D>(p, args.x, args.filter, workspace, item, [&](const Strip& strip, const S* z) {
      const Lanes<S> mean = numbers_at<S>(args.mean, strip.slot), scale = numbers_at<S>(args.scale, strip.slot);
      const Lanes<S> bias = numbers_at<S>(args.bias, strip.slot);
      D* y = static_cast<D*>(args.y) + strip.at;
      for (int64_t j = 0; j < strip.end - strip.begin; ++j, y += p.channels)
        store_lanes(y, act.forward((load_lanes(z + j * kLanes) - mean) * scale + bias));
    });
}

// each(j, g, z - mean) for the outputs of a strip.
template <class D, class S, class Act, class Each>
DEEPOPS_INLINE void for_gradient(const Problem& p, const Backward& args, const Strip& strip, const S* z, const Act& act,
                                 int64_t begin, int64_t end, const Each& each) {
  const Lanes<S> mean = numbers_at<S>(args.mean, strip.slot), scale = numbers_at<S>(args.scale, strip.slot);
  const Lanes<S> bias = numbers_at<S>(args.bias, strip.slot);
  const D* grad_y = static_cast<const D*>(args.grad_y) + strip.at + begin * p.channels;
  const int64_t next_row = p.out_width * p.channels;
  for (int64_t j = begin; j < end; ++j, grad_y += p.channels) {
    __builtin_prefetch(grad_y + next_row, 0, 2);
    const Lanes<S> centered = load_lanes(z + j * kLanes) - mean;
    each(j, act.backward(load_lanes(grad_y), centered * scale + bias), centered);
  }
}

template <class D, class Act>
void reduce(const Problem& p, const Backward& args, const Workspace& workspace, int64_t begin, int64_t end,
            const Act& act) {
  using S = OpMath<D>;
  const int64_t flush = p.exact ? 1 : kGradientFlush;
  for (int64_t item = begin; item < end; ++item) {
    double* const sums = clear_sums(p, args.sums, item);
    for_item<D>(p, args.x, args.filter, workspace, item, [&](const Strip& strip, const S* z) {
      const int64_t count = strip.end - strip.begin;
      for (int64_t j = 0; j < count; j += flush) {
        Lanes<S> a(S(0)), b(S(0));
        for_gradient<D>(p, args, strip, z, act, j, least(j + flush, count),
                        [&](int64_t, const Lanes<S>& g, const Lanes<S>& centered) {
                          a += g;
                          b += g * centered;
                        });
        add_to(sums + strip.slot, a);
        add_to(sums + p.slots() + strip.slot, b);
      }
    });
  }
}

template <class D, class S, class Act>
DEEPOPS_INLINE void grad_z(const Problem& p, const Backward& args, const Strip& strip, const S* z, const Act& act,
                           S* to) {
  const Lanes<S> mean_grad = numbers_at<S>(args.mean_grad, strip.slot);
  const Lanes<S> slope_grad = numbers_at<S>(args.slope_grad, strip.slot);
  const Lanes<S> scale = numbers_at<S>(args.scale, strip.slot);
  for_gradient<D>(p, args, strip, z, act, 0, strip.end - strip.begin,
                  [&](int64_t j, const Lanes<S>& g, const Lanes<S>& centered) {
                    store_lanes(to + j * kLanes, scale * (g - mean_grad - centered * slope_grad));
                  });
}

template <class D, class S>
DEEPOPS_INLINE void correlate_all(const Problem& p, const D* x, const Strip& strip, const Taps& taps, const S* grad,
                                  double* grad_filter) {
  for (int64_t t = 0; t < taps.count; t += kTapsAtOnce)
    correlate(x, p.stride_x * p.channels, taps.tap + t, least(kTapsAtOnce, taps.count - t), grad, strip.begin,
              strip.end, grad_filter + strip.tile * p.filter_size() * kLanes);
}

template <class D>
void grad_x_row(const Problem& p, const Backward& args, const Workspace& workspace, int64_t image, int64_t row) {
  using S = OpMath<D>;
  for (int64_t phase = 0; phase < least(p.stride_x, p.width); ++phase) {
    const int64_t columns = up(p.width - phase, p.stride_x);
    const Taps taps = taps_of_grad_x(p, row, phase, workspace.taps + p.filter_size());
    D* const to = static_cast<D*>(args.grad_x) + ((image * p.height + row) * p.width + phase) * p.channels;
    for (int64_t tile = 0; tile < p.tiles; ++tile)
      convolve(static_cast<const S*>(workspace.ring) + tile * p.ring_rows * p.out_width * kLanes, kLanes,
               static_cast<const S*>(args.filter) + tile * p.filter_size() * kLanes, taps, 0, columns,
               to + p.first_channel(tile), p.stride_x * p.channels);
  }
}

template <class D, class Act>
void gradients(const Problem& p, const Backward& args, const Workspace& workspace, int64_t begin, int64_t end,
               const Act& act) {
  using S = OpMath<D>;
  S* const ring = static_cast<S*>(workspace.ring);
  const int64_t filter_numbers = p.slots() * p.filter_size();
  for (int64_t index = begin; index < end; ++index) {
    const Item item(p, index);
    double* const grad_filter = args.grad_filter ? args.grad_filter + index * filter_numbers : nullptr;
    for (int64_t i = 0; grad_filter && i < filter_numbers; ++i) grad_filter[i] = 0;
    // Of grad_x: the rows that begin with those of the block. Their outputs may belong to the blocks beside.
    const int64_t first_x = item.first_row == 0 ? 0 : least(item.first_row * p.stride_y, p.height);
    const int64_t last_x = item.last_row == p.out_height ? p.height : least(item.last_row * p.stride_y, p.height);
    for (int64_t image = item.first_image; image < item.last_image; ++image) {
      const D* const x = static_cast<const D*>(args.x) + image * p.height * p.width * p.channels;
      int64_t next = item.first_row;  // of grad_z
      if (args.grad_x)
        next = least(next, most(0, up(first_x + p.top - (p.filter_height - 1) * p.dilation_y, p.stride_y)));
      const auto grad_z_up_to = [&](int64_t stop) {
        for (; next < stop; ++next) {
          const Taps taps = taps_of_z(p, next, workspace.taps);
          const bool mine = grad_filter && next >= item.first_row && next < item.last_row;
          for_row<D>(p, args.x, args.filter, image, next, taps, [&](const Strip& strip, const S* z) {
            const int64_t ring_row = strip.tile * p.ring_rows + next % p.ring_rows;
            S* const to = ring + (ring_row * p.out_width + strip.begin) * kLanes;
            grad_z<D>(p, args, strip, z, act, to);
            if (mine) correlate_all(p, x + strip.channel, strip, taps, to, grad_filter);
          });
        }
      };
      for (int64_t row = first_x; args.grad_x && row < last_x; ++row) {
        grad_z_up_to(least(p.out_height, (row + p.top) / p.stride_y + 1));
        grad_x_row<D>(p, args, workspace, image, row);
      }
      if (grad_filter) grad_z_up_to(item.last_row);
    }
  }
}

// ---- run-time choices to template arguments -------------------------------------------------------------------------

void sample_any(const Problem& p, const Forward& args, const Workspace& workspace, double* shift) {
  DEEPOPS_DISPATCH_DTYPE(p.dtype, [&]<class D>() { sample<D>(p, args, workspace, shift); })
}

void statistics_any(const Problem& p, const Forward& args, const Workspace& workspace, int64_t begin, int64_t end) {
  DEEPOPS_DISPATCH_DTYPE(p.dtype, [&]<class D>() {
    p.exact ? statistics<D, double>(p, args, workspace, begin, end)
            : statistics<D, OpMath<D>>(p, args, workspace, begin, end);
  })
}

void forward_any(const Problem& p, const Forward& args, const Workspace& workspace, int64_t begin, int64_t end) {
  DEEPOPS_DISPATCH_DTYPE(p.dtype, [&]<class D>() {
    with_activation(p.activation, p.negative_slope,
                    [&](const auto& act) { forward<D>(p, args, workspace, begin, end, act); });
  })
}

void reduce_any(const Problem& p, const Backward& args, const Workspace& workspace, int64_t begin, int64_t end) {
  DEEPOPS_DISPATCH_DTYPE(p.dtype, [&]<class D>() {
    with_activation(p.activation, p.negative_slope,
                    [&](const auto& act) { reduce<D>(p, args, workspace, begin, end, act); });
  })
}

void gradients_any(const Problem& p, const Backward& args, const Workspace& workspace, int64_t begin, int64_t end) {
  DEEPOPS_DISPATCH_DTYPE(p.dtype, [&]<class D>() {
    with_activation(p.activation, p.negative_slope,
                    [&](const auto& act) { gradients<D>(p, args, workspace, begin, end, act); });
  })
}

}  // namespace

const DepthwiseKernels depthwise_kernels = {sample_any, statistics_any, forward_any, reduce_any, gradients_any};

}  // namespace deepops::DEEPOPS_ISA
