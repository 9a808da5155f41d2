// The convolution of few channels (first layers: C up to 4), without tensor cores.
//
// A block computes 8 x 16 output pixels x 32 channels at a time; a thread has several of these pixels and one pack of
// channels. The filter, transposed, and the patch of x under the pixels lie in shared memory as floats, the patch as in
// x: [rows][columns][C]. Where the whole filter's would be too large, it is taken in steps of some of its taps; within
// a step the patch holds no row or column that no tap reads, so that one tap always fits.
#pragma once
#include "conv_bn_act/epilogue.cuh"

namespace deepops::isa_gpu {

struct DirectTiles {
  static constexpr int kThreads = 128;
  static constexpr int kHeight = 8, kWidth = 16, kPixels = kHeight * kWidth;
  static constexpr int kColumns = 32, kPitch = kColumns + kTilePad;
  static constexpr int kPatch = kPixels * kPitch;  // floats: the patch lies where the tile of sums will be
  static constexpr int kMostDepth = 160;           // terms of a step: 7 x 7 x 3 are 147

  int tiles_y, tiles_x, tiles, column_tiles;  // of an image, of all images
  int tiles_per_block;
  int taps_y, taps_x;                             // of a step
  int unit_y, unit_x, patch_height, patch_width;  // unit: from one row of the patch to the next, in x
  int depth;                                      // of a step, at most
  bool one_step;

  // 4-byte words of shared memory: patch or tile; filter [depth][kColumns]; where a term is in the patch [depth]
  DEEPOPS_HD int filter_at() const { return kPatch; }
  DEEPOPS_HD int offsets_at() const { return kPatch + depth * kColumns; }
  DEEPOPS_HD int words() const { return offsets_at() + depth; }
};

// The output pixels of a tile.
struct DirectRows {
  static constexpr int kRows = DirectTiles::kPixels;
  const ConvProblem& problem;
  const DirectTiles& tiles;
  int index, image, first_y, first_x;

  DEEPOPS_DEVICE DirectRows(const ConvProblem& p, const DirectTiles& t, int tile)
      : problem(p),
        tiles(t),
        index(tile),
        image(tile / (t.tiles_y * t.tiles_x)),
        first_y(tile / t.tiles_x % t.tiles_y * DirectTiles::kHeight),
        first_x(tile % t.tiles_x * DirectTiles::kWidth) {}

  DEEPOPS_DEVICE static int y(int row) { return row / DirectTiles::kWidth; }
  DEEPOPS_DEVICE static int x(int row) { return row % DirectTiles::kWidth; }
  DEEPOPS_DEVICE int tile() const { return index; }
  DEEPOPS_DEVICE bool has(int row) const {
    return first_y + y(row) < problem.out_height && first_x + x(row) < problem.out_width;
  }
  DEEPOPS_DEVICE int pixel(int row) const {
    return (image * problem.out_height + first_y + y(row)) * problem.out_width + first_x + x(row);
  }
  DEEPOPS_DEVICE int count(int tile) const {
    const int high = problem.out_height - tile / tiles.tiles_x % tiles.tiles_y * DirectTiles::kHeight;
    const int wide = problem.out_width - tile % tiles.tiles_x * DirectTiles::kWidth;
    return (high < DirectTiles::kHeight ? high : DirectTiles::kHeight) *
           (wide < DirectTiles::kWidth ? wide : DirectTiles::kWidth);
  }
  DEEPOPS_DEVICE int all() const { return problem.rows(); }
};

// Taps [r, r + high) x [s, s + wide) of the filter.
struct DirectStep {
  int r, s, high, wide;
};

// Where four neighbouring columns of a term begin in shared memory: turned from term to term, so that neither eight
// neighbouring terms, which are stored together, nor all columns of one, which are loaded together, share a bank.
DEEPOPS_DEVICE int filter_slot(int term, int four) { return term * DirectTiles::kColumns + (four ^ (term & 7)) * 4; }

template <class T>
DEEPOPS_DEVICE void load_filter(const ConvArguments<T>& args, const DirectTiles& tiles, const DirectStep& step,
                                int first_column) {
  const ConvProblem& p = args.problem;
  const auto filter = gpu::dynamic_shared<float>();
  const auto offsets = gpu::dynamic_shared<int>();
  const int depth = step.high * step.wide * p.channels;
  constexpr int kFours = DirectTiles::kColumns / 4;
  // A warp takes eight terms of four columns.
#pragma unroll 1
  for (int i = gpu::warp(); i < (depth + 7) / 8 * kFours; i += DirectTiles::kThreads / gpu::kWarp) {
    const int term = i / kFours * 8 + gpu::lane() % 8, four = i % kFours, within = gpu::lane() / 8;
    if (term >= depth) continue;
    const int tap = term / p.channels, c = term % p.channels, r = tap / step.wide, s = tap % step.wide;
    const int column = first_column + four * 4 + within;
    float value = 0;
    if (column < p.out_channels) {
      const int from = ((step.r + r) * p.filter_width + step.s + s) * p.channels + c;
      value = gpu::widen(gpu::load(args.weight + int64_t(column) * p.depth() + from));
    }
    filter.store(tiles.filter_at() + filter_slot(term, four) + within, value);
    if (four == 0 && within == 0) {
      const int y = r * p.dilation_y / tiles.unit_y, x = s * p.dilation_x / tiles.unit_x;
      offsets.store(tiles.offsets_at() + term, (y * tiles.patch_width + x) * p.channels + c);
    }
  }
}

template <class T>
DEEPOPS_DEVICE void load_patch(const ConvArguments<T>& args, const DirectTiles& tiles, const DirectStep& step,
                               const DirectRows& rows) {
  const ConvProblem& p = args.problem;
  const auto patch = gpu::dynamic_shared<float>();
  const int first_y = rows.first_y * p.stride_y - p.top + step.r * p.dilation_y;
  const int first_x = rows.first_x * p.stride_x - p.left + step.s * p.dilation_x;
  const int values = tiles.patch_width * p.channels;  // of a row
  const int next_row = DirectTiles::kThreads / values, next = DirectTiles::kThreads % values;
  int row = gpu::thread() / values, at = gpu::thread() % values;
#pragma unroll 2
  for (int i = gpu::thread(); i < tiles.patch_height * values; i += DirectTiles::kThreads) {
    const int column = tiles.unit_x == 1 ? 0 : at / p.channels * (tiles.unit_x - 1);  // of x, but for at / C
    const int y = first_y + row * tiles.unit_y, from = (first_x + column) * p.channels + at;
    const bool inside = y >= 0 && y < p.height && from >= 0 && from < p.width * p.channels;
    const int64_t first = (int64_t(rows.image) * p.height + y) * p.width * p.channels;
    patch.store(i, inside ? gpu::widen(gpu::load(args.x + first + from)) : 0.0f);
    row += next_row;
    at += next;
    if (at >= values) at -= values, ++row;
  }
}

// The pixels and the pack of channels of a thread. Neighbouring threads have neighbouring packs, then pixels.
template <class T>
struct DirectSums {
  static constexpr int V = gpu::Pack<T>::kSize, kPacks = DirectTiles::kColumns / V;
  static constexpr int kTogether = DirectTiles::kThreads / kPacks;  // pixels that the block takes side by side
  static constexpr int kPixels = DirectTiles::kPixels / kTogether;
  float value[kPixels][V] = {};

  DEEPOPS_DEVICE static int pack() { return gpu::thread() % kPacks; }
  DEEPOPS_DEVICE static int pixel(int j) { return j * kTogether + gpu::thread() / kPacks; }

  DEEPOPS_DEVICE void add(const ConvProblem& p, const DirectTiles& tiles, int depth) {
    const auto memory = gpu::dynamic_shared<float>();
    const auto offsets = gpu::dynamic_shared<int>();
    const int step_y = p.stride_y / tiles.unit_y, step_x = p.stride_x / tiles.unit_x;
    int at[kPixels];
#pragma unroll
    for (int j = 0; j < kPixels; ++j)
      at[j] = (DirectRows::y(pixel(j)) * step_y * tiles.patch_width + DirectRows::x(pixel(j)) * step_x) * p.channels;
#pragma unroll 1
    for (int term = 0; term < depth; ++term) {
      const int offset = offsets.load(tiles.offsets_at() + term);
      gpu::Pack<float> weight[V / 4];
#pragma unroll
      for (int i = 0; i < V / 4; ++i)
        weight[i] = memory.load_pack(tiles.filter_at() + filter_slot(term, pack() * (V / 4) + i));
#pragma unroll
      for (int j = 0; j < kPixels; ++j) {
        const float x = memory.load(at[j] + offset);
#pragma unroll
        for (int i = 0; i < V; ++i) value[j][i] = DEEPOPS_LIBM(fmaf)(x, weight[i / 4].value[i % 4], value[j][i]);
      }
    }
  }

  // As floats, with the epilogue's pad, or rounded to T, without: eight neighbouring threads fill the 32 banks.
  template <ConvResult kind>
  DEEPOPS_DEVICE void finish(const ConvArguments<T>& args, const DirectRows& rows, int first_column) const {
    constexpr int kThreads = DirectTiles::kThreads, kColumns = DirectTiles::kColumns;
    if constexpr (kind == ConvResult::evaluation) {
      const auto tile = gpu::dynamic_shared<float>();
#pragma unroll
      for (int j = 0; j < kPixels; ++j) store_sums(tile, pixel(j) * DirectTiles::kPitch + pack() * V, value[j]);
      DEEPOPS_SHARED(float, affine, 2 * kColumns);  // the filter is needed again: there is no room behind the tile
      evaluate_tile<T, kThreads, kColumns>(args, tile, rows, first_column, affine, 0);
    } else {
      static_assert(sizeof(T) * kTogether * kPixels * kColumns + kStatisticsBytes<kThreads> <= 4 * DirectTiles::kPatch);
      const auto tile = gpu::dynamic_shared<T>();
#pragma unroll
      for (int j = 0; j < kPixels; ++j) {
        gpu::Pack<T> rounded;
#pragma unroll
        for (int i = 0; i < V; ++i) rounded.value[i] = gpu::narrow<T>(value[j][i]);
        tile.store_pack(pixel(j) * kColumns + pack() * V, rounded);
      }
      keep_tile<T, kThreads, kColumns, kColumns>(args, tile, rows, first_column);
    }
  }
};

template <class T, ConvResult kind>
DEEPOPS_KERNEL(DirectTiles::kThreads, 1)
direct_convolution(ConvArguments<T> args, DirectTiles tiles) {
  const ConvProblem& p = args.problem;
  const int first_column = gpu::block() % tiles.column_tiles * DirectTiles::kColumns;
  const int first = gpu::block() / tiles.column_tiles * tiles.tiles_per_block;
  const int last = first + tiles.tiles_per_block < tiles.tiles ? first + tiles.tiles_per_block : tiles.tiles;
#pragma unroll 1
  for (int tile = first; tile < last; ++tile) {
    const DirectRows rows(p, tiles, tile);
    DirectSums<T> sums;
#pragma unroll 1
    for (int r = 0; r < p.filter_height; r += tiles.taps_y) {
#pragma unroll 1
      for (int s = 0; s < p.filter_width; s += tiles.taps_x) {
        const int high = p.filter_height - r, wide = p.filter_width - s;
        const DirectStep step{r, s, high < tiles.taps_y ? high : tiles.taps_y,
                              wide < tiles.taps_x ? wide : tiles.taps_x};
        gpu::barrier();  // what lies in shared memory has been read
        if (tile == first || !tiles.one_step) load_filter(args, tiles, step, first_column);
        load_patch(args, tiles, step, rows);
        gpu::barrier();
        sums.add(p, tiles, step.high * step.wide * p.channels);
      }
    }
    gpu::barrier();
    sums.template finish<kind>(args, rows, first_column);
  }
}

}  // namespace deepops::isa_gpu
