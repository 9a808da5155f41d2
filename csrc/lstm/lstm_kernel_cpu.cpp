// CPU kernels of lstm_sequence: packing, the forward; compiled once per instruction set, raw pointers only.
//
// Without layer norm the gates of 16 units follow the product of their panel at once. With it a step takes three turns
// over the units: sums, whose statistics must be known before the gates; gates and cells; what the cells' statistics
// make of them.
#include "lstm/backward.h"
#include "lstm/gates.h"
#include "lstm/rows.h"

namespace deepops::DEEPOPS_ISA {
namespace {

using core::OpMath;

// ---- packing --------------------------------------------------------------------------------------------------------

// [parts, hidden] to [parts][stride] in sums, 0 beyond the last.
template <class D, class S>
void widen_rows(const void* from, int64_t parts, int64_t hidden, int64_t stride, void* to) {
  if (from == nullptr) return;
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t unit = 0; unit < stride; unit += kLanes)
      store_lanes(static_cast<S*>(to) + part * stride + unit,
                  unit < hidden ? load_part(static_cast<const D*>(from) + part * hidden + unit, hidden - unit)
                                : Lanes<S>(S(0)));
}

template <class D>
void pack_small(const LstmShape& p, const LstmRawWeights& raw, const LstmWeights& weights) {
  using S = OpMath<D>;
  const int64_t stride = p.hidden_stride();
  widen_rows<D, S>(raw.peephole, 3, p.hidden, stride, weights.peephole);
  widen_rows<D, S>(raw.ln_hh, 4, p.hidden, stride, weights.ln_hh);
  widen_rows<D, S>(raw.ln_c, 1, p.hidden, stride, weights.ln_c);
  widen_rows<D, S>(raw.bias_ln_c, 1, p.hidden, stride, weights.bias_ln_c);
}

template <class D>
void pack_forward(const LstmShape& p, const LstmRawWeights& raw, const LstmWeights& weights) {
  using S = OpMath<D>;
  pack_gates(static_cast<const D*>(raw.hh), p.hidden, p.state, static_cast<S*>(weights.gates), 0, p.state);
  if (p.projects)
    pack_transposed(static_cast<const D*>(raw.hr), p.state, p.hidden, static_cast<S*>(weights.projection));
  pack_small<D>(p, raw, weights);
}

template <class D>
void pack_backward(const LstmShape& p, const LstmRawWeights& raw, const LstmWeights& weights) {
  using S = OpMath<D>;
  pack_columns(static_cast<const D*>(raw.hh), p.gates(), p.state, static_cast<S*>(weights.gates));
  if (p.projects) pack_columns(static_cast<const D*>(raw.hr), p.state, p.hidden, static_cast<S*>(weights.projection));
  pack_small<D>(p, raw, weights);
}

// ---- forward --------------------------------------------------------------------------------------------------------

// The steps of the sequences [begin, end).
template <class D, bool plain>
class Forward : HasVariants<plain> {
  using HasVariants<plain>::v;
  using S = OpMath<D>;
  using V = Lanes<S>;

 public:
  Forward(const LstmShape& shape, const LstmForward& args, int64_t begin, int64_t end)
      : HasVariants<plain>(shape), p(shape), a(args), begin_(begin), end_(end) {
    now_ = static_cast<S*>(a.operand);
    next_ = now_ + p.batch * p.state_stride();
  }

  void run() {
    begin_state();
    for (int64_t n = 0; n < p.steps; ++n) {
      step(p.step(n));
      S* const read = now_;
      now_ = next_;
      next_ = read;
    }
    end_state();
  }

 private:
  S* h_state() const { return v.masks_hidden ? static_cast<S*>(a.h_state) : now_; }
  S* c_state(int64_t row) const { return static_cast<S*>(a.c_state) + row * p.hidden_stride(); }
  S* row_out(int64_t row) const { return static_cast<S*>(a.row_out) + row * p.hidden_stride(); }
  S* row_cell(int64_t row) const { return static_cast<S*>(a.row_cell) + row * p.hidden_stride(); }
  S* row_gates(int64_t row) const { return static_cast<S*>(a.row_gates) + row * kGates * p.hidden_stride(); }
  int64_t at(int64_t t, int64_t row) const { return t * p.batch + row; }
  bool runs(int64_t t, int64_t row) const { return !v.has_lengths || t < a.lengths[row]; }

  V masked(const V& h, int64_t row, int64_t column) const {
    if (!v.masks_hidden) return h;
    return h * load_part(static_cast<const D*>(a.hidden_mask) + row * p.state + column, p.state - column);
  }

  void begin_state() {
    for (int64_t row = begin_; row < end_; ++row) {
      for (int64_t column = 0; column < p.state; column += kLanes) {
        const V h = load_part(static_cast<const D*>(a.h0) + row * p.state + column, p.state - column);
        if (v.masks_hidden) store_lanes(static_cast<S*>(a.h_state) + row * p.state_stride() + column, h);
        store_lanes(now_ + row * p.state_stride() + column, masked(h, row, column));
      }
      for (int64_t unit = 0; unit < p.hidden; unit += kLanes)
        store_lanes(c_state(row) + unit,
                    load_part(static_cast<const D*>(a.c0) + row * p.hidden + unit, p.hidden - unit));
    }
  }

  void end_state() {
    for (int64_t row = begin_; row < end_; ++row) {
      for (int64_t column = 0; column < p.state; column += kLanes)
        store_part(static_cast<D*>(a.h_n) + row * p.state + column,
                   load_lanes(h_state() + row * p.state_stride() + column), p.state - column);
      for (int64_t unit = 0; unit < p.hidden; unit += kLanes)
        store_part(static_cast<D*>(a.c_n) + row * p.hidden + unit, load_lanes(c_state(row) + unit), p.hidden - unit);
    }
  }

  void step(int64_t t) {
    PanelSums<S> sums;
    for (int64_t unit = 0; unit < p.hidden; unit += kLanes) {
      const S* const panel = static_cast<const S*>(a.weights.gates) + unit * kGates * p.state;
      for_row_tiles<S>(begin_, end_, [&](int64_t first, int64_t rows) {
        for (int64_t r = 0; r < rows; ++r) fetch(t, first + r, unit);
        multiply(now_ + first * p.state_stride(), p.state_stride(), rows, p.state, panel, sums.value, false);
        for (int64_t r = 0; r < rows; ++r) take(t, first + r, unit, sums.value + r * kPanel);
      });
    }
    if (v.normalizes)
      for (int64_t row = begin_; row < end_; ++row) normalized(t, row);
    if (v.projects) project(t);
  }

  // What `open` will read of 16 units, fetched during the product: too far apart for the hardware to see what is next.
  void fetch(int64_t t, int64_t row, int64_t unit) const {
    const int64_t from = at(t, row) * p.gates() + unit;
    for (int gate = 0; gate < kGates; ++gate)
      __builtin_prefetch(static_cast<const S*>(a.gates_x) + from + gate * p.hidden);
  }

  // r of 16 units: i, f, g, o.
  void take(int64_t t, int64_t row, int64_t unit, const S* r) {
    if (v.normalizes) {
      for (int lane = 0; lane < kPanel; lane += kLanes)
        store_lanes(row_gates(row) + unit * kGates + lane, load_lanes(r + lane));
      return;
    }
    LstmGates<V> sums{load_lanes(r), load_lanes(r + kLanes), load_lanes(r + 2 * kLanes), load_lanes(r + 3 * kLanes)};
    V o;
    const V cell = open(t, row, unit, sums, o);
    close(t, row, unit, cell, o, cell);
  }

  // Gates and cell from r, which is normalised. Stores the gates; c_state is as it was.
  V open(int64_t t, int64_t row, int64_t unit, LstmGates<V> sums, V& o) {
    const int64_t valid = p.hidden - unit;
    const S* const x = static_cast<const S*>(a.gates_x) + at(t, row) * p.gates() + unit;
    sums.i = load_part(x, valid) + sums.i;
    sums.f = load_part(x + p.hidden, valid) + sums.f;
    sums.g = load_part(x + 2 * p.hidden, valid) + sums.g;
    sums.o = load_part(x + 3 * p.hidden, valid) + sums.o;
    const Rounded<D> round;
    const LstmPeephole<V> none{S(0), S(0), S(0)};
    const LstmPeephole<V> peephole = v.peephole ? peephole_at<S>(p, a.weights.peephole, unit) : none;
    const V c_before = load_lanes(c_state(row) + unit);
    const LstmGates<V> gates = lstm_gates(v, sums, peephole, c_before, round);
    const V g = lstm_dropped(v, gates.g, v.drops ? lstm_kept<S>(p, a.seed, t, row, unit) : V(S(1)));
    const V cell = lstm_new_cell(v, lstm_unclipped(gates, g, c_before), round);
    o = lstm_output_gate(v, gates.o, peephole, cell, round);
    if (a.gates) {
      D* const to = static_cast<D*>(a.gates) + at(t, row) * p.gates() + unit;
      store_part(to, gates.i, valid);
      store_part(to + p.hidden, gates.f, valid);
      store_part(to + 2 * p.hidden, gates.g, valid);
      store_part(to + 3 * p.hidden, o, valid);
    }
    return cell;
  }

  // The rest for 16 units. shown: what tanh sees of the cell.
  void close(int64_t t, int64_t row, int64_t unit, const V& cell, const V& o, const V& shown) {
    const Rounded<D> round;
    V c = cell;
    S* const state = c_state(row) + unit;
    if (v.zones_c) {
      const V stays = lstm_stays<S>(p, a.seed, kStreamZoneoutC, p.zoneout_c, t, row, unit);
      c = round(lstm_zoneout(v, p.zoneout_c, stays, load_lanes(state), cell));
    }
    if (runs(t, row)) {
      store_lanes(state, c);
    } else {
      c = V(S(0));
    }
    if (a.c) store_part(static_cast<D*>(a.c) + at(t, row) * p.hidden + unit, c, p.hidden - unit);
    const V out = round(o * lstm_tanh(shown));
    if (!v.projects) return keep(t, row, unit, out);
    store_lanes(row_out(row) + unit, out);
    if (a.out) store_part(static_cast<D*>(a.out) + at(t, row) * p.hidden + unit, out, p.hidden - unit);
  }

  // h of 16 columns: zoneout, the end of a sequence, what the next step will read.
  void keep(int64_t t, int64_t row, int64_t column, V h) {
    S* const state = h_state() + row * p.state_stride() + column;
    if (v.zones_h) {
      const V stays = lstm_stays<S>(p, a.seed, kStreamZoneoutH, p.zoneout_h, t, row, column);
      h = lstm_zoneout(v, p.zoneout_h, stays, load_lanes(state), h);
    }
    h = Rounded<D>()(h);
    V shown = h;
    if (!runs(t, row)) {
      h = load_lanes(state);
      shown = V(S(0));
    }
    store_part(static_cast<D*>(a.h) + at(t, row) * p.state + column, shown, p.state - column);
    if (v.masks_hidden) store_lanes(state, h);
    store_lanes(next_ + row * p.state_stride() + column, masked(h, row, column));
  }

  void project(int64_t t) {
    PanelSums<S> sums;
    for (int64_t column = 0; column < p.state; column += kPanel) {
      const S* const panel = static_cast<const S*>(a.weights.projection) + column * p.hidden;
      for_row_tiles<S>(begin_, end_, [&](int64_t first, int64_t rows) {
        multiply(row_out(first), p.hidden_stride(), rows, p.hidden, panel, sums.value, false);
        for (int64_t r = 0; r < rows; ++r)
          for (int lane = 0; lane < least(kPanel, p.state - column); lane += kLanes)
            keep(t, first + r, column + lane, load_lanes(sums.value + r * kPanel + lane));
      });
    }
  }

  // A step with layer norm, from the sums of all units of a row.
  void normalized(int64_t t, int64_t row) {
    const S* const sums = row_gates(row);
    const RowStatistics<S> r = statistics_of<S>(p.gates(), p.layer_norm_eps, [&](const auto& use) {
      for (int64_t unit = 0; unit < p.hidden; unit += kLanes) {
        const S* const at = sums + unit * kGates;
        const V gates[] = {load_lanes(at), load_lanes(at + kLanes), load_lanes(at + 2 * kLanes),
                           load_lanes(at + 3 * kLanes)};
        use(gates, p.hidden - unit);
      }
    });
    S* const outputs = row_out(row);
    S* const cells = row_cell(row);
    for (int64_t unit = 0; unit < p.hidden; unit += kLanes) {
      V scaled[kGates];
      for (int gate = 0; gate < kGates; ++gate) {
        const V value = load_lanes(sums + unit * kGates + gate * kLanes);
        if (a.r)
          store_part(static_cast<D*>(a.r) + at(t, row) * p.gates() + gate * p.hidden + unit, value, p.hidden - unit);
        const V weight = load_lanes(static_cast<const S*>(a.weights.ln_hh) + gate * p.hidden_stride() + unit);
        scaled[gate] = (value - V(r.mean)) * V(r.invstd) * weight;
      }
      V o;
      store_lanes(cells + unit, open(t, row, unit, {scaled[0], scaled[1], scaled[2], scaled[3]}, o));
      store_lanes(outputs + unit, o);
    }
    const RowStatistics<S> c = statistics_of<S>(p.hidden, p.layer_norm_eps, [&](const auto& use) {
      for (int64_t unit = 0; unit < p.hidden; unit += kLanes) {
        const V cell[] = {load_lanes(cells + unit)};
        use(cell, p.hidden - unit);
      }
    });
    for (int64_t unit = 0; unit < p.hidden; unit += kLanes) {
      const V cell = load_lanes(cells + unit);
      const V weight = load_lanes(static_cast<const S*>(a.weights.ln_c) + unit);
      const V bias = load_lanes(static_cast<const S*>(a.weights.bias_ln_c) + unit);
      close(t, row, unit, cell, load_lanes(outputs + unit), (cell - V(c.mean)) * V(c.invstd) * weight + bias);
    }
    if (!a.stats) return;
    S* const stats = static_cast<S*>(a.stats) + at(t, row) * 4;
    stats[0] = r.mean;
    stats[1] = r.invstd;
    stats[2] = c.mean;
    stats[3] = c.invstd;
  }

  const LstmShape& p;
  const LstmForward& a;
  const int64_t begin_, end_;
  S *now_, *next_;  // operands of the product: of this step and of the next
};

// ---- run-time choices to template arguments -------------------------------------------------------------------------

void pack_forward_any(const LstmShape& p, const LstmRawWeights& raw, const LstmWeights& weights) {
  DEEPOPS_DISPATCH_DTYPE(p.dtype, [&]<class D>() { pack_forward<D>(p, raw, weights); })
}

void pack_backward_any(const LstmShape& p, const LstmRawWeights& raw, const LstmWeights& weights) {
  DEEPOPS_DISPATCH_DTYPE(p.dtype, [&]<class D>() { pack_backward<D>(p, raw, weights); })
}

void forward_any(const LstmShape& p, const LstmForward& args, int64_t begin, int64_t end) {
  DEEPOPS_DISPATCH_DTYPE(p.dtype, [&]<class D>() {
    is_plain(p) ? Forward<D, true>(p, args, begin, end).run() : Forward<D, false>(p, args, begin, end).run();
  })
}

}  // namespace

const LstmKernels lstm_kernels = {pack_forward_any, pack_backward_any, forward_any, lstm_backward};

}  // namespace deepops::DEEPOPS_ISA
