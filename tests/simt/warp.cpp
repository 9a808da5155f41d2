// Operations that all 32 lanes of a warp make together.
#include "simt/state.h"

namespace simt {
namespace {

// The running lane has reached an operation. True for the last of the 32.
bool arrive(WarpOp op, Here here) {
  const int number = running.thread / kWarp, lanes = number * kWarp;
  Block& block = *state.block;
  Warp& warp = block.warps[number];
  wait(Status::at_warp_op, here);
  if (lanes + kWarp > state.threads) {
    fail(here, "a warp operation for 32 lanes in a warp of %d", state.threads - lanes);
  }
  if (warp.returned) {
    int lane = 0;
    while (of(block, lanes + lane).status != Status::exited) ++lane;
    fail(here, "a warp operation for all lanes, but lane %d has returned", lane);
  }
  if (warp.arrived == 0) {
    warp.op = op;
    warp.first = running.thread;
  } else if (const Here other = of(block, warp.first).here; warp.op != op || !same(other, here)) {
    fail(here, "lanes of the warp are in different operations; lane %d waits at line %d", warp.first % kWarp,
         other.line);
  }
  return ++warp.arrived == kWarp;
}

void exchange(WarpOp op, int lanes) {
  const Block& block = *state.block;
  uint64_t value[kWarp];
  unsigned votes = 0;
  for (int i = 0; i < kWarp; ++i) {
    value[i] = of(block, lanes + i).value;
    if (value[i]) votes |= 1u << i;
  }
  for (int i = 0; i < kWarp; ++i) {
    Thread& lane = of(block, lanes + i);
    const int from = op == WarpOp::shuffle ? lane.argument : i ^ lane.argument;
    lane.result = op == WarpOp::ballot ? votes : value[from & (kWarp - 1)];
  }
}

// Does what all lanes of the running one's warp have come for, and lets them go on.
void finish(WarpOp op) {
  const int number = running.thread / kWarp, lanes = number * kWarp;
  state.block->warps[number].arrived = 0;
  switch (op) {
    case WarpOp::barrier:
      break;
    case WarpOp::shuffle:
    case WarpOp::shuffle_xor:
    case WarpOp::ballot:
      exchange(op, lanes);
      break;
    case WarpOp::load_matrices:
      finish_load_matrices(lanes);
      break;
    case WarpOp::multiply_add_f16:
    case WarpOp::multiply_add_bf16:
      finish_multiply_add(op, lanes);
      break;
  }
  for (int i = 0; i < kWarp; ++i) make_ready(*state.block, lanes + i);
}

}  // namespace

uint64_t warp_op(WarpOp op, uint64_t value, int argument, Here here) {
  Thread& thread = me();
  thread.value = value;
  thread.argument = argument;
  // Only a warp barrier orders memory, shuffles do not.
  char* turn = nullptr;
  if (op == WarpOp::barrier) {
    turn = &block_order().warp[thread.warp_barriers++ % 2][running.thread / kWarp];
    release(turn);
  }
  if (arrive(op, here)) finish(op);
  pause();
  if (turn) acquire(turn);
  return thread.result;
}

void matrix_op(WarpOp op, void* out, const void* in, const void* in_too, Here here) {
  Thread& thread = me();
  thread.out = out;
  thread.in[0] = in;
  thread.in[1] = in_too;
  if (arrive(op, here)) finish(op);
  pause();
}

// A lane has returned from its kernel.
void leave_warp() {
  const int number = running.thread / kWarp;
  Warp& warp = state.block->warps[number];
  warp.returned = true;
  if (warp.arrived == 0) return;
  fail(of(*state.block, warp.first).here, "lane %d waits in a warp operation for lane %d, which has returned",
       warp.first % kWarp, running.thread % kWarp);
}

}  // namespace simt
