// The step forward with layer norm: a block takes a row, a thread the units thread * V, (thread + kRowThreads) * V, ...
//
// A layer norm is three passes over the row: its mean, its variance, its use. What a pass needs again stays in
// registers where a thread has one chunk of units, and is read or computed again where it has more.
#pragma once
#include "lstm/forward.cuh"

namespace deepops::isa_gpu::lstm {

DEEPOPS_DEVICE float inverse_deviation(float variance, float eps) { return 1.0f / DEEPOPS_LIBM(sqrtf)(variance + eps); }
DEEPOPS_DEVICE double inverse_deviation(double variance, double eps) {
  return 1.0 / DEEPOPS_LIBM(sqrt)(variance + eps);
}

template <class T, int V>
DEEPOPS_KERNEL(kRowThreads, 1)
lstm_forward_norm(ForwardStep<T> step) {
  using A = OpMath<T>;
  const int row = gpu::block(), hidden = step.place.hidden, stride = kRowThreads * V;
  const bool again = hidden > stride;  // more than one chunk to a thread
  const RowState state = step.place.row(row);
  if (!state.runs) {
#pragma unroll 1
    for (int unit = gpu::thread() * V; unit < hidden; unit += stride) pass_over<V>(step, row, unit, state);
    return;
  }
  Units<T, V> r[4] = {};
  const auto load_r = [&](int unit) {
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) r[gate] = load<V>(step.product + step.gate_at(row, gate, unit));
  };
  A mean = 0, invstd = 0;  // of r
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {
    A sum[1] = {0};
#pragma unroll 1
    for (int unit = gpu::thread() * V; unit < hidden; unit += stride) {
      if (pass == 0 || again) load_r(unit);
#pragma unroll
      for (int gate = 0; gate < 4; ++gate) {
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const A d = r[gate].at(i) - mean;
          sum[0] += pass == 0 ? d : d * d;
        }
      }
    }
    block_totals(sum);
    if (pass == 0) mean = sum[0] / A(4 * hidden);
    if (pass == 1) invstd = inverse_deviation(sum[0] / A(4 * hidden), step.eps);
  }

  A cell_mean = 0, cell_invstd = 0;
  ForwardUnits<T, V> units;
#pragma unroll 1
  for (int pass = 0; pass < 3; ++pass) {
    A sum[1] = {0};
#pragma unroll 1
    for (int unit = gpu::thread() * V; unit < hidden; unit += stride) {
      if (pass == 0 || again) {
        if (again) load_r(unit);
        Units<T, V> weight[4];
#pragma unroll
        for (int gate = 0; gate < 4; ++gate) weight[gate] = load<V>(step.weight_hh + gate * hidden + unit);
        units = make_cell<V>(step, row, unit, state.starts,
                             [&](int gate, int i) { return (r[gate].at(i) - mean) * invstd * weight[gate].at(i); });
      }
      if (pass == 2) {
        const Units<T, V> weight = load<V>(step.weight_c + unit), bias = load<V>(step.bias_c + unit);
        finish(step, row, unit, state, units,
               [&](int i) { return (units.cell[i] - cell_mean) * cell_invstd * weight.at(i) + bias.at(i); });
        continue;
      }
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const A d = units.cell[i] - cell_mean;
        sum[0] += pass == 0 ? d : d * d;
      }
    }
    if (pass == 2) break;
    block_totals(sum);
    if (pass == 0) cell_mean = sum[0] / A(hidden);
    if (pass == 1) cell_invstd = inverse_deviation(sum[0] / A(hidden), step.eps);
  }
  if (!step.stats || gpu::thread() >= 4) return;
  const A stats = gpu::thread() == 0   ? mean
                  : gpu::thread() == 1 ? invstd
                  : gpu::thread() == 2 ? cell_mean
                                       : cell_invstd;
  gpu::store(step.stats + int64_t(row) * 4 + gpu::thread(), stats);
}

}  // namespace deepops::isa_gpu::lstm
