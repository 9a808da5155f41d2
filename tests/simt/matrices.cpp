// Operations of a warp on 16-bit matrices. The last lane to arrive computes for all of them, as the registers lie in
// memory: "Warp-level matrix instructions" of the PTX ISA 9.0 has the places (9.7.15.5.8: m16n8k16; ldmatrix).
#include "simt/state.h"

namespace simt {
namespace {

constexpr int kRows = 16, kColumns = 8, kDepth = 16;

// The values of 16-bit numbers, exactly: plain loops without a branch, which the compiler makes vectors of.
void widen_half(const uint16_t* bits, float* value, int n) {
  for (int i = 0; i < n; ++i) {
    const uint32_t magnitude = bits[i] & 0x7fffu, sign = uint32_t(bits[i] & 0x8000u) << 16;
    const uint32_t normal = (magnitude << 13) + (112u << 23);
    const uint32_t infinite = magnitude >= 0x7c00u ? 112u << 23 : 0;  // and what is not a number
    const uint32_t small = __builtin_bit_cast(uint32_t, float(int(magnitude)) * 0x1p-24f);
    const uint32_t wide = magnitude < 0x400u ? small : normal + infinite;
    value[i] = __builtin_bit_cast(float, wide | sign);
  }
}
void widen_bfloat16(const uint16_t* bits, float* value, int n) {
  for (int i = 0; i < n; ++i) value[i] = __builtin_bit_cast(float, uint32_t(bits[i]) << 16);
}

}  // namespace

// Lane l has pointed at row l % 8 of matrix l / 8, and gets two elements of row l / 4 of each, from column l % 4 * 2
// on.
void finish_load_matrices(int lanes) {
  const uint32_t* row[kWarp];
  for (int l = 0; l < kWarp; ++l) row[l] = static_cast<const uint32_t*>(of(*state.block, lanes + l).in[0]);
  for (int l = 0; l < kWarp; ++l) {
    auto* const to = static_cast<uint32_t*>(of(*state.block, lanes + l).out);
    for (int m = 0; m < 4; ++m) to[m] = row[m * 8 + l / 4][l % 4];
  }
}

// d[row][column] += a[row][0] b[0][column] + ... + a[row][15] b[15][column], from left to right. Products are exact in
// fp32, sums are rounded to nearest even. In what order a GPU adds, and how it rounds, is not specified.
//
// Lane l holds, with g = l / 4 and t = l % 4 * 2, pairs of neighbours, the first in the lower half of a register:
//   a: (g, t), (g + 8, t), (g, t + 8), (g + 8, t + 8), neighbours in a row;  b: (t, g), (t + 8, g), in a column;
//   d: (g, t), (g, t + 1), (g + 8, t), (g + 8, t + 1)
void finish_multiply_add(WarpOp op, int lanes) {
  uint16_t a_bits[kRows][kDepth], b_bits[kDepth][kColumns];
  float a[kRows][kDepth], b[kDepth][kColumns], d[kRows][kColumns];
  for (int l = 0; l < kWarp; ++l) {
    const Thread& lane = of(*state.block, lanes + l);
    const int g = l / 4, t = l % 4 * 2;
    const auto *own_a = static_cast<const uint32_t*>(lane.in[0]), *own_b = static_cast<const uint32_t*>(lane.in[1]);
    const auto* const own_d = static_cast<const float*>(lane.out);
    for (int i = 0; i < 4; ++i) memcpy(&a_bits[g + i % 2 * 8][t + i / 2 * 8], &own_a[i], 4);
    for (int i = 0; i < 4; ++i) b_bits[t + i / 2 * 8 + i % 2][g] = uint16_t(own_b[i / 2] >> i % 2 * 16);
    for (int i = 0; i < 4; ++i) d[g + i / 2 * 8][t + i % 2] = own_d[i];
  }
  const auto widen = op == WarpOp::multiply_add_f16 ? widen_half : widen_bfloat16;
  widen(a_bits[0], a[0], kRows * kDepth);
  widen(b_bits[0], b[0], kDepth * kColumns);
  for (int row = 0; row < kRows; ++row) {
    for (int k = 0; k < kDepth; ++k) {
      for (int column = 0; column < kColumns; ++column) d[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int l = 0; l < kWarp; ++l) {
    auto* const own_d = static_cast<float*>(of(*state.block, lanes + l).out);
    for (int i = 0; i < 4; ++i) own_d[i] = d[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
  }
}

}  // namespace simt
