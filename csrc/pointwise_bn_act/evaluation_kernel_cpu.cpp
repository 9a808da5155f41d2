// CPU kernels of pointwise_bn_act_eval; compiled once per instruction set, raw pointers only.
//
// With adjacent channels a panel is 64 output channels, its weights packed, and multiplied by rows of x. Else a panel
// is 64 pixels of all channels of an image, and multiplied by rows of W.
#include "pointwise_bn_act/evaluation.h"

#include "core/packed_product.h"
#include "core/parts.h"
// after lanes.h, whose types the formulas are instantiated with
#include "batch_norm_act/batch_norm_act_math.h"

namespace deepops::DEEPOPS_ISA {
namespace {

template <class S, class Act>
class Evaluation {
 public:
  Evaluation(const PointwiseEvaluation& args, const Act& act, void* workspace)
      : p(args), act_(act), workspace_(static_cast<S*>(workspace)) {}

  // Rows [begin, end) of the output.
  void rows(int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; block += PointwiseEvaluation::kRowsAtOnce) {
      const int64_t count = least(PointwiseEvaluation::kRowsAtOnce, end - block);
      const S* const x = rows_of_x(block, count);
      for (int64_t column = 0; column < p.channels; column += kPanel)
        for_row_tiles<S>(0, count, [&](int64_t first, int64_t height) {
          if (column == 0) fetch(block + count + first, least(height, end - block - count - first));
          multiply(x + first * p.inputs, p.inputs, height, p.inputs, weight() + column * p.inputs, sums_.value, false,
                   int(least(kPanel, p.channels - column)));
          for (int lane = 0; lane < least(kPanel, p.channels - column); lane += kLanes) {
            const int64_t valid = p.channels - column - lane;
            const Lanes<S> bias = load_part(static_cast<const S*>(p.bias) + column + lane, valid);
            for (int64_t r = 0; r < height; ++r)
              finish(sum(r, lane) + bias, (block + first + r) * p.channels + column + lane, valid);
          }
        });
    }
  }

  // Panels of pixels.
  void panels(int64_t begin, int64_t end) {
    const int64_t of_image = panels_of(p.pixels());
    for (int64_t item = begin; item < end; ++item) {
      const int64_t image = item / of_image, pixel = item % of_image * kPanel,
                    count = least(kPanel, p.pixels() - pixel);
      load_panel(image, pixel, count);
      for_row_tiles<S>(0, p.channels, [&](int64_t first, int64_t height) {
        multiply(weight() + first * p.inputs, p.inputs, height, p.inputs, workspace_, sums_.value, false, int(count));
        for (int64_t r = 0; r < height; ++r) {
          const Lanes<S> bias(static_cast<const S*>(p.bias)[first + r]);
          const int64_t to = (image * p.channels + first + r) * p.pixels() + pixel;
          for (int lane = 0; lane < count; lane += kLanes) finish(sum(r, lane) + bias, to + lane, count - lane);
        }
      });
    }
  }

 private:
  const S* weight() const { return static_cast<const S*>(p.weight); }
  Lanes<S> sum(int64_t row, int lane) const { return load_lanes(sums_.value + row * kPanel + lane); }

  // `valid` of 16 outputs.
  void finish(Lanes<S> z, int64_t at, int64_t valid) const {
    if (p.residual) z = z + load_part(static_cast<const S*>(p.residual) + at, valid);
    S* const y = static_cast<S*>(p.y) + at;
    if (p.stream) {
      stream_lanes(y, act_.forward(z));
    } else {
      store_part(y, act_.forward(z), valid);
    }
  }

  // The place in x of a row of outputs, in values of one channel.
  int64_t place(int64_t row) const {
    const int64_t image = row / p.pixels(), pixel = row % p.pixels();
    return (image * p.height + pixel / p.out_width * p.stride_y) * p.width + pixel % p.out_width * p.stride_x;
  }
  const S* rows_of_x(int64_t first, int64_t count) const {
    const S* const x = static_cast<const S*>(p.x);
    if (p.is_dense()) return x + first * p.inputs;
    for (int64_t row = 0; row < count; ++row) {
      const S* const from = x + place(first + row) * p.inputs;
      for (int64_t c = 0; c < p.inputs; c += kLanes)
        store_part(workspace_ + row * p.inputs + c, load_part(from + c, p.inputs - c), p.inputs - c);
    }
    return workspace_;
  }
  // Rows of the next block, for the second-level cache: a tile reads several rows at once, which the hardware does not
  // see coming. Few outputs wait for x longer than they take to compute.
  void fetch(int64_t first, int64_t count) const {
    constexpr int64_t kLine = 64 / int64_t(sizeof(S));
    if (!p.is_dense()) return;
    const S* const from = static_cast<const S*>(p.x) + first * p.inputs;
    for (int64_t i = 0; i < count * p.inputs; i += kLine) __builtin_prefetch(from + i, 0, 2);
  }
  // [C][64] in the workspace; 0 beyond `count`.
  void load_panel(int64_t image, int64_t pixel, int64_t count) const {
    const int64_t plane = p.height * p.width;
    for (int64_t c = 0; c < p.inputs; ++c) {
      const S* const from = static_cast<const S*>(p.x) + (image * p.inputs + c) * plane;
      S* const to = workspace_ + c * kPanel;
      for (int lane = 0; p.is_dense() && lane < kPanel; lane += kLanes)
        store_lanes(to + lane, lane < count ? load_part(from + pixel + lane, count - lane) : Lanes<S>(S(0)));
      for (int64_t i = 0; !p.is_dense() && i < kPanel; ++i) to[i] = i < count ? from[place(pixel + i)] : S(0);
    }
  }

  const PointwiseEvaluation& p;
  const Act act_;
  S* const workspace_;
  PanelSums<S> sums_;
};

template <class S>
void run(const PointwiseEvaluation& p, void* workspace, int64_t begin, int64_t end) {
  with_activation(p.activation, p.negative_slope, [&]<class Act>(const Act& act) {
    Evaluation<S, Act> evaluation(p, act, workspace);
    p.channels_adjacent ? evaluation.rows(begin, end) : evaluation.panels(begin, end);
  });
  if (p.stream) finish_streaming();
}

template <class S>
void pack(const PointwiseEvaluation& p, const void* weight, void* panels, int64_t begin, int64_t end) {
  const int64_t column = begin * kPanel;
  pack_transposed(static_cast<const S*>(weight) + column * p.inputs, least(end * kPanel, p.channels) - column, p.inputs,
                  static_cast<S*>(panels) + column * p.inputs);
}

void pack_any(const PointwiseEvaluation& p, const void* weight, void* panels, int64_t begin, int64_t end) {
  p.dtype == core::DataType::f64 ? pack<double>(p, weight, panels, begin, end)
                                 : pack<float>(p, weight, panels, begin, end);
}
void run_any(const PointwiseEvaluation& p, void* workspace, int64_t begin, int64_t end) {
  p.dtype == core::DataType::f64 ? run<double>(p, workspace, begin, end) : run<float>(p, workspace, begin, end);
}

}  // namespace

const PointwiseEvaluationKernels pointwise_evaluation_kernels = {pack_any, run_any};

}  // namespace deepops::DEEPOPS_ISA
