// CPU kernel of lstm_sequence_backward; compiled once per instruction set, raw pointers only.
//
// A step, the last one first: what zoneout lets through of the gradient of h, back through the projection, then row by
// row the gradients of the gates, then their product with W_hh for the step before. With layer norm a row takes one
// more turn over its units for each of the two sums that its gradients need.
#include "lstm/backward.h"
#include "lstm/gates.h"
#include "lstm/rows.h"

namespace deepops::DEEPOPS_ISA {
namespace {

using core::OpMath;

// What the backward of layer norm subtracts, from sums over the row: mean(d) and mean(d * xhat), d = grad * weight.
struct Means {
  Lanes<double> d{0.0}, d_xhat{0.0};
  template <class V>
  void add(const V& grad, const V& xhat) {
    d += widen(grad);
    d_xhat += widen(grad * xhat);
  }
};
template <class S>
struct NormGradient {
  S mean, invstd, d, d_xhat;
  NormGradient(const S* stats, const Means& sums, int64_t count)
      : mean(stats[0]),
        invstd(stats[1]),
        d(S(sum_of_lanes(sums.d) / double(count))),
        d_xhat(S(sum_of_lanes(sums.d_xhat) / double(count))) {}
  template <class V>
  V operator()(const V& grad, const V& xhat) const {
    return V(invstd) * (grad - V(d) - xhat * V(d_xhat));
  }
};

// One unit block of the forward again.
template <class V>
struct Unit {
  LstmGates<V> gates;
  V c_before, kept, cell;
  LstmPeephole<V> peephole;
};

template <class D, bool plain>
class Backward : HasVariants<plain> {
  using HasVariants<plain>::v;
  using S = OpMath<D>;
  using V = Lanes<S>;

 public:
  Backward(const LstmShape& shape, const LstmBackward& args, int64_t begin, int64_t end)
      : HasVariants<plain>(shape),
        p(shape),
        a(args),
        small(shape),
        begin_(begin * shape.rows_per_group()),
        end_(least(end * shape.rows_per_group(), shape.batch)) {}

  void run() {
    for (int64_t row = begin_; row < end_; ++row) {
      fill(a.grad_h_n, row, p.state, p.state_stride(), a.grad_state);
      fill(a.grad_c_n, row, p.hidden, p.hidden_stride(), a.grad_cell);
    }
    for (int64_t n = p.steps - 1; n >= 0; --n) step(p.step(n), n == 0);
    for (int64_t row = begin_; row < end_; ++row) {
      give(a.grad_state, row, p.state, p.state_stride(), a.grad_h0);
      give(a.grad_cell, row, p.hidden, p.hidden_stride(), a.grad_c0);
    }
  }

 private:
  static void fill(const void* from, int64_t row, int64_t size, int64_t stride, void* to) {
    for (int64_t at = 0; at < size; at += kLanes)
      store_lanes(static_cast<S*>(to) + row * stride + at,
                  from ? load_part(static_cast<const D*>(from) + row * size + at, size - at) : V(S(0)));
  }
  static void give(const void* from, int64_t row, int64_t size, int64_t stride, void* to) {
    for (int64_t at = 0; at < size; at += kLanes)
      store_part(static_cast<D*>(to) + row * size + at, load_lanes(static_cast<const S*>(from) + row * stride + at),
                 size - at);
  }

  // Whether grad_state has something for the step before that does not pass through this one.
  bool keeps_old() const { return v.zones_h || v.has_lengths; }
  int64_t at(int64_t t, int64_t row) const { return t * p.batch + row; }
  bool runs(int64_t t, int64_t row) const { return !v.has_lengths || t < a.lengths[row]; }
  S* grad_state(int64_t row) const { return static_cast<S*>(a.grad_state) + row * p.state_stride(); }
  S* grad_cell(int64_t row) const { return static_cast<S*>(a.grad_cell) + row * p.hidden_stride(); }
  S* row_out(int64_t row) const { return static_cast<S*>(a.row_out) + row * p.hidden_stride(); }
  S* row_o(int64_t row) const { return static_cast<S*>(a.row_o) + row * p.hidden_stride(); }
  S* row_shown(int64_t row) const { return static_cast<S*>(a.row_shown) + row * p.hidden_stride(); }
  S* grad_gates(int64_t t, int64_t row) const { return static_cast<S*>(a.grad_gates) + at(t, row) * p.gates(); }
  S* grad_r(int64_t t, int64_t row) const { return static_cast<S*>(a.grad_r) + at(t, row) * p.gates(); }
  S* grad_out(int64_t t, int64_t row) const { return static_cast<S*>(a.grad_out) + at(t, row) * p.state; }
  const S* stats(int64_t t, int64_t row) const { return static_cast<const S*>(a.stats) + at(t, row) * 4; }

  void step(int64_t t, bool first) {
    if (v.projects) project(t);
    for (int64_t row = begin_; row < end_; ++row) {
      if (!runs(t, row)) {
        for (int64_t gate = 0; gate < p.gates(); ++gate) grad_gates(t, row)[gate] = 0;
        for (int64_t gate = 0; v.normalizes && gate < p.gates(); ++gate) grad_r(t, row)[gate] = 0;
      } else if (v.normalizes) {
        normalized_cell(t, row, first);
        normalized_sums(t, row);
      } else {
        for (int64_t unit = 0; unit < p.hidden; unit += kLanes) {
          const Unit<V> u = unit_at(t, row, unit, first);
          const auto grads = lstm_output_gradients(out_at(t, row, unit), u.gates.o, lstm_tanh(u.cell));
          close(t, row, unit, u, grads.o, grads.shown);
        }
      }
    }
    multiply_back(t);
  }

  // The gradient of h of 16 columns before zoneout; grad_state keeps what belongs to the h of the step before.
  V head(int64_t t, int64_t row, int64_t column) const {
    S* const state = grad_state(row) + column;
    V grad = load_lanes(state);
    if (!runs(t, row)) return V(S(0));
    if (a.grad_h)
      grad = grad + load_part(static_cast<const D*>(a.grad_h) + at(t, row) * p.state + column, p.state - column);
    if (v.zones_h) {
      const V stays = lstm_stays<S>(p, a.seed, kStreamZoneoutH, p.zoneout_h, t, row, column);
      store_lanes(state, lstm_zoneout_old(v, p.zoneout_h, stays, grad));
      return lstm_zoneout_now(v, p.zoneout_h, stays, grad);
    }
    if (keeps_old()) store_lanes(state, V(S(0)));
    return grad;
  }

  void project(int64_t t) {
    for (int64_t row = begin_; row < end_; ++row)
      for (int64_t column = 0; column < p.state; column += kLanes)
        store_part(grad_out(t, row) + column, head(t, row, column), p.state - column);
    PanelSums<S> sums;
    for (int64_t unit = 0; unit < p.hidden; unit += kPanel) {
      const S* const panel = static_cast<const S*>(a.weights.projection) + unit * p.state;
      for_row_tiles<S>(begin_, end_, [&](int64_t first, int64_t rows) {
        multiply(grad_out(t, first), p.state, rows, p.state, panel, sums.value, false);
        for (int64_t r = 0; r < rows; ++r)
          for (int lane = 0; lane < least(kPanel, p.hidden - unit); lane += kLanes)
            store_lanes(row_out(first + r) + unit + lane, load_lanes(sums.value + r * kPanel + lane));
      });
    }
  }

  V out_at(int64_t t, int64_t row, int64_t unit) const {
    return v.projects ? load_lanes(row_out(row) + unit) : head(t, row, unit);
  }

  Unit<V> unit_at(int64_t t, int64_t row, int64_t unit, bool first) const {
    const int64_t valid = p.hidden - unit;
    const D* const gates = static_cast<const D*>(a.gates) + at(t, row) * p.gates() + unit;
    const bool begins = first || (v.has_lengths && p.reverse && t == a.lengths[row] - 1);
    const D* const c_before = begins ? static_cast<const D*>(a.c0) + row * p.hidden
                                     : static_cast<const D*>(a.c) + at(p.reverse ? t + 1 : t - 1, row) * p.hidden;
    Unit<V> u;
    u.gates = {load_part(gates, valid), load_part(gates + p.hidden, valid), load_part(gates + 2 * p.hidden, valid),
               load_part(gates + 3 * p.hidden, valid)};
    u.c_before = load_part(c_before + unit, valid);
    u.kept = v.drops ? lstm_kept<S>(p, a.seed, t, row, unit) : V(S(1));
    const V g = lstm_dropped(v, u.gates.g, u.kept);
    u.cell = lstm_new_cell(v, lstm_unclipped(u.gates, g, u.c_before), Rounded<D>());
    u.peephole = {S(0), S(0), S(0)};
    if (v.peephole) u.peephole = peephole_at<S>(p, a.weights.peephole, unit);
    return u;
  }

  // From the gradients of o's sum and of the cell as tanh sees it.
  void close(int64_t t, int64_t row, int64_t unit, const Unit<V>& u, const V& o, const V& shown) const {
    const int64_t valid = p.hidden - unit;
    S* const state = grad_cell(row) + unit;
    V cell = load_lanes(state), old(S(0));
    if (a.grad_c) cell = cell + load_part(static_cast<const D*>(a.grad_c) + at(t, row) * p.hidden + unit, valid);
    if (v.zones_c) {
      const V stays = lstm_stays<S>(p, a.seed, kStreamZoneoutC, p.zoneout_c, t, row, unit);
      old = lstm_zoneout_old(v, p.zoneout_c, stays, cell);
      cell = lstm_zoneout_now(v, p.zoneout_c, stays, cell);
    }
    cell = cell + shown;
    if (v.peephole) cell = cell + o * u.peephole.o;
    const LstmStepGradients<V> grads = lstm_step_gradients(v, cell, o, u.gates, u.kept, u.peephole, u.c_before);
    store_lanes(state, v.zones_c ? grads.c_before + old : grads.c_before);
    S* const to = grad_gates(t, row) + unit;
    store_part(to, grads.sums.i, valid);
    store_part(to + p.hidden, grads.sums.f, valid);
    store_part(to + 2 * p.hidden, grads.sums.g, valid);
    store_part(to + 3 * p.hidden, grads.sums.o, valid);
    if (v.peephole) {
      const int64_t stride = p.hidden_stride();
      add_small(row, small.peephole + unit, grads.sums.i * u.c_before);
      add_small(row, small.peephole + stride + unit, grads.sums.f * u.c_before);
      add_small(row, small.peephole + 2 * stride + unit, grads.sums.o * u.cell);
    }
  }

  void add_small(int64_t row, int64_t where, const V& value) const {
    double* const sum = a.small + row / p.rows_per_group() * small.size + where;
    store_lanes(sum, load_lanes(sum) + widen(value));
  }

  void normalized_cell(int64_t t, int64_t row, bool first) const {
    const S* const c = stats(t, row) + 2;
    Means sums;
    for (int64_t unit = 0; unit < p.hidden; unit += kLanes) {
      const Unit<V> u = unit_at(t, row, unit, first);
      const V xhat = (u.cell - V(c[0])) * V(c[1]);
      const V weight = load_lanes(static_cast<const S*>(a.weights.ln_c) + unit);
      const V bias = load_lanes(static_cast<const S*>(a.weights.bias_ln_c) + unit);
      const auto grads = lstm_output_gradients(out_at(t, row, unit), u.gates.o, lstm_tanh(xhat * weight + bias));
      add_small(row, small.ln_c + unit, grads.shown * xhat);
      add_small(row, small.bias_ln_c + unit, grads.shown);
      sums.add(grads.shown * weight, xhat);
      store_lanes(row_o(row) + unit, grads.o);
      store_lanes(row_shown(row) + unit, grads.shown * weight);
    }
    const NormGradient<S> gradient(c, sums, p.hidden);
    for (int64_t unit = 0; unit < p.hidden; unit += kLanes) {
      const Unit<V> u = unit_at(t, row, unit, first);
      const V xhat = (u.cell - V(c[0])) * V(c[1]);
      close(t, row, unit, u, load_lanes(row_o(row) + unit), gradient(load_lanes(row_shown(row) + unit), xhat));
    }
  }

  void normalized_sums(int64_t t, int64_t row) const {
    const S* const r = stats(t, row);
    // each(gate, unit, gradient of the normalised sum times its weight, normalised sum)
    const auto for_units = [&](const auto& each) {
      for (int gate = 0; gate < kGates; ++gate)
        for (int64_t unit = 0; unit < p.hidden; unit += kLanes) {
          const int64_t from = gate * p.hidden + unit, valid = p.hidden - unit;
          const D* const sums = static_cast<const D*>(a.r) + at(t, row) * p.gates() + from;
          each(gate, unit, load_part(grad_gates(t, row) + from, valid), (load_part(sums, valid) - V(r[0])) * V(r[1]));
        }
    };
    const auto weight = [&](int gate, int64_t unit) {
      return load_lanes(static_cast<const S*>(a.weights.ln_hh) + gate * p.hidden_stride() + unit);
    };
    Means sums;
    for_units([&](int gate, int64_t unit, const V& grad, const V& xhat) {
      add_small(row, small.ln_hh + gate * p.hidden_stride() + unit, grad * xhat);
      sums.add(grad * weight(gate, unit), xhat);
    });
    const NormGradient<S> gradient(r, sums, p.gates());
    for_units([&](int gate, int64_t unit, const V& grad, const V& xhat) {
      store_part(grad_r(t, row) + gate * p.hidden + unit, gradient(grad * weight(gate, unit), xhat), p.hidden - unit);
    });
  }

  // The gradient of h of the step before: through W_hh, and what zoneout or the end of the sequence passed on.
  void multiply_back(int64_t t) const {
    PanelSums<S> sums;
    for (int64_t begin = 0; begin < p.state; begin += kPanel) {
      const S* const panel = static_cast<const S*>(a.weights.gates) + begin * p.gates();
      for_row_tiles<S>(begin_, end_, [&](int64_t first, int64_t rows) {
        const S* const grads = v.normalizes ? grad_r(t, first) : grad_gates(t, first);
        multiply(grads, p.gates(), rows, p.gates(), panel, sums.value, false);
        for (int64_t r = 0; r < rows; ++r)
          for (int lane = 0; lane < least(kPanel, p.state - begin); lane += kLanes) {
            const int64_t column = begin + lane, row = first + r;
            V grad = load_lanes(sums.value + r * kPanel + lane);
            if (v.masks_hidden)
              grad = grad * load_part(static_cast<const D*>(a.hidden_mask) + row * p.state + column, p.state - column);
            S* const state = grad_state(row) + column;
            store_lanes(state, keeps_old() ? grad + load_lanes(state) : grad);
          }
      });
    }
  }

  const LstmShape& p;
  const LstmBackward& a;
  const LstmSmall small;
  const int64_t begin_, end_;
};

}  // namespace

void lstm_backward(const LstmShape& p, const LstmBackward& args, int64_t begin, int64_t end) {
  DEEPOPS_DISPATCH_DTYPE(p.dtype, [&]<class D>() {
    is_plain(p) ? Backward<D, true>(p, args, begin, end).run() : Backward<D, false>(p, args, begin, end).run();
  })
}

}  // namespace deepops::DEEPOPS_ISA
