// The scheduler: which fiber runs next; see simt.h.
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <stdexcept>

#include "simt/state.h"

namespace simt {

Running running;
State state;

namespace {

constexpr size_t kPoolsKept = 8;
constexpr int kThreadsAtRandom = 64;  // that run before the scheduler looks again which blocks can

std::string place_of(int thread, Here here) {
  std::string text =
      std::string(state.kernel) + ": block " + std::to_string(running.block) + ", thread " + std::to_string(thread);
  return here.file ? text + ", " + text_of(here) : text;
}

// What all threads of the running block are doing, in one line.
std::string overview() {
  int count[5] = {};
  for (int i = 0; i < state.threads; ++i) ++count[int(of(*state.block, i).status)];
  return " (of " + std::to_string(state.threads) + " threads " + std::to_string(count[int(Status::at_barrier)]) +
         " wait at a barrier, " + std::to_string(count[int(Status::at_warp_op)]) + " in a warp operation, " +
         std::to_string(count[int(Status::at_signal)]) + " for a signal, " +
         std::to_string(count[int(Status::exited)]) + " have returned)";
}

// Releases the barrier if all threads are there.
void try_barrier() {
  Block& block = *state.block;
  if (block.at_barrier == 0 || block.at_barrier != block.alive) return;
  int first = -1;
  for (int i = 0; i < state.threads; ++i) {
    const Thread& thread = of(block, i);
    if (thread.status != Status::at_barrier) continue;
    if (first < 0) first = i;
    if (!same(thread.here, of(block, first).here)) {
      fail(thread.here, "threads of the block wait at different barriers; thread %d waits at line %d", first,
           of(block, first).here.line);
    }
  }
  if (block.alive != state.threads) {
    fail(of(block, first).here, "a barrier that some threads of the block never reach: they have returned%s",
         overview().c_str());
  }
  block.at_barrier = 0;
  for (int i = 0; i < state.threads; ++i) make_ready(block, i);
}

[[noreturn]] void give_up() {
  acquire(&launch_order.done);  // what fail() has written
  const std::string error = state.error;
  state.pools.clear();  // fibers are in the middle of a kernel
  state.blocks.clear();
  state.memory.clear();
  throw std::runtime_error("SIMT: " + error);
}

// A waiting thread that nobody will ever wake.
void report_deadlock() {
  const auto waits_for = [](Status status) {
    switch (status) {
      case Status::at_warp_op:
        return "in a warp operation that not all 32 lanes reach";
      case Status::at_signal:
        return state.cooperative ? "for a signal that no block gives"
                                 : "for a signal of a block that is not running: the launch is not cooperative";
      default:
        return "at a barrier that not all threads reach";
    }
  };
  // A signal that does not come says more than the barrier that others wait at meanwhile, a warp operation more still.
  for (const Status status : {Status::at_barrier, Status::at_signal, Status::at_warp_op}) {
    for (Block& block : state.blocks) {
      for (int i = 0; i < state.threads && block.alive > 0; ++i) {
        const Thread& thread = of(block, i);
        if (thread.status != status) continue;
        state.block = &block;
        running.block = block.number;
        state.error = place_of(i, thread.here) + ": deadlock: it waits " + waits_for(status) + overview();
        break;
      }
    }
  }
}

void begin(Block& block, int number, Pool& pool) {
  while (int(pool.size()) < state.threads) pool.push_back(std::make_unique<Thread>());
  block.number = number;
  block.pool = &pool;
  block.alive = state.threads;
  block.at_barrier = 0;
  block.did_atomic = false;
  for (Warp& warp : block.warps) warp = {};
  provide_shared_memory(block);
  block.ready.clear();
  block.ready.reserve(state.threads);
  for (int i = 0; i < state.threads; ++i) {
    make_ready(block, state.schedule == Schedule::reverse ? i : state.threads - 1 - i);
    Thread& thread = of(block, i);
    thread.barriers = thread.warp_barriers = 0;
    begin_copies(thread);
  }
  block.passes.resize(state.threads);
  for (auto& passes : block.passes) passes.clear();
}

// Runs one of the threads that can until it waits.
void step(Block& block) {
  if (state.schedule == Schedule::random)
    std::swap(block.ready[next_random() % block.ready.size()], block.ready.back());
  state.block = &block;
  running.block = block.number;
  running.thread = block.ready.back();
  block.ready.pop_back();
  state.scheduler->switch_to(me().fiber);
  if (!state.error.empty()) give_up();
}

void finish(Block& block) {
  if (block.alive != 0) {
    report_deadlock();
    give_up();
  }
  if (!state.counts) return;
  state.counts->add(block.accesses);
  block.accesses.clear();
  const int64_t bytes = int64_t(block.shared_bytes + state.dynamic_bytes);
  state.counts->shared_bytes = std::max(state.counts->shared_bytes, bytes);
}

Pool& pool(size_t number) {
  while (state.pools.size() <= number) state.pools.push_back(std::make_unique<Pool>());
  return *state.pools[number];
}

void run_one_by_one(const std::vector<int>& numbers) {
  state.blocks.resize(1);
  Block& block = state.blocks[0];
  for (const int number : numbers) {
    begin(block, number, pool(size_t(number % 2)));
    while (!block.ready.empty()) step(block);
    finish(block);
  }
}

// At random a block is left at any time, else when all of its threads wait.
void run_side_by_side(const std::vector<int>& numbers) {
  state.blocks.resize(numbers.size());
  for (size_t i = 0; i < numbers.size(); ++i) begin(state.blocks[i], numbers[i], pool(i));
  std::vector<Block*> able;
  for (;;) {
    able.clear();
    for (Block& block : state.blocks) {
      if (!block.ready.empty()) able.push_back(&block);
    }
    if (able.empty()) break;
    if (state.schedule != Schedule::random) {
      while (!able[0]->ready.empty()) step(*able[0]);
      continue;
    }
    for (int turn = 0; turn < kThreadsAtRandom; ++turn) {
      Block& block = *able[next_random() % able.size()];
      if (!block.ready.empty()) step(block);
    }
  }
  for (Block& block : state.blocks) finish(block);
  if (state.pools.size() > kPoolsKept) state.pools.resize(kPoolsKept);
}

std::vector<int> sequence(int64_t blocks) {
  std::vector<int> result(blocks);
  for (int64_t i = 0; i < blocks; ++i) result[i] = int(state.schedule == Schedule::reverse ? blocks - 1 - i : i);
  for (int64_t i = blocks; i > 1 && state.schedule == Schedule::random; --i) {
    std::swap(result[i - 1], result[next_random() % i]);
  }
  return result;
}

}  // namespace

// What every fiber does: the same thread of one block after another.
void enter() {
  Fiber::entered();
  for (;;) {
    acquire(&launch_order.started);
    (*state.body)();
    end_copies(me());
    release(&launch_order.done);
    wait(Status::exited, {});
    --state.block->alive;
    leave_warp();
    try_barrier();
    pause();
  }
}

void pause() {
  land_some(me());
  me().fiber.switch_to(*state.scheduler);
}

std::string text_of(Here here) {
  const char* slash = strrchr(here.file, '/');
  return std::string(slash ? slash + 1 : here.file) + ":" + std::to_string(here.line);
}

void fail(Here here, const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  state.error = place_of(running.thread, here) + ": " + text;
  release(&launch_order.done);
  pause();  // for good: the scheduler gives up
  __builtin_unreachable();
}

void barrier(Here here) {
  char* turn = &block_order().barrier[me().barriers++ % 2];
  release(turn);
  wait(Status::at_barrier, here);
  ++state.block->at_barrier;
  if (state.counts) ++state.counts->barriers;
  try_barrier();
  pause();
  acquire(turn);
}

void launch(const char* name, int64_t blocks, int threads, const std::function<void()>& body, size_t dynamic_bytes,
            bool cooperative) {
  if (threads <= 0 || threads > 1024) {
    throw std::runtime_error(std::string("SIMT: ") + name + ": " + std::to_string(threads) +
                             " threads a block; 1 to 1024 are allowed");
  }
  const std::lock_guard lock(state.mutex);
  Fiber scheduler;
  state.scheduler = &scheduler;
  state.body = &body;
  state.kernel = name;
  state.error.clear();
  state.threads = threads;
  state.dynamic_bytes = dynamic_bytes;
  state.cooperative = cooperative;
  state.memory.clear();
  Counts counts;
  counts.kind = "kernel";
  counts.name = name;
  counts.blocks = blocks;
  counts.threads = threads;
  state.counts = state.counting ? &counts : nullptr;
  running.counting = state.counting;
  state.stored.clear();
  running.blocks = int(blocks);
  cooperative ? run_side_by_side(sequence(blocks)) : run_one_by_one(sequence(blocks));
  acquire(&launch_order.done);
  state.blocks.clear();
  state.memory.clear();
  if (state.counting) state.recorded.push_back(counts);
}

}  // namespace simt
