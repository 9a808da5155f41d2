// CPU kernels of depthwise_bn_act for contiguous data; compiled once per instruction set, raw pointers only.
//
//   statistics   sums of z - shift and of its square, in single-precision lanes that soon go to double
//   forward      y = act((z - mean) * scale + bias)
//   reduce       sums of g and of g * (z - mean), g = grad_y * act'(..)
//   gradients    grad_z = scale * (g - mean_grad - (z - mean) * slope_grad); from it grad_x, and the sums of grad_z * x
//                that are the gradient of the filter
//
// Of a channel, some images at a time, as many as the cache holds: a plane by itself has too few lanes.
#include "depthwise_bn_act/planar_rows.h"
// after lanes.h, whose types the formulas are instantiated with
#include "batch_norm_act/batch_norm_act_math.h"

namespace deepops::DEEPOPS_ISA {
namespace {

constexpr int64_t kGradientFlush = 8;  // of the sums of g, whose terms cancel
constexpr int64_t kSamples = 8;

template <class S>
S number(const void* numbers, int64_t channel) {
  return static_cast<const S*>(numbers)[channel];
}

// ---- sums -----------------------------------------------------------------------------------------------------------

// Two sums over lanes, which go to double after `flush` additions.
template <class A>
class TwoSums {
 public:
  explicit TwoSums(int64_t flush) : flush_(flush) {}
  DEEPOPS_INLINE void add(const Lanes<A>& first, const Lanes<A>& second) {
    first_ += first;
    second_ += second;
    if (++added_ == flush_) flush();
  }
  DEEPOPS_INLINE void read(double* sums) {
    flush();
    sums[0] = sum_of_lanes(all_first_);
    sums[1] = sum_of_lanes(all_second_);
  }

 private:
  DEEPOPS_INLINE void flush() {
    all_first_ += widen(first_);
    all_second_ += widen(second_);
    first_ = second_ = Lanes<A>(A(0));
    added_ = 0;
  }
  Lanes<A> first_ = A(0), second_ = A(0);
  Lanes<double> all_first_ = 0.0, all_second_ = 0.0;
  int64_t flush_, added_ = 0;
};

// ---- the passes -----------------------------------------------------------------------------------------------------

// A number near the mean of z, from a few values of a plane.
template <class S>
double near_mean(const Problem& p, const S* x, const S* filter, bool exact) {
  const int64_t samples = p.inner < kSamples ? p.inner : kSamples;
  double sum = 0;
  for (int64_t i = 0; i < samples; ++i) {
    const int64_t at = i * p.inner / samples;
    const S* const from = x + at / p.out_width * p.stride_y * p.x_row + at % p.out_width;
    for (int64_t t = 0; t < p.filter_size(); ++t) sum += double(from[p.taps[t].offset]) * filter[p.taps[t].weight];
  }
  const double wide = sum / double(samples), mean = exact ? wide : double(S(wide));
  return mean - mean == 0 ? mean : 0;  // not finite: any value does
}

inline Lanes<float> as(const Lanes<float>& value, float) { return value; }
inline Lanes<double> as(const Lanes<float>& value, double) { return widen(value); }
inline Lanes<double> as(const Lanes<double>& value, double) { return value; }

// A: in which terms are taken, double where their rounding would show.
template <class S, class A>
void statistics(const Problem& p, const PlanarForward& args, const PlanarMemory& memory, int64_t channel,
                double* sums) {
  const S* const filter = filter_of<S>(p, args.filter, channel);
  S* const x = static_cast<S*>(memory.x);
  TwoSums<A> both(kFlush);
  for_images(p, [&](int64_t first, int64_t images) {
    copy_planes(p, args.x, first, images, channel, false, x);
    if (first == 0) sums[0] = near_mean(p, x, filter, sizeof(A) > sizeof(S));
    const Lanes<A> shift(static_cast<A>(sums[0]));
    for_z(p, x, images, filter, [&](const Place& place, const Lanes<S>& z) __attribute__((always_inline)) {
      const int64_t left = p.out_width - place.column;
      Lanes<A> d = as(z, A()) - shift;
      if (left < kLanes) d = first_of(d, left);
      both.add(d, d * d);
      if (args.in_place) store_part(static_cast<S*>(args.y) + output_at(p, first, channel, place), z, to_end(p, place));
    });
  });
  both.read(sums + 1);
}

template <class S, class Act>
void forward(const Problem& p, const PlanarForward& args, const PlanarMemory& memory, int64_t channel, const Act& act) {
  const Lanes<S> mean(number<S>(args.mean, channel)), scale(number<S>(args.scale, channel));
  const Lanes<S> bias(number<S>(args.bias, channel));
  S *const x = static_cast<S*>(memory.x), *const y = static_cast<S*>(args.y);
  const auto result = [&](const Lanes<S>& z)
                          __attribute__((always_inline)) { return act.forward((z - mean) * scale + bias); };
  for (int64_t image = 0; args.in_place && image < p.batch; ++image) {
    S* const plane = y + output_at(p, image, channel, {});
    for (int64_t i = 0; i < p.inner; i += kLanes)
      store_part(plane + i, result(load_part(plane + i, p.inner - i)), p.inner - i);
  }
  if (args.in_place) return;
  for_images(p, [&](int64_t first, int64_t images) {
    copy_planes(p, args.x, first, images, channel, true, x);
    for_z(p, x, images, filter_of<S>(p, args.filter, channel),
          [&](const Place& place, const Lanes<S>& z) __attribute__((always_inline)) {
            store_part(y + output_at(p, first, channel, place), result(z), to_end(p, place));
          });
  });
}

// Of z, where all of a channel is kept from one pass of the backward to the next.
template <class S>
DEEPOPS_INLINE S* kept_z(const Problem& p, const PlanarMemory& memory, const Place& place) {
  return static_cast<S*>(memory.z) + (place.image * p.out_height + place.row) * p.z_pitch + place.column;
}

// each(place, g, z - mean) for the outputs of a block of images, whose x is in `memory`. again: z was computed before.
template <class S, bool again, class Act, class Each>
DEEPOPS_INLINE void for_gradient(const Problem& p, const PlanarBackward& args, const PlanarMemory& memory,
                                 int64_t first, int64_t images, int64_t channel, const Act& act, const Each& each) {
  const Lanes<S> mean(number<S>(args.mean, channel)), scale(number<S>(args.scale, channel));
  const Lanes<S> bias(number<S>(args.bias, channel));
  const int64_t next = ahead(p, first, p.inner);
  const auto one = [&](const Place& place, const Lanes<S>& z) __attribute__((always_inline)) {
    const Lanes<S> centered = z - mean;
    const S* const grad_y = static_cast<const S*>(args.grad_y) + output_at(p, first, channel, place);
    if (!again) __builtin_prefetch(grad_y + next, 0, 2);
    each(place, act.backward(load_part(grad_y, to_end(p, place)), centered * scale + bias), centered);
  };
  if (again && p.keep) {
    for (Place place{}; place.image < images; ++place.image)
      for (place.row = 0; place.row < p.out_height; ++place.row)
        for (place.column = 0; place.column < p.out_width; place.column += kLanes)
          one(place, load_lanes(kept_z<S>(p, memory, place)));
    return;
  }
  for_z(p, static_cast<const S*>(memory.x), images, filter_of<S>(p, args.filter, channel),
        [&](const Place& place, const Lanes<S>& z) __attribute__((always_inline)) {
          if (p.keep) store_lanes(kept_z<S>(p, memory, place), z);
          one(place, z);
        });
}

template <class S, class Act>
void reduce(const Problem& p, const PlanarBackward& args, const PlanarMemory& memory, int64_t channel, double* sums,
            const Act& act) {
  TwoSums<S> both(p.exact ? 1 : kGradientFlush);
  for_images(p, [&](int64_t first, int64_t images) {
    copy_planes(p, args.x, first, images, channel, false, static_cast<S*>(memory.x));
    for_gradient<S, false>(
        p, args, memory, first, images, channel, act,
        [&](const Place& place, const Lanes<S>& g, const Lanes<S>& centered) __attribute__((always_inline)) {
          const int64_t left = p.out_width - place.column;
          left < kLanes ? both.add(first_of(g, left), first_of(g * centered, left)) : both.add(g, g * centered);
        });
  });
  both.read(sums);
}

// ---- the gradient of x ----------------------------------------------------------------------------------------------

// Of the places with the same remainders of their row and column, which are those of grad_z with the same taps. to: of
// the first of a block of images.
template <class S>
void grad_x_phase(const Problem& p, const PlanarMemory& memory, int64_t images, int64_t phase, const Tap* taps,
                  int64_t count, const S* filter, S* to) {
  const int64_t first_row = phase / p.stride_x, first_column = phase % p.stride_x;
  if (first_row >= p.height || first_column >= p.width) return;
  const Place size{images, (p.height - first_row - 1) / p.stride_y + 1, (p.width - 1) / p.stride_x + 1};
  const S* const grad = static_cast<const S*>(memory.grad) + p.grad_above * p.grad_pitch + p.grad_left;
  for_outputs(grad, p.grad_values(), p.grad_pitch, size, taps, count, filter,
              [&](const Place& place, const Lanes<S>& value) __attribute__((always_inline)) {
                const int64_t x = p.stride_x * place.column, left = p.width - x;
                const int64_t row = place.image * p.channels * p.height + first_row + place.row * p.stride_y;
                S* const at = to + row * p.width + x;
                S* const half = static_cast<S*>(memory.half) + place.image * p.half_values() +
                                place.row * p.half_pitch + place.column;
                if (p.stride_x == 1) {  // as for y, but with a stride not all rows come in their order
                  store_part(at, value, p.stride_y == 1 ? (p.height - place.row) * p.width - x : left);
                } else if (p.stride_x > 2) {
                  for (int64_t i = 0, j = first_column; i < kLanes && j < left; ++i, j += p.stride_x) at[j] = value[i];
                } else if (first_column == 0 && p.width > 1) {
                  store_lanes(half, value);
                } else {
                  Lanes<S> first, second;
                  join(p.width > 1 ? load_lanes(half) : value, value, first, second);
                  store_part(at, first, left);
                  store_part(at + kLanes, second, left - kLanes);
                }
              });
}

template <class S, class Act>
void gradients(const Problem& p, const PlanarBackward& args, const PlanarMemory& memory, int64_t channel,
               const Act& act) {
  const Lanes<S> mean_grad(number<S>(args.mean_grad, channel)), slope_grad(number<S>(args.slope_grad, channel));
  const Lanes<S> scale(number<S>(args.scale, channel));
  const S* const filter = filter_of<S>(p, args.filter, channel);
  S *const x = static_cast<S*>(memory.x), *const grad = static_cast<S*>(memory.grad);
  for (int64_t i = 0; i < p.filter_size() * kLanes; ++i) memory.filter_sums[i] = 0;
  for_images(p, [&](int64_t first, int64_t images) {
    copy_planes(p, args.x, first, images, channel, true, x);
    for_gradient<S, true>(
        p, args, memory, first, images, channel, act,
        [&](const Place& place, const Lanes<S>& g, const Lanes<S>& centered) __attribute__((always_inline)) {
          const Lanes<S> value = scale * (g - mean_grad - centered * slope_grad);
          S* const to = grad + place.image * p.grad_values() + (p.grad_above + place.row) * p.grad_pitch + p.grad_left;
          const int64_t left = p.out_width - place.column;
          store_lanes(to + place.column, left < kLanes ? first_of(value, left) : value);
        });
    for (int64_t t = 0; args.grad_filter && t < p.filter_size(); t += kTapsAtOnce)
      correlate(p, x, grad, images, p.taps + t, p.filter_size() - t, memory.filter_sums);
    if (!args.grad_x) return;
    S* const grad_x = static_cast<S*>(args.grad_x) + (first * p.channels + channel) * p.height * p.width;
    const Tap *tap = p.grad_taps, *const end = tap + p.filter_size();
    for (int64_t phase = 0; phase < p.stride_y * p.stride_x; ++phase) {
      const Tap* const start = tap;
      while (tap != end && tap->phase == phase) ++tap;
      grad_x_phase(p, memory, images, phase, start, tap - start, filter, grad_x);
    }
  });
  for (int64_t t = 0; args.grad_filter && t < p.filter_size(); ++t)
    args.grad_filter[channel * p.filter_size() + t] = sum_of_lanes(load_lanes(memory.filter_sums + t * kLanes));
}

// ---- run-time choices to template arguments -------------------------------------------------------------------------

template <class Call>
void with_type(const Problem& p, const Call& call) {
  p.dtype == core::DataType::f64 ? call.template operator()<double>() : call.template operator()<float>();
}

void statistics_any(const Problem& p, const PlanarForward& args, const PlanarMemory& memory, int64_t channel,
                    bool exact, double* sums) {
  with_type(p, [&]<class S>() {
    exact ? statistics<S, double>(p, args, memory, channel, sums) : statistics<S, S>(p, args, memory, channel, sums);
  });
}

void forward_any(const Problem& p, const PlanarForward& args, const PlanarMemory& memory, int64_t channel) {
  with_type(p, [&]<class S>() {
    with_activation(p.activation, p.negative_slope,
                    [&](const auto& act) { forward<S>(p, args, memory, channel, act); });
  });
}

void reduce_any(const Problem& p, const PlanarBackward& args, const PlanarMemory& memory, int64_t channel,
                double* sums) {
  with_type(p, [&]<class S>() {
    with_activation(p.activation, p.negative_slope,
                    [&](const auto& act) { reduce<S>(p, args, memory, channel, sums, act); });
  });
}

void gradients_any(const Problem& p, const PlanarBackward& args, const PlanarMemory& memory, int64_t channel) {
  with_type(p, [&]<class S>() {
    with_activation(p.activation, p.negative_slope,
                    [&](const auto& act) { gradients<S>(p, args, memory, channel, act); });
  });
}

}  // namespace

const DepthwisePlanarKernels depthwise_planar_kernels = {statistics_any, forward_any, reduce_any, gradients_any};

}  // namespace deepops::DEEPOPS_ISA
