// Operations of a warp on 16-bit matrices. The last lane to arrive computes for all of them, from where their registers
// lie in memory. Who holds what: PTX ISA 9.0, "Warp-level matrix load instruction: ldmatrix" and "Matrix Fragments for
// mma.m16n8k16 with floating point type".
#include "simt/state.h"

namespace simt {
namespace {

constexpr int kRows = 16, kColumns = 8, kDepth = 16;

// The values of 16-bit numbers, exactly: plain loops without a branch, which the compiler makes vectors of.
template <int kRows, int kColumns>
void widen(WarpOp op, const uint16_t (&bits)[kRows][kColumns], float (&value)[kRows][kColumns]) {
  constexpr int kBias = (127 - 15) << 23, kInfinite = 0x7c00, kLeastNormal = 0x400;
  for (int i = 0; i < kRows; ++i) {
    for (int k = 0; k < kColumns && op == WarpOp::multiply_add_f16; ++k) {
      const int magnitude = bits[i][k] & 0x7fff, sign = (bits[i][k] & 0x8000) << 16;
      const int normal = (magnitude << 13) + kBias + (magnitude >= kInfinite ? kBias : 0);
      const int small = __builtin_bit_cast(int, float(magnitude) * 0x1p-24f);
      value[i][k] = __builtin_bit_cast(float, sign | (magnitude < kLeastNormal ? small : normal));
    }
    for (int k = 0; k < kColumns && op == WarpOp::multiply_add_bf16; ++k) {
      value[i][k] = __builtin_bit_cast(float, bits[i][k] << 16);
    }
  }
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
  widen(op, a_bits, a);
  widen(op, b_bits, b);
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
