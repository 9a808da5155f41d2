// Planes of depthwise_bn_act's contiguous data in lanes of 16 neighbouring outputs: copies with padding, the
// convolution, the gradient of its filter.
//
// Compiled once per instruction set; include it from the planar kernel file only.
#pragma once
#include "core/lane_order.h"
#include "depthwise_bn_act/planes.h"

namespace deepops::DEEPOPS_ISA {
namespace {

using Problem = DepthwisePlanes;
using Tap = PlanarTap;

constexpr int64_t kFlush = 32;  // additions in single precision of a statistic, of a filter's gradient

// ---- planes ---------------------------------------------------------------------------------------------------------

template <class S>
const S* plane(const Problem& p, const void* x, int64_t image, int64_t channel) {
  return static_cast<const S*>(x) + (image * p.channels + channel) * p.height * p.width;
}

// From a plane of `size` values to the one that is worked on a block of images later: of the next images, or of the
// next channel. Each is too short for the hardware to be ahead of it, so it is fetched meanwhile; beyond the last one
// nothing happens.
inline int64_t ahead(const Problem& p, int64_t image, int64_t size) {
  return (image + p.images < p.batch ? p.images * p.channels : (p.images - p.batch) * p.channels + 1) * size;
}

// each(first, images) for blocks of images.
template <class Each>
DEEPOPS_INLINE void for_images(const Problem& p, const Each& each) {
  for (int64_t image = 0; image < p.batch; image += p.images)
    each(image, image + p.images < p.batch ? p.images : p.batch - image);
}

// A plane of x into its place between the padding. Rows end in zeros. next: how far away the next one begins, or 0
// where that is in the cache.
template <class S>
void copy_plane(const Problem& p, const S* from, int64_t next, S* to) {
  constexpr int64_t kLine = 64 / int64_t(sizeof(S));
  const int64_t width = p.width, x_row = p.x_row, left = p.left;
  for (int64_t i = 0; next != 0 && i < p.height * width; i += kLine) __builtin_prefetch(from + next + i, 0, 2);
  S* row = to + p.top * x_row;
  for (const S* const end = from + p.height * width; from != end; from += width, row += x_row) {
    if (p.stride_x == 1) {
      for (int64_t x = 0; x < width; x += kLanes) store_lanes(row + left + x, load_part(from + x, width - x));
    } else if (p.stride_x == 2) {
      S* const even = row + left % 2 * p.x_pitch + left / 2;
      S* const odd = row + (left + 1) % 2 * p.x_pitch + (left + 1) / 2;
      for (int64_t x = 0; x < width; x += 2 * kLanes) {
        Lanes<S> evens, odds;
        split(load_part(from + x, width - x), load_part(from + x + kLanes, width - x - kLanes), evens, odds);
        store_lanes(even + x / 2, evens);
        store_lanes(odd + x / 2, odds);
      }
    } else {
      for (int64_t x = 0; x < width; ++x) {
        const int64_t u = left + x;
        row[u % p.stride_x * p.x_pitch + u / p.stride_x] = from[x];
      }
    }
  }
}

// Those of a block of images. again: they have been there before.
template <class S>
void copy_planes(const Problem& p, const void* x, int64_t first, int64_t images, int64_t channel, bool again, S* to) {
  if (again && p.keep) return;
  for (int64_t image = first; image < first + images; ++image, to += p.x_values())
    copy_plane(p, plane<S>(p, x, image, channel), again ? 0 : ahead(p, image, p.height * p.width), to);
}

// ---- convolution ----------------------------------------------------------------------------------------------------

// The sums of `outputs` places, run by run: sums of sums are more accurate than one long sum, and cost no more
// additions.
template <class S, int outputs>
DEEPOPS_INLINE void convolve(const S* const (&at)[outputs], const Tap* taps, int64_t count, const S* filter,
                             Lanes<S> (&sum)[outputs]) {
  for (int k = 0; k < outputs; ++k) sum[k] = Lanes<S>(S(0));
  for (const Tap *tap = taps, *const end = taps + count; tap != end;) {
    Lanes<S> part[outputs];
    const Lanes<S> weight(filter[tap->weight]);
    _Pragma("GCC unroll 8") for (int k = 0; k < outputs; ++k) part[k] = load_lanes(at[k] + tap->offset) * weight;
    for (const Tap* const stop = tap + tap->run; ++tap != stop;) {
      const Lanes<S> next(filter[tap->weight]);
      _Pragma("GCC unroll 8") for (int k = 0; k < outputs; ++k) part[k] += load_lanes(at[k] + tap->offset) * next;
    }
    _Pragma("GCC unroll 8") for (int k = 0; k < outputs; ++k) sum[k] += part[k];
  }
}

// Outputs of one place in a block of images.
struct Place {
  int64_t image, row, column;
};

// each(place, lanes of 16 outputs from there) for all of [images, rows, columns]; a row's last lanes go beyond it.
// Outputs of the next image lie `image_step` further on in `in`, those of the next row `row_step`.
template <class S, class Each>
DEEPOPS_INLINE void for_outputs(const S* in, int64_t image_step, int64_t row_step, const Place& size, const Tap* taps,
                                int64_t count, const S* filter, const Each& each) {
  constexpr int kAtOnce = kVectorBytes == 64 ? 4 : Lanes<S>::kParts == 2 ? 2 : 1;
  Place place{};
  const auto block = [&]<int outputs>() __attribute__((always_inline)) {
    const S* at[outputs];
    Place places[outputs];
    _Pragma("GCC unroll 8") for (int k = 0; k < outputs; ++k) {
      at[k] = in + place.image * image_step + place.row * row_step + place.column;
      places[k] = place;
      place.column += kLanes;
      if (place.column < size.column) continue;
      place.column = 0;
      if (++place.row < size.row) continue;
      place.row = 0;
      ++place.image;
    }
    Lanes<S> sum[outputs];
    convolve<S, outputs>(at, taps, count, filter, sum);
    _Pragma("GCC unroll 8") for (int k = 0; k < outputs; ++k) each(places[k], sum[k]);
  };
  int64_t left = size.image * size.row * ((size.column + kLanes - 1) / kLanes);
  for (; left >= kAtOnce; left -= kAtOnce) block.template operator()<kAtOnce>();
  for (; left > 0; --left) block.template operator()<1>();
}

// Of y and grad_y. first: of the block of images.
DEEPOPS_INLINE int64_t output_at(const Problem& p, int64_t first, int64_t channel, const Place& place) {
  return ((first + place.image) * p.channels + channel) * p.inner + place.row * p.out_width + place.column;
}

// Values from a place to the end of its plane of y. Beyond the end of a row the next one may be read, and written if
// rows come in their order: whole lanes, where stores of parts of them are slow on many machines.
DEEPOPS_INLINE int64_t to_end(const Problem& p, const Place& place) {
  return p.inner - place.row * p.out_width - place.column;
}

// for_outputs for z of the planes in `x`.
template <class S, class Each>
DEEPOPS_INLINE void for_z(const Problem& p, const S* x, int64_t images, const S* filter, const Each& each) {
  for_outputs(x, p.x_values(), p.stride_y * p.x_row, {images, p.out_height, p.out_width}, p.taps, p.filter_size(),
              filter, each);
}

template <class S>
const S* filter_of(const Problem& p, const void* filter, int64_t channel) {
  return static_cast<const S*>(filter) + channel * p.filter_size();
}

// ---- the gradient of the filter -------------------------------------------------------------------------------------

constexpr int kTapsAtOnce = kVectorBytes == 64 ? 9 : kVectorBytes == 32 ? 5 : 3;

// sums[weight][16] += products of grad_z and x, for up to kTapsAtOnce taps.
template <class S, int count = kTapsAtOnce>
void correlate(const Problem& p, const S* x, const S* grad, int64_t images, const Tap* taps, int64_t size,
               double* sums) {
  if constexpr (count > 1) {
    if (size < count) return correlate<S, count - 1>(p, x, grad, images, taps, size, sums);
  }
  Lanes<S> sum[count];
  for (int t = 0; t < count; ++t) sum[t] = Lanes<S>(S(0));
  const auto flush = [&]() __attribute__((always_inline)) {
    for (int t = 0; t < count; ++t) {
      double* const to = sums + taps[t].weight * kLanes;
      store_lanes(to, load_lanes(to) + widen(sum[t]));
      sum[t] = Lanes<S>(S(0));
    }
  };
  int64_t added = 0;
  for (int64_t image = 0; image < images; ++image, x += p.x_values(), grad += p.grad_values())
    for (int64_t row = 0; row < p.out_height; ++row) {
      const S* const grads = grad + (p.grad_above + row) * p.grad_pitch + p.grad_left;
      const S* const values = x + row * p.stride_y * p.x_row;
      for (int64_t column = 0; column < p.out_width; column += kLanes) {
        const Lanes<S> value = load_lanes(grads + column);
        _Pragma("GCC unroll 16") for (int t = 0; t < count; ++t) sum[t] +=
            load_lanes(values + column + taps[t].offset) * value;
        if (++added == kFlush) flush(), added = 0;
      }
    }
  flush();
}

}  // namespace
}  // namespace deepops::DEEPOPS_ISA
