// The pointwise part of a step backward: from the gradients of h and c to those of the gates, of r and of c before.
//
// Threads and blocks take units as in forward.cuh. The gradients of the small weights are summed step by step, every
// (row, unit) on its own; what is left is a sum over the batch (column_sums, below).
#pragma once
#include "lstm/forward.cuh"

namespace deepops::isa_gpu::lstm {

// The gradient of the state h that a step has left, as far as later steps are concerned.
template <class T>
struct StateGradient {
  const T* product;  // [B, R], of grad_r and weight_hh; null before the first one
  const T* mask;     // [B, R] or null
  const T* h_n;      // [B, R] or null: what came for h_n
  T* old;            // [B, R] or null: what zoneout sends past the step
  T* h0;             // [B, R]

  template <int V>
  DEEPOPS_DEVICE void at(int64_t at, bool ends, OpMath<T> (&to)[V]) const {
    const bool inside = !ends && product;
    const Units<T, V> later = load_if<V>(ends ? h_n : product, at);
    const Units<T, V> scale = load_if<V>(inside ? mask : nullptr, at), past = load_if<V>(inside ? old : nullptr, at);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      to[i] = inside && mask ? later.at(i) * scale.at(i) : later.at(i);
      if (inside && old) to[i] += past.at(i);
    }
  }
  // For a row whose first step has been taken.
  template <int V>
  DEEPOPS_DEVICE void finish(int64_t place, const RowState& state) const {
    OpMath<T> grad[V];
    at<V>(place, state.empty, grad);
    Units<T, V> units;
#pragma unroll
    for (int i = 0; i < V; ++i) units.set(i, grad[i]);
    store(h0 + place, units);
  }
};

// Pointers are to what belongs to this step.
template <class T>
struct BackwardStep {
  using A = OpMath<T>;
  LstmFormula formula;
  StepPlace place;
  Draws draws;
  const T* grad_out;  // [B, H] or null: with a projection the gradient of what it takes, else of h
  bool projects;      // state is not used
  StateGradient<T> state;
  const T *grad_c, *grad_c_n;  // [B, H] or null
  T* grad_c0;                  // [B, H]: of the state c, from step to step
  const T* gates;              // [B, 4H]
  const T *c_before, *c0;      // [B, H]
  const T* peephole;           // [3H] or null
  const T* product;            // [B, 4H]: r
  const A* stats;              // [B, 4]
  const T *weight_hh, *weight_c, *bias_c;
  T *grad_gates, *grad_r;  // [B, 4H]
  // [3, B, H], [6, B, H]: layer norm's of i, f, g, o, then weight and bias of c's. Or null.
  A *peephole_sums, *norm_sums;
  bool adds;  // to sums that are there

  DEEPOPS_DEVICE int64_t gate_at(int row, int gate, int unit) const {
    return (int64_t(row) * 4 + gate) * place.hidden + unit;
  }
  DEEPOPS_DEVICE int64_t at(int row, int unit) const { return int64_t(row) * place.hidden + unit; }
  template <int V>
  DEEPOPS_DEVICE void add(A* sums, int which, int row, int unit, const A (&term)[V]) const {
    const int64_t first = (int64_t(which) * place.batch + row) * place.hidden;
    Sums<A, V>::add(sums + first, place.hidden, unit, adds, term);
  }
};

// V units on their way. All of a struct's members are about the same unit.
template <class T, int V>
struct BackwardUnits {
  using A = OpMath<T>;
  Units<T, V> i, f, g, o, c_before;
  unsigned dropped;
  LstmPeephole<Units<T, V>> peephole;
  A cell[V], shown[V];       // the new cell; the gradient of what tanh saw
  A later_c[V], later_h[V];  // gradients of the state after the step; of h in the end what goes past it
  LstmGates<A> sums[V];      // gradients of the gates' sums; o: known before the others
  A to_c_before[V];
};

// shown(cell, i): what tanh saw.
template <int V, class T, class Shown>
DEEPOPS_DEVICE BackwardUnits<T, V> open_cell(const BackwardStep<T>& step, int row, int unit, const RowState& state,
                                             const Shown& shown) {
  using A = OpMath<T>;
  BackwardUnits<T, V> units;
  const int64_t at = step.at(row, unit);
  units.i = load<V>(step.gates + step.gate_at(row, 0, unit));
  units.f = load<V>(step.gates + step.gate_at(row, 1, unit));
  units.g = load<V>(step.gates + step.gate_at(row, 2, unit));
  units.o = load<V>(step.gates + step.gate_at(row, 3, unit));
  units.c_before = load<V>((state.starts ? step.c0 : step.c_before) + at);
  units.peephole = load_peephole<V>(step.peephole, step.place.hidden, unit);
  const Units<T, V> grad_out = load_if<V>(step.grad_out, at);
  const Units<T, V> grad_c = load_if<V>(step.grad_c, at);
  const T* const later = state.ends ? step.grad_c_n : step.grad_c0;
  const Units<T, V> grad_later = load_if<V>(later, at);
#pragma unroll
  for (int i = 0; i < V; ++i) units.later_h[i] = 0;
  if (!step.projects) step.state.template at<V>(at, state.ends, units.later_h);
  units.dropped = step.draws.template bits<V>(kStreamRecurrentDropout, step.draws.recurrent_dropout, row, unit);
  const bool zones_h = !step.projects && step.formula.zoneout_h > 0;
  const unsigned stays_h = step.draws.template bits<V>(kStreamZoneoutH, zones_h ? step.draws.zoneout_h : 0, row, unit);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    units.later_c[i] = grad_c.at(i) + grad_later.at(i);
    units.later_h[i] += grad_out.at(i);
    A grad = units.later_h[i];
    if (zones_h) grad = lstm_zoneout_now(step.formula, step.formula.zoneout_h, stays<A>(stays_h, i), grad);
    const LstmGates<A> gates{units.i.at(i), units.f.at(i), units.g.at(i), units.o.at(i)};
    const A g = lstm_dropped(step.formula, gates.g, kept<A>(step.draws, units.dropped, i));
    units.cell[i] = lstm_new_cell(step.formula, lstm_unclipped(gates, g, units.c_before.at(i)), Rounded<T>());
    const LstmOutputGradients<A> out = lstm_output_gradients(grad, gates.o, lstm_tanh(A(shown(units.cell[i], i))));
    units.sums[i].o = out.o;
    units.shown[i] = out.shown;
    if (zones_h) {
      units.later_h[i] = lstm_zoneout_old(step.formula, step.formula.zoneout_h, stays<A>(stays_h, i), units.later_h[i]);
    }
  }
  return units;
}

// The rest, where cell_grad(i), what tanh saw says about the new cell, is known.
template <int V, class T, class CellGrad>
DEEPOPS_DEVICE void close_cell(const BackwardStep<T>& step, int row, int unit, BackwardUnits<T, V>& units,
                               const CellGrad& cell_grad) {
  using A = OpMath<T>;
  const bool zones_c = step.formula.zoneout_c > 0;
  const unsigned stays_c = step.draws.template bits<V>(kStreamZoneoutC, step.draws.zoneout_c, row, unit);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const LstmGates<A> gates{units.i.at(i), units.f.at(i), units.g.at(i), units.o.at(i)};
    const LstmPeephole<A> peephole = peephole_at(units.peephole, i);
    A now = units.later_c[i], old = 0;
    if (zones_c) {
      now = lstm_zoneout_now(step.formula, step.formula.zoneout_c, stays<A>(stays_c, i), units.later_c[i]);
      old = lstm_zoneout_old(step.formula, step.formula.zoneout_c, stays<A>(stays_c, i), units.later_c[i]);
    }
    A grad_cell = cell_grad(i) + now;
    if (step.formula.peephole) grad_cell += units.sums[i].o * peephole.o;
    const LstmStepGradients<A> out =
        lstm_step_gradients(step.formula, grad_cell, units.sums[i].o, gates, kept<A>(step.draws, units.dropped, i),
                            peephole, units.c_before.at(i));
    units.sums[i] = out.sums;
    units.to_c_before[i] = out.c_before + old;
  }
}

// All stores but that of grad_r.
template <int V, class T>
DEEPOPS_DEVICE void put_gradients(const BackwardStep<T>& step, int row, int unit, const BackwardUnits<T, V>& units) {
  using A = OpMath<T>;
  const int64_t at = step.at(row, unit);
  Units<T, V> i_sum, f_sum, g_sum, o_sum, before, past;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    i_sum.set(i, units.sums[i].i);
    f_sum.set(i, units.sums[i].f);
    g_sum.set(i, units.sums[i].g);
    o_sum.set(i, units.sums[i].o);
    before.set(i, units.to_c_before[i]);
    past.set(i, units.later_h[i]);
  }
  store(step.grad_gates + step.gate_at(row, 0, unit), i_sum);
  store(step.grad_gates + step.gate_at(row, 1, unit), f_sum);
  store(step.grad_gates + step.gate_at(row, 2, unit), g_sum);
  store(step.grad_gates + step.gate_at(row, 3, unit), o_sum);
  store(step.grad_c0 + at, before);
  if (!step.projects && step.state.old) store(step.state.old + at, past);
  if (!step.peephole_sums) return;
  A i_term[V], f_term[V], o_term[V];
#pragma unroll
  for (int i = 0; i < V; ++i) {
    i_term[i] = units.sums[i].i * units.c_before.at(i);
    f_term[i] = units.sums[i].f * units.c_before.at(i);
    o_term[i] = units.sums[i].o * units.cell[i];
  }
  step.add(step.peephole_sums, 0, row, unit, i_term);
  step.add(step.peephole_sums, 1, row, unit, f_term);
  step.add(step.peephole_sums, 2, row, unit, o_term);
}

// Units of a row that has no such step.
template <int V, class T>
DEEPOPS_DEVICE void pass_over(const BackwardStep<T>& step, int row, int unit, const RowState& state) {
  const int64_t at = step.at(row, unit);
  const Units<T, V> zero{};
#pragma unroll
  for (int gate = 0; gate < 4; ++gate) {
    store(step.grad_gates + step.gate_at(row, gate, unit), zero);
    if (step.grad_r) store(step.grad_r + step.gate_at(row, gate, unit), zero);
  }
  if (state.empty && step.place.opens(true)) store(step.grad_c0 + at, load_if<V>(step.grad_c_n, at));
  if (state.before && !step.projects) step.state.template finish<V>(at, state);
  if (step.adds) return;
  const OpMath<T> nothing[V] = {};
#pragma unroll 1
  for (int which = 0; which < 6; ++which) {
    if (step.peephole_sums && which < 3) step.add(step.peephole_sums, which, row, unit, nothing);
    if (step.norm_sums) step.add(step.norm_sums, which, row, unit, nothing);
  }
}

template <class T, int V>
DEEPOPS_KERNEL(kFlatThreads, 1)
lstm_backward(BackwardStep<T> step) {
  const unsigned chunks = unsigned(step.place.hidden / V);
  const unsigned index = unsigned(gpu::block()) * kFlatThreads + unsigned(gpu::thread());
  const int row = int(index / chunks), unit = int(index % chunks) * V;
  if (row >= step.place.batch) return;
  const RowState state = step.place.row(row);
  if (!state.runs) return pass_over<V>(step, row, unit, state);
  auto units = open_cell<V>(step, row, unit, state, [](OpMath<T> cell, int) { return cell; });
  close_cell(step, row, unit, units, [&](int i) { return units.shown[i]; });
  put_gradients(step, row, unit, units);
}

// ---- what else there is ---------------------------------------------------------------------------------------------

// to[part][unit] = the sum of from[part][row][place of unit]: a warp takes 32 units of every eighth row. pack, parts:
// of Sums.
template <class A>
DEEPOPS_KERNEL(kRowThreads, 1)
lstm_column_sums(const A* from, int rows, int size, int pack, int parts, A* to) {
  constexpr int kWarps = kRowThreads / gpu::kWarp;
  DEEPOPS_SHARED(double, memory, kRowThreads);
  const int tiles = (size + gpu::kWarp - 1) / gpu::kWarp;
  const int which = gpu::block() / tiles, unit = gpu::block() % tiles * gpu::kWarp + gpu::lane();
  double sum = 0;
  if (unit < size) {
    const A* const column = from + int64_t(which) * rows * size + place_of_sum(unit, size, pack, parts);
#pragma unroll 4
    for (int row = gpu::warp(); row < rows; row += kWarps) sum += double(gpu::load(column + int64_t(row) * size));
  }
  memory.store(gpu::thread(), sum);
  gpu::barrier();
  if (gpu::warp() != 0 || unit >= size) return;
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) sum += memory.load(warp * gpu::kWarp + gpu::lane());
  gpu::store(to + int64_t(which) * size + unit, A(sum));
}

}  // namespace deepops::isa_gpu::lstm
