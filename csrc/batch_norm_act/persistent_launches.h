// When the passes of batch_norm_act stay on the chip (persistent.cuh), and their launches.
//
// They do if the shared memory of the blocks that the device runs at the same time holds all that is read twice: x, and
// in the backward grad_y and what was kept beside x. A tile that one block holds alone needs no other block at that
// time. DEEPOPS_PERSISTENT=0 in the environment, read at the first call, keeps to two launches.
#pragma once
#include <cstdlib>
#include <cstring>
#include <optional>

#include "batch_norm_act/gpu_launches.h"
#include "batch_norm_act/persistent.cuh"

namespace deepops::isa_gpu {

inline bool may_stay_on_chip() {
  static const bool may = [] {
    const char* const text = std::getenv("DEEPOPS_PERSISTENT");
    return !text || std::strcmp(text, "0") != 0;
  }();
  return may;
}

// Divides the work among at most `resident` blocks, or one for each tile; `finely`: into as many pieces as that allows.
template <class T>
void divide(Planar<T>& view, int64_t resident, bool finely) {
  const int64_t most = std::clamp<int64_t>(resident / view.channels, 1, view.batch * view.parts);
  view.pieces = int(finely ? most : std::min<int64_t>(view.pieces, most));
}
template <class T, int V>
void divide(Rows<T, V>& view, int64_t resident, bool finely) {
  const int64_t at_once = kThreads >> view.log_lanes, most = std::max<int64_t>(resident / view.tiles, 1);
  const int64_t least = up(up(view.rows, most), at_once) * at_once;
  view.rows_per_block = finely ? least : std::max(view.rows_per_block, least);
  view.pieces = int(up(view.rows, view.rows_per_block));
}

// Chunks of a thread, at most.
template <class T>
int64_t slots(const Planar<T>& view) {
  const int64_t segments = up(view.batch * view.parts, view.pieces);  // of a piece
  return up(segments, kThreads >> view.log_group) * (view.part_chunks >> view.log_group);
}
template <class T, int V>
int64_t slots(const Rows<T, V>& view) {
  return view.rows_per_block / (kThreads >> view.log_lanes);
}

template <class View>
struct OnChip {
  View view;
  int64_t bytes;  // of dynamic shared memory of a block
  int64_t grid() const { return blocks(view, Pass::reduction); }
  bool together() const { return view.pieces > 1; }
};

// slot_bytes: of what a thread keeps of a chunk.
template <class View, class... P>
std::optional<OnChip<View>> fit_on_chip(const View& view, int64_t slot_bytes, void (*kernel)(P...)) {
  for (const int each : {2, 1}) {
    const gpu::Residency room = gpu::residency(kernel, kThreads, each);
    for (const bool finely : {false, true}) {
      OnChip<View> chosen{view, 0};
      divide(chosen.view, room.blocks, finely);
      chosen.bytes = slots(chosen.view) * kThreads * slot_bytes;
      if (chosen.bytes <= room.bytes && (!chosen.together() || chosen.grid() <= room.blocks)) return chosen;
    }
  }
  return std::nullopt;
}

// Memory for the sums of the pieces, with the counters of the blocks, which are zeroed in one piece.
struct Exchange {
  Pieces pieces;
  Signals signals;
};
template <class View>
int64_t exchange_doubles(const View& view) {
  return tiles(view) * 2 * columns(view) * (view.pieces == 1 ? 0 : view.pieces) + up(2 * tiles(view) + 1, 2);
}
template <class View>
Exchange exchange(const View& view, double* memory, bool counts, gpu::Stream stream) {
  const int64_t partial = exchange_doubles(view) - up(2 * tiles(view) + 1, 2);
  auto* const counters = reinterpret_cast<unsigned*>(memory + partial);
  if (counts || view.pieces > 1) gpu::zero(counters, (2 * tiles(view) + 1) * sizeof(unsigned), stream);
  return {{memory, counters}, {counters + tiles(view), counters + 2 * tiles(view)}};
}

// Both return whether it was launched; otherwise two launches have to do it.
template <class T>
bool launch_persistent_forward(const BatchNormActShape& p, const Tensor& x, Statistics<T> statistics,
                               const Forward<T>& args, gpu::Stream stream) {
  if (!may_stay_on_chip()) return false;
  set_data(p, x, statistics);
  bool launched = false;
  const Alignment alignment(args.x, args.residual, args.y);
  with_view<T>(p, alignment, Pass::reduction, [&]<class View>(const View& view) {
    const auto kernel = persistent_forward<T, View>;
    const auto chosen = fit_on_chip(view, View::V * int64_t(sizeof(T)), kernel);
    if (!chosen) return;
    const Tensor memory = doubles(exchange_doubles(chosen->view), x);
    const Exchange found = exchange(chosen->view, static_cast<double*>(memory.mutable_data_ptr()),
                                    args.num_batches_tracked != nullptr, stream);
    statistics.pieces = found.pieces;
    launched = gpu::launch_on_chip("batch_norm_act_persistent_forward", kernel, chosen->grid(), kThreads, chosen->bytes,
                                   chosen->together(), stream, statistics, args, chosen->view, int(tiles(chosen->view)),
                                   found.signals);
  });
  return launched;
}

// reduce: with the gradients of weight and bias; args: with grad_x.
template <class T>
bool launch_persistent_backward(const BatchNormActShape& p, const Tensor& x, Reduce<T> reduce, Backward<T> args,
                                gpu::Stream stream) {
  if (!may_stay_on_chip()) return false;
  const Gradient<T>& streams = args.gradient;
  const Alignment alignment(streams.grad_y, streams.x, streams.kept, args.grad_x, args.grad_residual);
  reduce.per_count = 1 / double(p.count());
  reduce.exact = p.exact;
  bool launched = false;
  with_view<T>(p, alignment, Pass::reduction, [&]<class View>(const View& view) {
    const auto kernel = persistent_backward<T, View>;
    const auto chosen = fit_on_chip(view, View::V * int64_t(sizeof(T)) * (streams.kept ? 3 : 2), kernel);
    if (!chosen) return;
    const int64_t results = 2 * p.channels;
    const Tensor memory = doubles(results + exchange_doubles(chosen->view), x);
    double* const data = static_cast<double*>(memory.mutable_data_ptr());
    reduce.mean_grad = reinterpret_cast<OpMath<T>*>(data);
    reduce.slope_grad = reduce.mean_grad + p.channels;
    args.mean_grad = reduce.mean_grad;
    args.slope_grad = reduce.slope_grad;
    const Exchange found = exchange(chosen->view, data + results, false, stream);
    reduce.pieces = found.pieces;
    launched =
        gpu::launch_on_chip("batch_norm_act_persistent_backward", kernel, chosen->grid(), kThreads, chosen->bytes,
                            chosen->together(), stream, reduce, args, chosen->view, found.signals);
  });
  return launched;
}

}  // namespace deepops::isa_gpu
