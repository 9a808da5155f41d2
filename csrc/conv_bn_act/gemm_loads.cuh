// From global to shared memory: pieces of the two matrices of the convolution as a product (gemm_tiles.h).
//
// A piece is [rows][32] elements of two bytes; a thread copies chunks of 8, always the same chunk of a row, for rows
// kRowStep apart. As channels are a multiple of 8, a chunk lies within one filter tap: its thread follows the tap and
// the channel of its own chunk, so that depth has no gap where channels are not a multiple of 32.
#pragma once
#include "core/tensor_core.cuh"
// after it, which says for what all else is compiled
#include "conv_bn_act/gemm_shape.h"
#include "conv_bn_act/gemm_tiles.h"

namespace deepops::isa_gpu {

inline constexpr int kChunk = 8;  // elements of 16 bytes
inline constexpr int kRowChunks = 32 / kChunk;

// Where a chunk of a row lies in its piece. Eight rows that ldmatrix reads in one go, and two rows that eight lanes
// write, each take all 32 banks once: two rows are 128 bytes, and every second row changes the order of the chunks.
DEEPOPS_DEVICE int swizzled(int row, int chunk) {
  return (row * kRowChunks + (chunk ^ (row / 2 % kRowChunks))) * kChunk;
}

DEEPOPS_DEVICE int chunk_of_thread() { return gpu::thread() % kRowChunks; }
DEEPOPS_DEVICE int row_of_thread() { return gpu::thread() / kRowChunks; }

// x as a matrix [pixels of the output][depth]. kPointwise: a 1 x 1 filter without padding.
template <class T, class Tile, bool kPointwise>
class InputPieces {
 public:
  DEEPOPS_DEVICE InputPieces(const GemmShape& shape, const T* x, int first_row)
      : data_(x + (kPointwise ? chunk_of_thread() * kChunk : 0)), channel_(chunk_of_thread() * kChunk) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int row = first_row + row_of_thread() + i * kRowStep;
      const int q = row % shape.out_width, image_p = row / shape.out_width;
      const int p = image_p % shape.out_height, image = image_p / shape.out_height;
      const int y = p * shape.stride_y - shape.top, x_at = q * shape.stride_x - shape.left;
      const bool here = row < shape.rows;
      pixel_[i] = here ? (image * shape.height + y) * shape.width + x_at : -1;
      if constexpr (!kPointwise) position_[i] = here ? uint32_t(y) * shape.unit + uint32_t(x_at) : kNowhere;
    }
    if constexpr (!kPointwise) wrap(shape);
  }

  // The next piece, to element `to` of shared memory.
  DEEPOPS_DEVICE void copy(const GemmShape& shape, const gpu::Shared<T>& memory, int to) {
    to += swizzled(row_of_thread(), chunk_of_thread());
    if constexpr (kPointwise) {
      const bool inside = channel_ < shape.channels;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        gpu::copy_async(memory, to + i * kRowStep * Tile::kDepth, data_ + int64_t(pixel_[i]) * shape.channels,
                        inside && pixel_[i] >= 0);
      }
      data_ += Tile::kDepth;
      channel_ += Tile::kDepth;
    } else {
      const bool inside = tap_ < shape.filter_end;
      const T* const from = data_ + channel_;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const uint32_t at = position_[i] + tap_;
        const bool ok = inside && ((at | (shape.last - at)) & shape.signs) == 0;
        gpu::copy_async(memory, to + i * kRowStep * Tile::kDepth,
                        from + int64_t(pixel_[i] + tap_pixel_) * shape.channels, ok);
      }
      channel_ += Tile::kDepth;
      wrap(shape);
    }
  }

 private:
  static constexpr int kRowStep = Tile::kThreads / kRowChunks;
  static constexpr int kCount = Tile::kRows / kRowStep;
  static constexpr uint32_t kNowhere = 1u << 31;  // above the image wherever the tap is
  static_assert(kRowStep % 8 == 0, "all rows of a thread have the same order of chunks");

  // Past the last channel comes the first of the next tap.
  DEEPOPS_DEVICE void wrap(const GemmShape& shape) {
    while (channel_ >= shape.channels) {
      channel_ -= shape.channels;
      column_ += shape.dilation_x;
      const bool next_row = column_ == shape.filter_width;
      column_ = next_row ? 0 : column_;
      tap_ += next_row ? shape.next_row : shape.dilation_x;
      tap_pixel_ += next_row ? shape.next_row_pixels : shape.dilation_x;
    }
  }

  const T* data_;
  int channel_;
  // Of the tap: its column in the filter; as a position and in pixels, from the first tap on.
  int column_ = 0;
  uint32_t tap_ = 0;
  int tap_pixel_ = 0;
  int pixel_[kCount];                           // that the first tap reads; it may lie outside
  uint32_t position_[kPointwise ? 1 : kCount];  // the same
};

// The weights, [columns][depth].
template <class T, class Tile>
class FilterPieces {
 public:
  DEEPOPS_DEVICE FilterPieces(const GemmShape& shape, const T* filter, int first_column)
      : data_(filter + int64_t(first_column + row_of_thread()) * shape.depth + chunk_of_thread() * kChunk),
        at_(chunk_of_thread() * kChunk),
        left_(shape.columns - first_column - row_of_thread()) {}

  DEEPOPS_DEVICE void copy(const GemmShape& shape, const gpu::Shared<T>& memory, int to) {
    to += swizzled(row_of_thread(), chunk_of_thread());
    const bool inside = at_ < shape.depth;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      gpu::copy_async(memory, to + i * kRowStep * Tile::kDepth, data_ + int64_t(i * kRowStep) * shape.depth,
                      inside && i * kRowStep < left_);
    }
    data_ += Tile::kDepth;
    at_ += Tile::kDepth;
  }

 private:
  static constexpr int kRowStep = Tile::kThreads / kRowChunks;
  static constexpr int kCount = Tile::kColumns / kRowStep;

  const T* data_;
  int at_;    // depth
  int left_;  // columns from this thread's first one on
};

}  // namespace deepops::isa_gpu
