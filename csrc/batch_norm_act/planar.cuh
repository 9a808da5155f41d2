// The way of the GPU kernels through contiguous data [N, C, L]: planes of L values.
//
// A plane is cut into chunks at 16-byte boundaries, beginning at the 32-byte boundary before it, so that a group
// touches no more sectors of memory than it has to; the first two and the last chunk may be incomplete or empty. Where
// the streams of a pass lie differently to these boundaries there are no packs: every chunk is elements that lie a
// group apart, so that neighbouring threads still access neighbouring elements.
//
// A group of threads, a power of two from 4 to the whole block, works on a plane at a time, or on one of its `parts`.
#pragma once
#include "batch_norm_act/chunks.cuh"

namespace deepops::isa_gpu {

inline constexpr int kPlanesPerBlock = 128;

template <class T>
struct Planar {
  static constexpr int V = gpu::Pack<T>::kSize;
  static constexpr int kSlots = 1;  // for the number of the one channel of a block in a reduction
  DEEPOPS_DEVICE static int slot(int) { return 0; }
  using ThreadSums = OneChannelSums<V>;

  int64_t batch, inner;  // N, L
  int channels;          // C
  bool packs;            // all streams lie alike to 16-byte boundaries:
  int lead;              // elements from a 32-byte boundary to the beginning of the data
  int log_group;         // threads of a group
  int parts;             // of a plane, each of
  int64_t part_chunks;   // this many chunks, a multiple of the group
  int planes_per_block;  // in elementwise passes, with one part
  int pieces;            // blocks that share a channel in a reduction

  struct Plane {
    int64_t start;   // index of the first element
    int skew;        // elements of the first chunks that belong to the plane before
    int64_t chunks;  // the incomplete ones included
  };

  DEEPOPS_DEVICE int groups() const { return kThreads >> log_group; }
  DEEPOPS_DEVICE int group() const { return gpu::thread() >> log_group; }
  DEEPOPS_DEVICE int member() const { return gpu::thread() & ((1 << log_group) - 1); }

  DEEPOPS_DEVICE Plane plane(int64_t number) const {
    const int64_t start = number * inner;
    const int skew = packs ? int((lead + start) & (2 * V - 1)) : 0;
    return {start, skew, (skew + inner + V - 1) / V};
  }

  // Chunk k of a plane for this member of a group; k - member() is the same in all of them. Nothing from `end` on.
  DEEPOPS_DEVICE Chunk<V> chunk(const Plane& plane, int64_t k, int64_t end) const {
    const int step = packs ? 1 : 1 << log_group;
    const int64_t local = packs ? k * V - plane.skew : (k - member()) * V + member();
    Chunk<V> chunk{plane.start + local, step, 0};
    if ((packs ? k : k - member()) >= end) return chunk;
    if (local >= 0 && local + int64_t(V - 1) * step < inner) {
      chunk.valid = Chunk<V>::kAll;
      return chunk;
    }
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const int64_t at = local + int64_t(i) * step;
      if (at >= 0 && at < inner) chunk.valid |= 1u << i;
    }
    return chunk;
  }
  DEEPOPS_DEVICE int64_t part_end(const Plane& plane, int64_t part) const {
    const int64_t end = (part + 1) * part_chunks;
    return end < plane.chunks ? end : plane.chunks;
  }

  // ---- reductions: a block works on one piece of one channel ----

  DEEPOPS_DEVICE int tile() const { return gpu::block() % channels; }  // neighbours take neighbouring channels
  DEEPOPS_DEVICE int piece() const { return gpu::block() / channels; }
  DEEPOPS_DEVICE int columns() const { return 1; }
  DEEPOPS_DEVICE int channel(int) const { return tile(); }
  // each(index) for all elements of a channel, a block together.
  template <class Each>
  DEEPOPS_DEVICE void for_channel(int channel, const Each& each) const {
    for (int64_t n = 0; n < batch; ++n) {
      const int64_t start = (n * channels + channel) * inner;
#pragma unroll 1
      for (int64_t l = gpu::thread(); l < inner; l += kThreads) each(start + l);
    }
  }

  // make(channel), from a function of the element's number in its chunk. All threads must call.
  template <class Number, class Make>
  DEEPOPS_DEVICE auto numbers(const Make& make) const {
    using A = typename MemberOf<Number>::Type;
    DEEPOPS_SHARED(A, memory, sizeof(Number) / sizeof(A));
    const Staged<A, Number, 1> staged{memory};
    if (gpu::thread() == 0) staged.store(0, make(channel(0)));
    gpu::barrier();
    const Number number = staged.load(0);
    return [number](int) { return number; };
  }

  // each(chunks) for all chunks of this piece, U at a time.
  template <int U, class Each>
  DEEPOPS_DEVICE void for_piece(const Each& each) const {
    // A segment is a part of a plane. Either there is one part or one group (batch_norm_act_cuda.cu): no division here.
    const int64_t segments = batch * parts, first = piece() * segments / pieces;
    const int64_t last = (piece() + 1) * segments / pieces;
    int64_t segment = first + group(), part = parts == 1 ? 0 : segment % parts;
    int64_t number = (parts == 1 ? segment : segment / parts) * channels + channel(0);  // of the plane
    Plane now{};
    int64_t k = 0, end = 0;
    const auto open = [&] {
      now = plane(number);
      k = part * part_chunks + member();
      end = part_end(now, part);
    };
    if (segment < last) open();
    while (segment < last) {
      Chunk<V> chunks[U];
#pragma unroll
      for (int u = 0; u < U; ++u) {
        chunks[u] = {0, 1, 0};
        if (segment >= last) continue;
        chunks[u] = chunk(now, k, end);
        k += 1 << log_group;
        if (k - member() < end) continue;
        segment += groups();
        if (++part == parts) {
          part = 0;
          number += int64_t(groups()) * channels;
        }
        if (segment < last) open();
      }
      each(chunks);
    }
  }

  // The block's sums, in thread 0.
  DEEPOPS_DEVICE Sums block_sums(const ThreadSums& sums) const {
    double both[2] = {sums.a, sums.b};
    gpu::block_sum<kThreads>(both);
    return {both[0], both[1]};
  }

  // ---- elementwise passes: a block works on neighbouring planes, or on a part of one ----

  // each(chunks, numbers), numbers(i) being make(channel of element i).
  template <int U, class Number, class Make, class Each>
  DEEPOPS_DEVICE void for_part(const Make& make, const Each& each) const {
    using A = typename MemberOf<Number>::Type;
    DEEPOPS_SHARED(A, memory, sizeof(Number) / sizeof(A) * kPlanesPerBlock);
    const Staged<A, Number, kPlanesPerBlock> staged{memory};
    const int64_t first = int64_t(gpu::block() / parts) * planes_per_block, part = gpu::block() % parts;
    const int64_t rest = batch * channels - first;
    const int count = rest < planes_per_block ? int(rest) : planes_per_block;
    if (gpu::thread() < count) staged.store(gpu::thread(), make(int((first + gpu::thread()) % channels)));
    gpu::barrier();
    for (int p = group(); p < count; p += groups()) {
      const Number number = staged.load(p);
      const Plane now = plane(first + p);
      const int64_t end = part_end(now, part);
#pragma unroll 1
      for (int64_t k = part * part_chunks + member(); k - member() < end; k += int64_t(U) << log_group) {
        Chunk<V> chunks[U];
#pragma unroll
        for (int u = 0; u < U; ++u) chunks[u] = chunk(now, k + (int64_t(u) << log_group), end);
        each(chunks, [&](int) { return number; });
      }
    }
  }
};

}  // namespace deepops::isa_gpu
