// Launches of the GPU kernels of batch_norm_act: the shapes of grids, workspaces, arguments.
//
// Grids depend on the shape alone, and so does every sum.
#pragma once
#include <algorithm>
#include <string>

#include "batch_norm_act/batch_norm_act_kernels.cuh"
#include "batch_norm_act/host.h"
#include "core/allocate.h"
#include "core/gpu_arguments.h"

namespace deepops::isa_gpu {

using torch::headeronly::ScalarType;

// What a block has to do at least, so that what it loads beside its data stays below 2 % of that, and how many blocks
// there are at most; a device has up to 160 multiprocessors.
inline constexpr int64_t kChunksPerPart = 1024, kChunksPerPiece = 1536;    // planar
inline constexpr int64_t kRowsPerPart = 256, kRowsPerPiece = 544;          // rows, but fewer where blocks would be few
inline constexpr int64_t kMostPartBlocks = 4096, kMostPieceBlocks = 1024;  // rows
inline constexpr int64_t kFewBlocks = 92, kFewPlaneBlocks = 4 * kFewBlocks;

inline int log2_up(int64_t value) {
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
AffineSource<A> source_of(const Tensor& mean, const Tensor& invstd, const OptionalTensor& weight,
                          const OptionalTensor& bias) {
  return {input<A>(mean), input<A>(invstd), input<A>(weight), input<A>(bias)};
}

inline BatchNormActShape shape_on_gpu(const Tensor& x, const std::string& activation, double negative_slope) {
  STD_TORCH_CHECK(gpu::on_gpu(x), "batch_norm_act: x must be on the GPU");
  const BatchNormActShape p = shape_of(x, activation, negative_slope);
  STD_TORCH_CHECK(p.channels <= INT32_MAX / 2, "batch_norm_act: x has ", p.channels, " channels");
  return p;
}

inline Tensor doubles(int64_t count, const Tensor& like) { return core::empty_vector(count, ScalarType::Double, like); }

// ---- launches -------------------------------------------------------------------------------------------------------

// args: with its results. The shape and the data are filled in here.
template <class T>
void set_data(BatchNormActShape p, const Tensor& x, Statistics<T>& args) {
  // A block of the rows view has few rows: fewer samples keep what it loads for them below 2 % of its data.
  if (p.channels_adjacent && !p.exact) place_samples(p, 2);
  args.x = input<T>(x);
  args.shape = p;
  args.count = double(p.count());
  args.per_count = 1 / args.count;
  args.unbiased = args.count / (args.count - 1);
  args.per_sample = 1 / double(p.samples);
}

// The sums' workspace is filled in here too.
template <class T>
void launch_statistics(const BatchNormActShape& p, const Tensor& x, Statistics<T> args, gpu::Stream stream) {
  set_data(p, x, args);
  with_view<T>(p, Alignment(args.x), Pass::reduction, [&]<class View>(const View& view) {
    const Tensor memory = doubles(workspace(view), x);
    args.pieces = pieces_of(view, static_cast<double*>(memory.mutable_data_ptr()), stream);
    gpu::launch("batch_norm_act_statistics", statistics<T, View>, blocks(view, Pass::reduction), kThreads, stream, args,
                view);
  });
}

template <class T>
Forward<T> forward_of(const BatchNormActShape& p, const Tensor& x, const OptionalTensor& residual,
                      const AffineSource<OpMath<T>>& source, const Tensor& y, int64_t* num_batches_tracked) {
  return {input<T>(x), input<T>(residual), output<T>(y), source, p.activation, p.negative_slope, num_batches_tracked};
}

template <class T>
void launch_forward(const BatchNormActShape& p, const Forward<T>& args, gpu::Stream stream) {
  const Alignment alignment(args.x, args.residual, args.y);
  with_view<T>(p, alignment, Pass::elementwise, [&]<class View>(const View& view) {
    gpu::launch("batch_norm_act_forward", forward<T, View>, blocks(view, Pass::elementwise), kThreads, stream, args,
                view);
  });
}

template <class T>
Gradient<T> gradient_of(const BatchNormActShape& p, const Tensor& grad_y, const Tensor& x, const OptionalTensor& kept) {
  const T* const used = p.activation == Activation::identity ? nullptr : input<T>(kept);
  const bool from_output = used && derivative_from_output(p.activation, p.negative_slope);
  return {input<T>(grad_y), input<T>(x), used, from_output, p.activation, p.negative_slope};
}

// args: with the gradients of weight and bias and with `sums`; without these, mean_grad and slope_grad are set to
// memory that the result holds.
template <class T>
Tensor launch_reduce(const BatchNormActShape& p, const Tensor& x, Reduce<T>& args, gpu::Stream stream) {
  const Alignment alignment(args.gradient.grad_y, args.gradient.x, args.gradient.kept);
  const int64_t results = args.sums ? 0 : 2 * p.channels;
  OptionalTensor memory;  // these two, then the workspace
  args.per_count = 1 / double(p.count());
  args.exact = p.exact;
  with_view<T>(p, alignment, Pass::reduction, [&]<class View>(const View& view) {
    memory = doubles(results + workspace(view), x);
    double* const data = output<double>(memory);
    if (results) {
      args.mean_grad = reinterpret_cast<OpMath<T>*>(data);
      args.slope_grad = args.mean_grad + p.channels;
    }
    args.pieces = pieces_of(view, data + results, stream);
    gpu::launch("batch_norm_act_reduce", reduce<T, View>, blocks(view, Pass::reduction), kThreads, stream, args, view);
  });
  return *memory;
}

template <class T>
void launch_backward(const BatchNormActShape& p, Backward<T> args, gpu::Stream stream) {
  Gradient<T>& streams = args.gradient;
  // x is read for z and for x - mean.
  if (!args.mean_grad && (streams.kept_is_output || p.activation == Activation::identity)) streams.x = nullptr;
  const Alignment alignment(streams.grad_y, streams.x, streams.kept, args.grad_x, args.grad_residual);
  with_view<T>(p, alignment, Pass::elementwise, [&]<class View>(const View& view) {
    gpu::launch("batch_norm_act_backward", backward<T, View>, blocks(view, Pass::elementwise), kThreads, stream, args,
                view);
  });
}

}  // namespace deepops::isa_gpu
