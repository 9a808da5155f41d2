// What is done to h after its projection, and to its gradient before: a thread takes V columns of a row [B, R], or one
// where rows or streams do not lie on 16-byte boundaries.
#pragma once
#include "lstm/backward.cuh"

namespace deepops::isa_gpu::lstm {

enum class StateWork : int {
  open,      // next = h0 * mask
  forward,   // zoneout, ends of sequences, h_n, next
  backward,  // grad_out from the gradient of h
  close,     // grad_h0
};

template <class T>
struct StateStep {
  StateWork work;
  bool packs;
  LstmFormula formula;
  StepPlace place;
  Draws draws;
  T* h;  // [B, R]; of this step, as all pointers; backward: grad_out
  const T *h0, *h_before;
  const T* mask;  // or null
  T* next;        // or null
  T* h_n;
  const T* grad_h;  // or null
  StateGradient<T> state;
};

template <class T, int V>
DEEPOPS_DEVICE void forward_state(const StateStep<T>& step, int row, int column, const RowState& state) {
  using A = OpMath<T>;
  const int64_t at = int64_t(row) * step.place.state + column;
  if (!state.runs) {
    store(step.h + at, Units<T, V>{});
    if (state.empty && step.place.opens(false)) store(step.h_n + at, load<V>(step.h0 + at));
    return;
  }
  Units<T, V> h = load<V>(step.h + at);
  if (step.formula.zoneout_h > 0) {
    const unsigned stay = step.draws.template bits<V>(kStreamZoneoutH, step.draws.zoneout_h, row, column);
    const Units<T, V> before = load<V>((state.starts ? step.h0 : step.h_before) + at);
#pragma unroll
    for (int i = 0; i < V; ++i)
      h.set(i, lstm_zoneout(step.formula, step.formula.zoneout_h, stays<A>(stay, i), before.at(i), h.at(i)));
    store(step.h + at, h);
  }
  if (state.ends) store(step.h_n + at, h);
  if (!step.next) return;
  const Units<T, V> mask = load_if<V>(step.mask, at);
#pragma unroll
  for (int i = 0; i < V; ++i)
    if (step.mask) h.set(i, h.at(i) * mask.at(i));
  store(step.next + at, h);
}

template <class T, int V>
DEEPOPS_DEVICE void backward_state(const StateStep<T>& step, int row, int column, const RowState& state) {
  using A = OpMath<T>;
  const int64_t at = int64_t(row) * step.place.state + column;
  if (!state.runs) {
    store(step.h + at, Units<T, V>{});
    if (state.before) step.state.template finish<V>(at, state);
    return;
  }
  A grad[V];
  step.state.template at<V>(at, state.ends, grad);
  const Units<T, V> grad_h = load_if<V>(step.grad_h, at);
  const bool zones = step.formula.zoneout_h > 0;
  const unsigned stay = step.draws.template bits<V>(kStreamZoneoutH, step.draws.zoneout_h, row, column);
  Units<T, V> now, old;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    grad[i] += grad_h.at(i);
    const A stays_here = stays<A>(stay, i);
    now.set(i, zones ? lstm_zoneout_now(step.formula, step.formula.zoneout_h, stays_here, grad[i]) : grad[i]);
    old.set(i, lstm_zoneout_old(step.formula, step.formula.zoneout_h, stays_here, grad[i]));
  }
  store(step.h + at, now);
  if (step.state.old) store(step.state.old + at, old);
}

template <class T, int V>
DEEPOPS_DEVICE void state_work(const StateStep<T>& step, int row, int column) {
  const RowState state = step.place.row(row);
  const int64_t at = int64_t(row) * step.place.state + column;
  if (step.work == StateWork::forward) return forward_state<T, V>(step, row, column, state);
  if (step.work == StateWork::backward) return backward_state<T, V>(step, row, column, state);
  if (step.work == StateWork::close) {
    if (state.before) step.state.template finish<V>(at, state);
    return;
  }
  Units<T, V> h = load<V>(step.h0 + at);
  const Units<T, V> mask = load_if<V>(step.mask, at);
#pragma unroll
  for (int i = 0; i < V; ++i)
    if (step.mask) h.set(i, h.at(i) * mask.at(i));
  store(step.next + at, h);
}

template <class T>
DEEPOPS_KERNEL(kFlatThreads, 1)
lstm_state(StateStep<T> step) {
  constexpr int V = gpu::Pack<T>::kSize;
  const unsigned chunks = unsigned(step.packs ? step.place.state / V : step.place.state);
  const unsigned index = unsigned(gpu::block()) * kFlatThreads + unsigned(gpu::thread());
  const int row = int(index / chunks), chunk = int(index % chunks);
  if (row >= step.place.batch) return;
  if (step.packs) {
    state_work<T, V>(step, row, chunk * V);
  } else {
    state_work<T, 1>(step, row, chunk);
  }
}

}  // namespace deepops::isa_gpu::lstm
