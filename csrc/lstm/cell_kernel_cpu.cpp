// CPU kernels of lstm_cell and its backward; compiled once per instruction set, raw pointers only.
//
// The gate arithmetic of 16 units is done as soon as their sums are there. A work item of the products is a panel and a
// group of rows, so that two threads read one half of the weights each where the rows are few. No result depends on how
// items are divided: a sum is one chain (packed_product.h).
#include "lstm/cell.h"

#include "lstm/gates.h"
#include "lstm/rows.h"

namespace deepops::DEEPOPS_ISA {
namespace {

using core::OpMath;

// ---- rows -----------------------------------------------------------------------------------------------------------

// 16 units, or those that are left.
struct Units {
  int64_t first, count;
  Units(const CellShape& p, int64_t block) : first(block * kLanes), count(least(p.hidden - first, kLanes)) {}
};

template <class T>
LanesOf<T> load_or_zero(const T* p, int64_t at, int64_t count) {
  return p ? load_part(p + at, count) : LanesOf<T>(OpMath<T>(0));
}

template <class T>
const T* row_of(const CellRows& rows, int64_t row) {
  return rows.data ? static_cast<const T*>(rows.data) + row * rows.stride : nullptr;
}

template <class T>
LstmPeephole<LanesOf<T>> peephole_of(const CellShape& p, const void* weight, const Units& units) {
  const T* const at = static_cast<const T*>(weight);
  return {load_or_zero(at, units.first, units.count), load_or_zero(at, p.hidden + units.first, units.count),
          load_or_zero(at, 2 * p.hidden + units.first, units.count)};
}

template <class T>
LstmGates<LanesOf<T>> load_gates(const T* row, int64_t hidden, const Units& units) {
  row += units.first;
  return {load_part(row, units.count), load_part(row + hidden, units.count), load_part(row + 2 * hidden, units.count),
          load_part(row + 3 * hidden, units.count)};
}
template <class T>
void store_gates(T* row, int64_t hidden, const Units& units, const LstmGates<LanesOf<T>>& gates) {
  row += units.first;
  store_part(row, gates.i, units.count);
  store_part(row + hidden, gates.f, units.count);
  store_part(row + 2 * hidden, gates.g, units.count);
  store_part(row + 3 * hidden, gates.o, units.count);
}

// ---- work items of the products -------------------------------------------------------------------------------------

// each(panel, first row, end of the rows) for items [begin, end).
template <class Each>
void for_items(const CellShape& p, int64_t begin, int64_t end, const Each& each) {
  const int64_t groups = p.row_groups();
  for (int64_t item = begin; item < end; ++item)
    each(item / groups, p.first_row(item % groups), p.first_row(item % groups + 1));
}

// ---- forward --------------------------------------------------------------------------------------------------------

// One row of 16 units from its sums, [4][16], to the new state.
template <class T>
struct GateArithmetic {
  using S = OpMath<T>;
  using V = Lanes<S>;
  const CellShape& p;
  const CellForward& args;
  Units units;
  LstmGates<V> bias;
  LstmPeephole<V> peephole;

  GateArithmetic(const CellShape& shape, const CellForward& arguments, int64_t block)
      : p(shape), args(arguments), units(shape, block), peephole(peephole_of<T>(shape, arguments.peephole, units)) {
    const V zero(S(0));
    const S* const from = static_cast<const S*>(args.bias);
    bias = from ? load_gates(from, p.hidden, units) : LstmGates<V>{zero, zero, zero, zero};
  }

  void operator()(int64_t row, const S* sums) const {
    const Rounded<T> round;
    const V c_before = load_part(row_of<T>(args.c, row) + units.first, units.count);
    const LstmGates<V> all = {load_lanes(sums) + bias.i, load_lanes(sums + kLanes) + bias.f,
                              load_lanes(sums + 2 * kLanes) + bias.g, load_lanes(sums + 3 * kLanes) + bias.o};
    LstmGates<V> gates = lstm_gates(p, all, peephole, c_before, round);
    const V cell = lstm_new_cell(p, lstm_unclipped(gates, gates.g, c_before), round);
    gates.o = lstm_output_gate(p, gates.o, peephole, cell, round);
    const int64_t at = row * p.hidden + units.first;
    store_part(static_cast<T*>(args.new_c) + at, cell, units.count);
    store_part(static_cast<T*>(args.new_h) + at, gates.o * lstm_tanh(cell), units.count);
    if (args.gates) store_gates(static_cast<T*>(args.gates) + row * p.gates(), p.hidden, units, gates);
  }
};

template <class T>
void forward_of(const CellShape& p, const CellForward& args, int64_t begin, int64_t end) {
  using S = OpMath<T>;
  PanelSums<S> sums;
  for_items(p, begin, end, [&](int64_t block, int64_t first, int64_t last) {
    const S* const panel = static_cast<const S*>(args.packed) + block * (p.input + p.hidden) * kPanel;
    const GateArithmetic<T> arithmetic(p, args, block);
    for_row_tiles<S>(first, last, [&](int64_t row, int64_t rows) {
      multiply(row_of<S>(args.x, row), args.x.stride, rows, p.input, panel, sums.value, false);
      multiply(row_of<S>(args.h, row), args.h.stride, rows, p.hidden, panel + p.input * kPanel, sums.value, true);
      for (int64_t r = 0; r < rows; ++r) arithmetic(row + r, sums.value + r * kPanel);
    });
  });
}

// ---- backward -------------------------------------------------------------------------------------------------------

template <class T>
void gate_gradients_of(const CellShape& p, const CellBackward& args, int64_t begin, int64_t end) {
  using S = OpMath<T>;
  using V = Lanes<S>;
  for (int64_t row = begin; row < end; ++row) {
    const T* const grad_h = row_of<T>(args.grad_h, row);
    const T* const grad_c = row_of<T>(args.grad_c, row);
    const T* const c_before = row_of<T>(args.c_before, row);
    const T* const gates_row = static_cast<const T*>(args.gates) + row * p.gates();
    for (int64_t block = 0; block < unit_blocks_of(p.hidden); ++block) {
      const Units units(p, block);
      const LstmPeephole<V> peephole = peephole_of<T>(p, args.peephole, units);
      const LstmGates<V> gates = load_gates(gates_row, p.hidden, units);
      const V before = load_part(c_before + units.first, units.count);
      const V cell = lstm_new_cell(p, lstm_unclipped(gates, gates.g, before), Rounded<T>());
      const auto output =
          lstm_output_gradients(load_or_zero(grad_h, units.first, units.count), gates.o, lstm_tanh(cell));
      V grad_cell = load_or_zero(grad_c, units.first, units.count) + output.shown;
      if (p.peephole) grad_cell = grad_cell + output.o * peephole.o;
      const auto step = lstm_step_gradients(p, grad_cell, output.o, gates, V(S(1)), peephole, before);
      store_gates(static_cast<T*>(args.grad_gates) + row * p.gates(), p.hidden, units, step.sums);
      if constexpr (sizeof(T) != sizeof(S))
        store_gates(static_cast<S*>(args.grad_sums) + row * p.gates(), p.hidden, units, step.sums);
      store_part(static_cast<T*>(args.grad_new_c) + row * p.hidden + units.first, step.c_before, units.count);
    }
  }
}

template <class T>
void peephole_gradients_of(const CellShape& p, const CellBackward& args, int64_t begin, int64_t end) {
  using S = OpMath<T>;
  using V = Lanes<S>;
  for (int64_t block = begin; block < end; ++block) {
    const Units units(p, block);
    V i(S(0)), f(S(0)), o(S(0));
    for (int64_t row = 0; row < p.batch; ++row) {
      const V before = load_part(row_of<T>(args.c_before, row) + units.first, units.count);
      const auto gates = load_gates(static_cast<const T*>(args.gates) + row * p.gates(), p.hidden, units);
      const auto grads = load_gates(static_cast<const S*>(args.grad_sums) + row * p.gates(), p.hidden, units);
      i += grads.i * before;
      f += grads.f * before;
      o += grads.o * lstm_new_cell(p, lstm_unclipped(gates, gates.g, before), Rounded<T>());
    }
    S* const to = static_cast<S*>(args.grad_peephole) + units.first;
    store_part(to, i, units.count);
    store_part(to + p.hidden, f, units.count);
    store_part(to + 2 * p.hidden, o, units.count);
  }
}

// Rows [first, last) of grad_sums times panel `panel` of `columns` columns.
template <class T>
void multiply_gradients(const CellShape& p, const void* grad_sums, const OpMath<T>* panels, int64_t panel,
                        int64_t columns, int64_t first, int64_t last, void* to) {
  using S = OpMath<T>;
  PanelSums<S> sums;
  const S* const rows_of_a = static_cast<const S*>(grad_sums);
  for_row_tiles<S>(first, last, [&](int64_t row, int64_t rows) {
    multiply(rows_of_a + row * p.gates(), p.gates(), rows, p.gates(), panels + panel * p.gates() * kPanel, sums.value,
             false);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t lane = 0; lane < kPanel; lane += kLanes) {
        const int64_t column = panel * kPanel + lane, left = columns - column;
        if (left <= 0) break;
        store_part(static_cast<T*>(to) + (row + r) * columns + column, load_lanes(sums.value + r * kPanel + lane),
                   left < kLanes ? left : kLanes);
      }
  });
}

template <class T>
void input_gradients_of(const CellShape& p, const CellBackward& args, int64_t begin, int64_t end) {
  const OpMath<T>* const packed = static_cast<const OpMath<T>*>(args.packed);
  const int64_t x_panels = args.grad_x ? panels_of(p.input) : 0;
  for_items(p, begin, end, [&](int64_t panel, int64_t first, int64_t last) {
    if (panel < x_panels) {
      multiply_gradients<T>(p, args.grad_sums, packed + p.grad_x_at(), panel, p.input, first, last, args.grad_x);
    } else {
      multiply_gradients<T>(p, args.grad_sums, packed + p.grad_h_at(), panel - x_panels, p.hidden, first, last,
                            args.grad_new_h);
    }
  });
}

// ---- by type --------------------------------------------------------------------------------------------------------

template <class T>
void pack_of(const CellShape& p, const void* weight_ih, const void* weight_hh, void* packed) {
  using S = OpMath<T>;
  const T* const ih = static_cast<const T*>(weight_ih);
  const T* const hh = static_cast<const T*>(weight_hh);
  S* const to = static_cast<S*>(packed);
  pack_gates(ih, p.hidden, p.input, to, 0, p.input + p.hidden);
  pack_gates(hh, p.hidden, p.hidden, to, p.input, p.input + p.hidden);
  pack_columns(ih, p.gates(), p.input, to + p.grad_x_at());
  pack_columns(hh, p.gates(), p.hidden, to + p.grad_h_at());
}

template <class T>
void widen_of(const CellRows& from, int64_t rows, int64_t columns, float* to) {
  for (int64_t row = 0; row < rows; ++row, to += columns) {
    const T* const at = row_of<T>(from, row);
    for (int64_t k = 0; k < columns; k += kLanes) {
      const int64_t count = columns - k < kLanes ? columns - k : kLanes;
      store_part(to + k, load_part(at + k, count), count);
    }
  }
}

void pack(const CellShape& p, const void* weight_ih, const void* weight_hh, void* packed) {
  DEEPOPS_DISPATCH_DTYPE(p.dtype, [&]<class T>() { pack_of<T>(p, weight_ih, weight_hh, packed); });
}
void widen_rows(core::DataType dtype, const CellRows& from, int64_t rows, int64_t columns, float* to) {
  if (dtype == core::DataType::f16) return widen_of<core::Half>(from, rows, columns, to);
  widen_of<core::BFloat16>(from, rows, columns, to);
}
void forward(const CellShape& p, const CellForward& args, int64_t begin, int64_t end) {
  DEEPOPS_DISPATCH_DTYPE(p.dtype, [&]<class T>() { forward_of<T>(p, args, begin, end); });
}
void gate_gradients(const CellShape& p, const CellBackward& args, int64_t begin, int64_t end) {
  DEEPOPS_DISPATCH_DTYPE(p.dtype, [&]<class T>() { gate_gradients_of<T>(p, args, begin, end); });
}
void peephole_gradients(const CellShape& p, const CellBackward& args, int64_t begin, int64_t end) {
  DEEPOPS_DISPATCH_DTYPE(p.dtype, [&]<class T>() { peephole_gradients_of<T>(p, args, begin, end); });
}
void input_gradients(const CellShape& p, const CellBackward& args, int64_t begin, int64_t end) {
  DEEPOPS_DISPATCH_DTYPE(p.dtype, [&]<class T>() { input_gradients_of<T>(p, args, begin, end); });
}

}  // namespace

const CellKernels cell_kernels = {&pack, &widen_rows, &forward, &gate_gradients, &peephole_gradients, &input_gradients};

}  // namespace deepops::DEEPOPS_ISA
