// The pointwise part of a step forward: from gates_x and the recurrent product to gates, c and h.
//
// A thread takes V units of a row.
#pragma once
#include "lstm/units.cuh"

namespace deepops::isa_gpu::lstm {

// Pointers are to what belongs to this step.
template <class T>
struct ForwardStep {
  using A = OpMath<T>;
  LstmFormula formula;
  StepPlace place;
  Draws draws;
  bool projects;      // h goes to the projection, and what is done to it comes after
  const T* gates_x;   // [B, 4H], or null
  int64_t x_stride;   // from one of its rows to the next
  const T* product;   // [B, 4H]
  const T *h0, *c0;   // [B, H]
  const T* h_before;  // [B, H], of the step before
  const T* c_before;
  const T* peephole;                       // [3H] or null
  const T* mask;                           // [B, H] or null: h is multiplied by it for the next product
  const T *weight_hh, *weight_c, *bias_c;  // layer norm's, [4H], [H], [H]
  A eps;
  A* stats;      // [B, 4] or null
  T* gates;      // [B, 4H] or null; may be `product`
  T* h;          // [B, H]: h, or what is projected
  T* c;          // [B, H]: of this step, or c_n
  bool every_c;  // of this step
  T* next;       // [B, H] or null: what the next product takes
  T *h_n, *c_n;  // [B, H]

  DEEPOPS_DEVICE int64_t gate_at(int row, int gate, int unit) const {
    return (int64_t(row) * 4 + gate) * place.hidden + unit;
  }
  DEEPOPS_DEVICE int64_t at(int row, int unit) const { return int64_t(row) * place.hidden + unit; }
};

// V units on their way.
template <class T, int V>
struct ForwardUnits {
  Units<T, V> i, f, g, c_before;
  OpMath<T> o[V], cell[V];  // o: the sum
  LstmPeephole<Units<T, V>> peephole;
};

template <class T>
struct Rounded {
  DEEPOPS_DEVICE OpMath<T> operator()(OpMath<T> value) const { return gpu::widen(gpu::narrow<T>(value)); }
};

template <int V, class T>
DEEPOPS_DEVICE LstmPeephole<Units<T, V>> load_peephole(const T* peephole, int hidden, int unit) {
  if (!peephole) return {};
  return {load<V>(peephole + unit), load<V>(peephole + hidden + unit), load<V>(peephole + 2 * hidden + unit)};
}
template <class T, int V>
DEEPOPS_DEVICE LstmPeephole<OpMath<T>> peephole_at(const LstmPeephole<Units<T, V>>& peephole, int i) {
  return {peephole.i.at(i), peephole.f.at(i), peephole.o.at(i)};
}

// recurrent(gate, i): what is added to gates_x.
template <int V, class T, class Recurrent>
DEEPOPS_DEVICE ForwardUnits<T, V> make_cell(const ForwardStep<T>& step, int row, int unit, bool starts,
                                            const Recurrent& recurrent) {
  using A = OpMath<T>;
  ForwardUnits<T, V> units;
  Units<T, V> x[4];
#pragma unroll
  for (int gate = 0; gate < 4; ++gate)
    x[gate] = load_if<V>(step.gates_x, row * step.x_stride + int64_t(gate) * step.place.hidden + unit);
  units.c_before = load<V>((starts ? step.c0 : step.c_before) + step.at(row, unit));
  units.peephole = load_peephole<V>(step.peephole, step.place.hidden, unit);
  const unsigned dropped =
      step.draws.template bits<V>(kStreamRecurrentDropout, step.draws.recurrent_dropout, row, unit);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const A c_before = units.c_before.at(i);
    const LstmGates<A> sums{x[0].at(i) + recurrent(0, i), x[1].at(i) + recurrent(1, i), x[2].at(i) + recurrent(2, i),
                            x[3].at(i) + recurrent(3, i)};
    const LstmGates<A> gates = lstm_gates(step.formula, sums, peephole_at(units.peephole, i), c_before, Rounded<T>());
    const A g = lstm_dropped(step.formula, gates.g, kept<A>(step.draws, dropped, i));
    units.i.set(i, gates.i);
    units.f.set(i, gates.f);
    units.g.set(i, gates.g);
    units.o[i] = gates.o;
    units.cell[i] = lstm_new_cell(step.formula, lstm_unclipped(gates, g, c_before), Rounded<T>());
  }
  return units;
}

// h before zoneout, and all stores. shown(i): what tanh sees.
template <int V, class T, class Shown>
DEEPOPS_DEVICE void finish(const ForwardStep<T>& step, int row, int unit, const RowState& state,
                           const ForwardUnits<T, V>& units, const Shown& shown) {
  using A = OpMath<T>;
  const int64_t at = step.at(row, unit);
  const bool zones_h = !step.projects && step.formula.zoneout_h > 0;
  const unsigned stays_h = step.draws.template bits<V>(kStreamZoneoutH, zones_h ? step.draws.zoneout_h : 0, row, unit);
  const unsigned stays_c = step.draws.template bits<V>(kStreamZoneoutC, step.draws.zoneout_c, row, unit);
  const Units<T, V> h_before = load_if<V>(!zones_h ? nullptr : state.starts ? step.h0 : step.h_before, at);
  Units<T, V> o, h, c;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const A cell = units.cell[i];
    const A gate = lstm_output_gate(step.formula, units.o[i], peephole_at(units.peephole, i), cell, Rounded<T>());
    A out = gate * lstm_tanh(A(shown(i))), state_c = cell;
    if (zones_h) {
      out = lstm_zoneout(step.formula, step.formula.zoneout_h, stays<A>(stays_h, i), h_before.at(i), Rounded<T>()(out));
    }
    if (step.formula.zoneout_c > 0) {
      state_c = lstm_zoneout(step.formula, step.formula.zoneout_c, stays<A>(stays_c, i), units.c_before.at(i), cell);
    }
    o.set(i, gate);
    h.set(i, out);
    c.set(i, state_c);
  }
  if (step.gates) {
    store(step.gates + step.gate_at(row, 0, unit), units.i);
    store(step.gates + step.gate_at(row, 1, unit), units.f);
    store(step.gates + step.gate_at(row, 2, unit), units.g);
    store(step.gates + step.gate_at(row, 3, unit), o);
  }
  store(step.c + at, c);
  store(step.h + at, h);
  if (state.ends && step.every_c) store(step.c_n + at, c);
  if (step.projects) return;
  if (state.ends) store(step.h_n + at, h);
  if (!step.next) return;
  if (step.mask) {
    const Units<T, V> mask = load<V>(step.mask + at);
#pragma unroll
    for (int i = 0; i < V; ++i) h.set(i, h.at(i) * mask.at(i));
  }
  store(step.next + at, h);
}

// Units of a row that has no such step. What is read of its gates and outputs later is 0.
template <int V, class T>
DEEPOPS_DEVICE void pass_over(const ForwardStep<T>& step, int row, int unit, const RowState& state) {
  const int64_t at = step.at(row, unit);
  const Units<T, V> zero{};
  store(step.h + at, zero);
  if (step.every_c) store(step.c + at, zero);
  if (step.gates) {
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) store(step.gates + step.gate_at(row, gate, unit), zero);
  }
  if (!state.empty || !step.place.opens(false)) return;
  store(step.c_n + at, load<V>(step.c0 + at));
  if (!step.projects) store(step.h_n + at, load<V>(step.h0 + at));
}

template <class T, int V>
DEEPOPS_KERNEL(kFlatThreads, 1)
lstm_forward(ForwardStep<T> step) {
  const unsigned chunks = unsigned(step.place.hidden / V);
  const unsigned index = unsigned(gpu::block()) * kFlatThreads + unsigned(gpu::thread());
  const int row = int(index / chunks), unit = int(index % chunks) * V;
  if (row >= step.place.batch) return;
  const RowState state = step.place.row(row);
  if (!state.runs) return pass_over<V>(step, row, unit, state);
  Units<T, V> r[4];
#pragma unroll
  for (int gate = 0; gate < 4; ++gate) r[gate] = load<V>(step.product + step.gate_at(row, gate, unit));
  const auto units = make_cell<V>(step, row, unit, state.starts, [&](int gate, int i) { return r[gate].at(i); });
  finish(step, row, unit, state, units, [&](int i) { return units.cell[i]; });
}

}  // namespace deepops::isa_gpu::lstm
