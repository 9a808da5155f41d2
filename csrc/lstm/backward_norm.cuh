// The step backward with layer norm: a block takes a row, as in lstm_forward_norm. Three passes over the row's units:
// sums for the gradient of the cell's layer norm, sums for that of r, then all stores.
#pragma once
#include "lstm/backward.cuh"

namespace deepops::isa_gpu::lstm {

// The gradient of a layer norm's input from that of its output, times the weight: invstd * (grad - mean - x * slope),
// x being the normalized input, mean and slope the means of grad and of grad * x.
template <class A>
struct NormGradient {
  A mean, slope, invstd;
  DEEPOPS_DEVICE A operator()(A grad, A x) const { return invstd * (grad - mean - x * slope); }
};
// sums: of grad and of grad * x, of this thread.
template <class A>
DEEPOPS_DEVICE NormGradient<A> norm_gradient(A (&sums)[2], A invstd, int count) {
  block_totals(sums);
  return {sums[0] / A(count), sums[1] / A(count), invstd};
}

// What layer norm adds to a step: its statistics of a row, and V units of r.
template <class T, int V>
struct NormRow {
  using A = OpMath<T>;
  A mean, invstd, cell_mean, cell_invstd;
  Units<T, V> r[4], weight[4], weight_c, bias_c;

  DEEPOPS_DEVICE NormRow(const BackwardStep<T>& step, int row)
      : mean(gpu::load(step.stats + int64_t(row) * 4)),
        invstd(gpu::load(step.stats + int64_t(row) * 4 + 1)),
        cell_mean(gpu::load(step.stats + int64_t(row) * 4 + 2)),
        cell_invstd(gpu::load(step.stats + int64_t(row) * 4 + 3)) {}
  DEEPOPS_DEVICE void load_units(const BackwardStep<T>& step, int row, int unit) {
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) {
      r[gate] = load<V>(step.product + step.gate_at(row, gate, unit));
      weight[gate] = load<V>(step.weight_hh + gate * step.place.hidden + unit);
    }
    weight_c = load<V>(step.weight_c + unit);
    bias_c = load<V>(step.bias_c + unit);
  }
  DEEPOPS_DEVICE A normal(int gate, int i) const { return (r[gate].at(i) - mean) * invstd; }
  DEEPOPS_DEVICE A normal_cell(A cell) const { return (cell - cell_mean) * cell_invstd; }
};

template <class A>
DEEPOPS_DEVICE A gate_of(const LstmGates<A>& gates, int gate) {
  return gate == 0 ? gates.i : gate == 1 ? gates.f : gate == 2 ? gates.g : gates.o;
}

template <class T, int V>
DEEPOPS_DEVICE void put_norm_gradients(const BackwardStep<T>& step, int row, int unit, const BackwardUnits<T, V>& units,
                                       const NormRow<T, V>& norm, const NormGradient<OpMath<T>>& of_r) {
  using A = OpMath<T>;
  A term[V];
#pragma unroll
  for (int gate = 0; gate < 4; ++gate) {
    Units<T, V> grad_r;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const A grad = gate_of(units.sums[i], gate);
      grad_r.set(i, of_r(grad * norm.weight[gate].at(i), norm.normal(gate, i)));
      term[i] = grad * norm.normal(gate, i);
    }
    store(step.grad_r + step.gate_at(row, gate, unit), grad_r);
    step.add(step.norm_sums, gate, row, unit, term);
  }
#pragma unroll
  for (int i = 0; i < V; ++i) term[i] = units.shown[i] * norm.normal_cell(units.cell[i]);
  step.add(step.norm_sums, 4, row, unit, term);
  step.add(step.norm_sums, 5, row, unit, units.shown);
}

template <class T, int V>
DEEPOPS_KERNEL(kRowThreads, 1)
lstm_backward_norm(BackwardStep<T> step) {
  using A = OpMath<T>;
  const int row = gpu::block(), hidden = step.place.hidden, stride = kRowThreads * V;
  const bool again = hidden > stride;  // more than one chunk to a thread
  const RowState state = step.place.row(row);
  if (!state.runs) {
#pragma unroll 1
    for (int unit = gpu::thread() * V; unit < hidden; unit += stride) pass_over<V>(step, row, unit, state);
    return;
  }
  NormRow<T, V> norm(step, row);
  NormGradient<A> of_cell{}, of_r{};
  BackwardUnits<T, V> units;
#pragma unroll 1
  for (int pass = 0; pass < 3; ++pass) {
    A sums[2] = {0, 0};
#pragma unroll 1
    for (int unit = gpu::thread() * V; unit < hidden; unit += stride) {
      if (pass == 0 || again) {
        norm.load_units(step, row, unit);
        units = open_cell<V>(step, row, unit, state, [&](A cell, int i) {
          return norm.normal_cell(cell) * norm.weight_c.at(i) + norm.bias_c.at(i);
        });
      }
      if (pass == 0) {
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const A grad = units.shown[i] * norm.weight_c.at(i);
          sums[0] += grad;
          sums[1] += grad * norm.normal_cell(units.cell[i]);
        }
        continue;
      }
      if (pass == 1 || again) {
        close_cell(step, row, unit, units, [&](int i) {
          return of_cell(units.shown[i] * norm.weight_c.at(i), norm.normal_cell(units.cell[i]));
        });
      }
      if (pass == 2) {
        put_gradients(step, row, unit, units);
        put_norm_gradients(step, row, unit, units, norm, of_r);
        continue;
      }
#pragma unroll
      for (int gate = 0; gate < 4; ++gate) {
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const A grad = gate_of(units.sums[i], gate) * norm.weight[gate].at(i);
          sums[0] += grad;
          sums[1] += grad * norm.normal(gate, i);
        }
      }
    }
    if (pass == 0) of_cell = norm_gradient(sums, norm.cell_invstd, hidden);
    if (pass == 1) of_r = norm_gradient(sums, norm.invstd, 4 * hidden);
  }
}

}  // namespace deepops::isa_gpu::lstm
