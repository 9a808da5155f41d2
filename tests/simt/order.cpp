// Fences, atomic operations and signals between blocks; what ThreadSanitizer is told of orders.
#include "simt/state.h"

namespace simt {

LaunchOrder launch_order;

BlockOrder& block_order() { return *reinterpret_cast<BlockOrder*>(state.block->shared_order); }

// Between blocks, what a thread wrote before its fence is visible from the next atomic operation of its block on, to
// threads that fence after an atomic operation of theirs.
void fence() {
  if (state.block->did_atomic) acquire(&launch_order.published);
  release(&block_order().fence);
}

// Hands on what the block's threads have fenced, and no more than that: not what the calling thread itself did since.
static void publish() {
#ifdef SIMT_TSAN
  static void* const publisher = __tsan_create_fiber(0);
  void* const self = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(publisher, 1);
  acquire(&block_order().fence);
  release(&launch_order.published);
  __tsan_switch_to_fiber(self, 1);
#endif
}

unsigned atomic_add(unsigned* counter, unsigned value, Here here) {
  global_access(counter, sizeof(unsigned), Global::store, here);
  publish();
  state.block->did_atomic = true;
  const unsigned before = __atomic_fetch_add(counter, value, __ATOMIC_RELAXED);
  for (Block& block : state.blocks) {
    for (int i = 0; i < state.threads && block.alive > 0; ++i) {
      const Thread& thread = of(block, i);
      if (thread.status == Status::at_signal && thread.signal == counter && before + value >= thread.value) {
        make_ready(block, i);
      }
    }
  }
  return before;
}

void await(const unsigned* counter, unsigned value, Here here) {
  global_access(counter, sizeof(unsigned), Global::load_fresh, here);
  if (__atomic_load_n(counter, __ATOMIC_RELAXED) < value) {
    wait(Status::at_signal, here);
    me().signal = counter;
    me().value = value;
    pause();
  }
  state.block->did_atomic = true;  // of which its next fence makes use
}

}  // namespace simt
