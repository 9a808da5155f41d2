// batch_norm_act on CUDA: the shapes of grids, allocation, launches, registration.
//
// At most two launches a pass: sums, then elementwise work. Grids depend on the shape alone, and so does every sum.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "batch_norm_act/batch_norm_act_kernels.cuh"
#include "batch_norm_act/host.h"
#include "core/allocate.h"

namespace deepops::isa_gpu {
namespace {

using torch::headeronly::ScalarType;

// What a block has to do at least, so that what it loads beside its data stays below 2 % of that, and how many blocks
// there are at most; a device has up to 160 multiprocessors.
constexpr int64_t kChunksPerPart = 1024, kChunksPerPiece = 1536;    // planar
constexpr int64_t kRowsPerPart = 256, kRowsPerPiece = 544;          // rows, but fewer where blocks would be few
constexpr int64_t kMostPartBlocks = 4096, kMostPieceBlocks = 1024;  // rows
constexpr int64_t kFewBlocks = 92, kFewPlaneBlocks = 4 * kFewBlocks;

int64_t up(int64_t value, int64_t to) { return (value + to - 1) / to; }  // division, rounded up

int log2_up(int64_t value) {
  int log = 0;
  while (int64_t(1) << log < value) ++log;
  return log;
}

enum class Pass { elementwise, reduction };

// ---- the shape of a grid --------------------------------------------------------------------------------------------

// How streams lie in memory. Null pointers do not count.
struct Alignment {
  static constexpr int64_t kSector = 32;
  int64_t bytes = -1;  // from a sector to the first stream
  bool same = true;    // as to packs
  template <class... P>
  explicit Alignment(const P*... data) {
    (see(data), ...);
  }
  void see(const void* data) {
    if (!data) return;
    const int64_t at = int64_t(reinterpret_cast<uintptr_t>(data) % kSector);
    if (bytes < 0) bytes = at;
    same &= (at - bytes) % gpu::kPackBytes == 0;
  }
  bool packs() const { return same && bytes % gpu::kPackBytes == 0; }
};

template <class T>
Planar<T> planar(const BatchNormActShape& p, const Alignment& alignment, Pass pass) {
  constexpr int V = Planar<T>::V;
  Planar<T> view{};
  view.batch = p.batch;
  view.channels = int(p.channels);
  view.inner = p.inner;
  view.packs = alignment.same;
  view.lead = alignment.same ? int(alignment.bytes / int64_t(sizeof(T))) : 0;
  const bool even = !view.packs || (view.lead == 0 && p.inner % (2 * V) == 0);
  const int64_t chunks = up(even ? p.inner : p.inner + 2 * V - 1, V);  // of a plane, at most
  // The largest group that leaves at most a fifth of its threads idle, else the one that leaves the fewest.
  int64_t least = INT64_MAX;
  for (int log = log2_up(kThreads); log >= 2; --log) {
    const int64_t taken = up(chunks, 1 << log) << log;
    if (taken >= least) continue;
    least = taken;
    view.log_group = log;
    if (taken * 4 <= chunks * 5) break;
  }
  view.parts = int(up(chunks, kChunksPerPart + kChunksPerPart / 2));
  view.part_chunks = up(up(chunks, view.parts), 1 << view.log_group) << view.log_group;
  const int64_t groups = kThreads >> view.log_group, planes = p.batch * p.channels;
  view.planes_per_block = 1;
  if (view.parts == 1) {
    const int64_t most = std::min(kChunksPerPart / chunks, planes / kFewPlaneBlocks);
    view.planes_per_block = int(std::clamp<int64_t>(most / groups * groups, groups, kPlanesPerBlock));
  }
  view.pieces = 1;
  if (pass == Pass::reduction) {
    const int64_t wanted = std::min(p.batch * chunks / kChunksPerPiece, up(kMostPieceBlocks, p.channels));
    view.pieces = int(std::clamp<int64_t>(wanted, 1, p.batch * view.parts));
  }
  return view;
}
template <class T>
int64_t blocks(const Planar<T>& view, Pass pass) {
  return pass == Pass::reduction ? int64_t(view.channels) * view.pieces
                                 : up(view.batch * view.channels, view.planes_per_block) * view.parts;
}
template <class T>
int64_t tiles(const Planar<T>& view) {
  return view.channels;
}
template <class T>
int64_t columns(const Planar<T>&) {
  return 1;
}

template <class T, int V>
Rows<T, V> rows(const BatchNormActShape& p, Pass pass) {
  Rows<T, V> view{};
  view.rows = p.count();
  view.channels = int(p.channels);
  const int64_t packs = up(p.channels, V);
  view.log_lanes = std::min(log2_up(packs), Rows<T, V>::kLogLanes);
  view.tiles = int(up(packs, 1 << view.log_lanes));
  const bool reduces = pass == Pass::reduction;
  const int64_t at_once = kThreads >> view.log_lanes, all = view.rows * view.tiles;
  const int64_t enough = std::max(reduces ? kRowsPerPiece : kRowsPerPart, 4 * at_once);
  const int64_t per_block =
      std::max(std::min(all / kFewBlocks, enough), up(all, reduces ? kMostPieceBlocks : kMostPartBlocks));
  view.rows_per_block = up(std::max<int64_t>(per_block, 1), at_once) * at_once;
  view.pieces = int(up(view.rows, view.rows_per_block));
  return view;
}
template <class T, int V>
int64_t blocks(const Rows<T, V>& view, Pass) {
  return int64_t(view.tiles) * view.pieces;
}
template <class T, int V>
int64_t tiles(const Rows<T, V>& view) {
  return view.tiles;
}
template <class T, int V>
int64_t columns(const Rows<T, V>& view) {
  return V << view.log_lanes;
}

// call(view) with the view that fits the data.
template <class T, class Call>
void with_view(const BatchNormActShape& p, const Alignment& alignment, Pass pass, const Call& call) {
  constexpr int V = gpu::Pack<T>::kSize;
  if (!p.channels_adjacent) return call(planar<T>(p, alignment, pass));
  if (alignment.packs() && p.channels % V == 0) return call(rows<T, V>(p, pass));
  call(rows<T, 1>(p, pass));
}

// Doubles of workspace for the sums of a reduction, and where it then finds them.
template <class View>
int64_t workspace(const View& view) {
  return view.pieces == 1 ? 0 : tiles(view) * (2 * columns(view) * view.pieces + 1);
}
template <class View>
Pieces pieces_of(const View& view, double* memory, gpu::Stream stream) {
  if (view.pieces == 1) return {nullptr, nullptr};
  auto* arrived = reinterpret_cast<unsigned*>(memory + tiles(view) * 2 * columns(view) * view.pieces);
  gpu::zero(arrived, tiles(view) * sizeof(unsigned), stream);
  return {memory, arrived};
}

// ---- arguments ------------------------------------------------------------------------------------------------------

template <class A>
const A* input(const OptionalTensor& tensor) {
  return tensor.has_value() ? static_cast<const A*>(tensor->const_data_ptr()) : nullptr;
}
template <class A>
A* output(const OptionalTensor& tensor) {
  return tensor.has_value() ? static_cast<A*>(tensor->mutable_data_ptr()) : nullptr;
}

template <class A>
AffineSource<A> source_of(const Tensor& mean, const Tensor& invstd, const OptionalTensor& weight,
                          const OptionalTensor& bias) {
  return {input<A>(mean), input<A>(invstd), input<A>(weight), input<A>(bias)};
}

BatchNormActShape shape_on_gpu(const Tensor& x, const std::string& activation, double negative_slope) {
  STD_TORCH_CHECK(gpu::on_gpu(x), "batch_norm_act: x must be on the GPU");
  const BatchNormActShape p = shape_of(x, activation, negative_slope);
  STD_TORCH_CHECK(p.channels <= INT32_MAX / 2, "batch_norm_act: x has ", p.channels, " channels");
  return p;
}

Tensor doubles(int64_t count, const Tensor& like) { return core::empty_vector(count, ScalarType::Double, like); }

// ---- forward --------------------------------------------------------------------------------------------------------

// One thread: what is left of a step without data.
DEEPOPS_KERNEL(1) count_batch(int64_t* num_batches_tracked) {
  gpu::store(num_batches_tracked, gpu::load(num_batches_tracked) + 1);
}

template <class T>
void launch_forward(const BatchNormActShape& p, const Tensor& x, const OptionalTensor& residual,
                    const AffineSource<OpMath<T>>& source, const Tensor& y, int64_t* num_batches_tracked,
                    gpu::Stream stream) {
  const Forward<T> args{input<T>(x),  input<T>(residual), output<T>(y),       source,
                        p.activation, p.negative_slope,   num_batches_tracked};
  const Alignment alignment(args.x, args.residual, args.y);
  with_view<T>(p, alignment, Pass::elementwise, [&]<class View>(const View& view) {
    gpu::launch("batch_norm_act_forward", forward<T, View>, blocks(view, Pass::elementwise), kThreads, stream, args,
                view);
  });
}

std::tuple<Tensor, Tensor, Tensor> train(Tensor x, OptionalTensor residual, OptionalTensor weight, OptionalTensor bias,
                                         OptionalTensor running_mean, OptionalTensor running_var,
                                         OptionalTensor num_batches_tracked, std::optional<double> momentum, double eps,
                                         std::string activation, double negative_slope) {
  BatchNormActShape p = shape_on_gpu(x, activation, negative_slope);
  check_train(p, x, residual, weight, bias, running_mean, running_var, num_batches_tracked);
  const gpu::Device device(x);
  const ScalarType type = core::opmath_scalar_type(p.dtype);
  Tensor mean = core::empty_vector(p.channels, type, x), invstd = core::empty_vector(p.channels, type, x);
  Tensor y = core::empty_like(x);
  int64_t* counter = output<int64_t>(num_batches_tracked);
  if (x.numel() == 0) {  // no statistics to take; as in torch nothing is learnt from an empty batch
    torch::stable::zero_(mean);
    torch::stable::zero_(invstd);
    if (counter) gpu::launch("batch_norm_act_count", count_batch, 1, 1, device.stream(), counter);
    return {y, mean, invstd};
  }
  // A block of the rows view has few rows: fewer samples keep what it loads for them below 2 % of its data.
  if (p.channels_adjacent && !p.exact) place_samples(p, 2);
  const double count = double(p.count());
  DEEPOPS_DISPATCH_DTYPE(p.dtype, [&]<class T>() {
    using A = OpMath<T>;
    Statistics<T> args{};
    args.x = input<T>(x);
    args.shape = p;
    args.mean = output<A>(mean);
    args.invstd = output<A>(invstd);
    args.running_mean = output<A>(running_mean);
    args.running_var = output<A>(running_var);
    args.num_batches_tracked = momentum.has_value() ? nullptr : counter;
    args.factor = momentum.value_or(0);  // as torch: no update for momentum=None without a count
    args.eps = eps;
    args.per_count = 1 / count;
    args.unbiased = count / (count - 1);
    args.per_sample = 1 / double(p.samples);
    with_view<T>(p, Alignment(args.x), Pass::reduction, [&]<class View>(const View& view) {
      const Tensor memory = doubles(workspace(view), x);
      args.pieces = pieces_of(view, static_cast<double*>(memory.mutable_data_ptr()), device.stream());
      gpu::launch("batch_norm_act_statistics", statistics<T, View>, blocks(view, Pass::reduction), kThreads,
                  device.stream(), args, view);
    });
    launch_forward<T>(p, x, residual, source_of<A>(mean, invstd, weight, bias), y, counter, device.stream());
  });
  return {y, mean, invstd};
}

Tensor eval(Tensor x, OptionalTensor residual, OptionalTensor weight, OptionalTensor bias, Tensor mean, Tensor invstd,
            std::string activation, double negative_slope) {
  const BatchNormActShape p = shape_on_gpu(x, activation, negative_slope);
  check_eval(p, x, residual, weight, bias, mean, invstd);
  const gpu::Device device(x);
  Tensor y = core::empty_like(x);
  if (x.numel() == 0) return y;
  DEEPOPS_DISPATCH_DTYPE(p.dtype, [&]<class T>() {
    launch_forward<T>(p, x, residual, source_of<OpMath<T>>(mean, invstd, weight, bias), y, nullptr, device.stream());
  });
  return y;
}

// ---- backward -------------------------------------------------------------------------------------------------------

struct Gradients {
  OptionalTensor x, residual, weight, bias;  // those that are wanted
};

template <class T>
void launch_backward(const BatchNormActShape& p, Gradient<T> gradient, const AffineSource<OpMath<T>>& source,
                     bool training, const Gradients& wanted, const Tensor& x, gpu::Stream stream) {
  using A = OpMath<T>;
  const bool want_statistics = training && wanted.x.has_value(), want_sums = want_statistics || wanted.weight;
  Backward<T> args{gradient, source, nullptr, nullptr, output<T>(wanted.x), output<T>(wanted.residual)};
  OptionalTensor memory;  // the two means, then the sums
  if (want_sums) {
    const Alignment alignment(gradient.grad_y, gradient.x, gradient.kept);
    with_view<T>(p, alignment, Pass::reduction, [&]<class View>(const View& view) {
      memory = doubles(2 * p.channels + workspace(view), x);
      double* const data = output<double>(memory);
      auto* const mean_grad = reinterpret_cast<A*>(data);
      auto* const slope_grad = mean_grad + p.channels;
      const Reduce<T> sums{gradient,
                           source,
                           mean_grad,
                           slope_grad,
                           output<A>(wanted.weight),
                           output<A>(wanted.bias),
                           1 / double(p.count()),
                           p.exact,
                           pieces_of(view, data + 2 * p.channels, stream)};
      gpu::launch("batch_norm_act_reduce", reduce<T, View>, blocks(view, Pass::reduction), kThreads, stream, sums,
                  view);
      if (want_statistics) {
        args.mean_grad = mean_grad;
        args.slope_grad = slope_grad;
      }
    });
  }
  if (!wanted.x && !wanted.residual) return;
  // x is read for z and for x - mean.
  if (!want_statistics && (gradient.kept_is_output || p.activation == Activation::identity)) args.gradient.x = nullptr;
  const Gradient<T>& streams = args.gradient;
  const Alignment alignment(streams.grad_y, streams.x, streams.kept, args.grad_x, args.grad_residual);
  with_view<T>(p, alignment, Pass::elementwise, [&]<class View>(const View& view) {
    gpu::launch("batch_norm_act_backward", backward<T, View>, blocks(view, Pass::elementwise), kThreads, stream, args,
                view);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_of(Tensor grad_y, Tensor x, OptionalTensor kept,
                                                       OptionalTensor weight, OptionalTensor bias, Tensor mean,
                                                       Tensor invstd, bool training, std::string activation,
                                                       double negative_slope, bool need_x, bool need_residual,
                                                       bool need_affine) {
  const BatchNormActShape p = shape_on_gpu(x, activation, negative_slope);
  check_backward(p, x, grad_y, kept, weight, bias, mean, invstd);
  const gpu::Device device(x);
  const ScalarType type = core::opmath_scalar_type(p.dtype);
  const auto like_x = [&](bool wanted) {
    return wanted ? core::empty_like(x) : core::empty_vector(0, x.scalar_type(), x);
  };
  Tensor grad_x = like_x(need_x), grad_residual = like_x(need_residual);
  Tensor grad_weight = core::empty_vector(need_affine ? p.channels : 0, type, x);
  Tensor grad_bias = core::empty_vector(need_affine ? p.channels : 0, type, x);
  if (x.numel() == 0) {
    torch::stable::zero_(grad_weight);
    torch::stable::zero_(grad_bias);
    return {grad_x, grad_residual, grad_weight, grad_bias};
  }
  Gradients wanted;
  if (need_x) wanted.x = grad_x;
  if (need_residual) wanted.residual = grad_residual;
  if (need_affine) wanted.weight = grad_weight, wanted.bias = grad_bias;
  if (p.activation == Activation::identity) kept.reset();
  const bool from_output = kept.has_value() && derivative_from_output(p.activation, negative_slope);
  DEEPOPS_DISPATCH_DTYPE(p.dtype, [&]<class T>() {
    const Gradient<T> gradient{input<T>(grad_y), input<T>(x),  input<T>(kept),
                               from_output,      p.activation, negative_slope};
    launch_backward<T>(p, gradient, source_of<OpMath<T>>(mean, invstd, weight, bias), training, wanted, x,
                       device.stream());
  });
  return {grad_x, grad_residual, grad_weight, grad_bias};
}

}  // namespace
}  // namespace deepops::isa_gpu

DEEPOPS_GPU_LIBRARY_IMPL(m) {
  m.impl("batch_norm_act_train", TORCH_BOX(&deepops::isa_gpu::train));
  m.impl("batch_norm_act_eval", TORCH_BOX(&deepops::isa_gpu::eval));
  m.impl("batch_norm_act_backward", TORCH_BOX(&deepops::isa_gpu::backward_of));
}
