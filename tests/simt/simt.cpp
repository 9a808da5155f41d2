// The scheduler: see simt.h. Compiled without instrumentation in every build, so that sanitizers see only the kernels.
#include "simt/simt.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "simt/counts.h"
#include "simt/fiber.h"

namespace simt {

Running running;

namespace {

constexpr int kWarp = 32;
constexpr size_t kSharedLimit = 48 << 10;  // what a block gets without asking for more
constexpr int kArraysLimit = 32;
constexpr size_t kPoolsKept = 8;
constexpr int kThreadsAtRandom = 64;  // that run before the scheduler looks again which blocks can

enum class Status { ready, at_barrier, at_warp_op, at_signal, exited };
enum class Schedule { in_order, reverse, random };

void enter();

struct Thread {
  Fiber fiber{enter};
  Status status = Status::ready;
  Here here{};  // where it waits
  WarpOp op{};
  uint64_t value = 0, result = 0;
  int argument = 0;
  const unsigned* signal = nullptr;     // that it waits for, with its count in `value`
  int barriers = 0, warp_barriers = 0;  // passed so far in this block
};

struct Array {
  const void* key;
  SharedArray shared;
};

struct Place {
  const char* file;
  int line, kind;
  size_t bytes;
  bool operator<(const Place& o) const {
    return std::tie(file, line, kind, bytes) < std::tie(o.file, o.line, o.kind, o.bytes);
  }
};

using Pool = std::vector<std::unique_ptr<Thread>>;

// A block that runs. Those of a cooperative launch do so side by side.
struct Block {
  int number = 0;
  Pool* pool = nullptr;
  int alive = 0, at_barrier = 0;
  std::vector<int> ready;
  bool did_atomic = false;

  // Shared memory: values, then for each byte whether it was written. Fibers allocate nothing: ThreadSanitizer takes a
  // piece of memory that one frees and another gets for a race.
  Array arrays[kArraysLimit];
  int array_count = 0;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;

  std::vector<Access> accesses;
  std::vector<std::vector<uint32_t>> passes;  // [thread][place]
};

// Everything a launch has. One launch at a time, on whichever thread of the machine.
struct State {
  std::mutex mutex;
  Schedule schedule = Schedule::in_order;
  uint64_t random = 1;
  bool counting = false;
  std::vector<Counts> recorded;
  std::string json;

  // Fibers are used again, for the same thread of every second block: so ThreadSanitizer sees it race with itself.
  // A cooperative launch has a pool for each block.
  std::vector<std::unique_ptr<Pool>> pools;
  Fiber* scheduler = nullptr;
  const std::function<void()>* body = nullptr;
  const char* kernel = "";
  std::string error;

  int threads = 0;           // of a block
  size_t dynamic_bytes = 0;  // of shared memory, beside that of named arrays
  bool cooperative = false;
  std::vector<Block> blocks;  // the one that runs, or all of a cooperative launch
  Block* block = nullptr;     // the running one
  std::vector<std::unique_ptr<unsigned char[]>> memory;
  int multiprocessors = 0;  // of the pretended device
  int64_t multiprocessor_bytes = 0;

  Counts* counts = nullptr;
  std::map<Place, uint32_t> places;
  std::unordered_map<uint64_t, int> stored;  // by address / 2, while counting: the block; not of packs
} state;

// Addresses that stand for orders between threads in ThreadSanitizer. Those of a block lie with its shared memory, so
// that they order nothing between blocks; and barriers take turns with two of them, as a thread may come to the next
// barrier before another has left this one.
struct {
  char started, done, published;
} order;
struct BlockOrder {
  char barrier[2], warp[2][kWarp], fence;
};
BlockOrder& block_order();

void release([[maybe_unused]] char* address) {
#ifdef SIMT_TSAN
  __tsan_release(address);
#endif
}
void acquire([[maybe_unused]] char* address) {
#ifdef SIMT_TSAN
  __tsan_acquire(address);
#endif
}

Thread& of(const Block& block, int thread) { return *(*block.pool)[thread]; }
Thread& me() { return of(*state.block, running.thread); }

uint64_t next_random() {  // xorshift64
  state.random ^= state.random << 13;
  state.random ^= state.random >> 7;
  return state.random ^= state.random << 17;
}

const char* base_name(const char* path) {
  const char* slash = strrchr(path, '/');
  return slash ? slash + 1 : path;
}

std::string place_of(int thread, Here here) {
  std::string text =
      std::string(state.kernel) + ": block " + std::to_string(running.block) + ", thread " + std::to_string(thread);
  if (here.file) text += std::string(", ") + base_name(here.file) + ":" + std::to_string(here.line);
  return text;
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

void make_ready(Block& block, int thread) {
  of(block, thread).status = Status::ready;
  block.ready.push_back(thread);
}

void wait(Status status, Here here) {
  Thread& thread = me();
  thread.status = status;
  thread.here = here;
}

void pause() { me().fiber.switch_to(*state.scheduler); }

bool same(Here a, Here b) { return a.line == b.line && strcmp(a.file, b.file) == 0; }

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

// The results of a warp operation that all lanes have reached. lanes: the first of 32.
void finish_warp_op(int lanes) {
  uint64_t value[kWarp];
  unsigned votes = 0;
  for (int i = 0; i < kWarp; ++i) {
    value[i] = of(*state.block, lanes + i).value;
    if (value[i]) votes |= 1u << i;
  }
  for (int i = 0; i < kWarp; ++i) {
    Thread& lane = of(*state.block, lanes + i);
    switch (lane.op) {
      case WarpOp::shuffle:
        lane.result = value[lane.argument & (kWarp - 1)];
        break;
      case WarpOp::shuffle_xor:
        lane.result = value[(i ^ lane.argument) & (kWarp - 1)];
        break;
      case WarpOp::ballot:
        lane.result = votes;
        break;
      case WarpOp::barrier:
        break;
    }
    make_ready(*state.block, lanes + i);
  }
}

// What every fiber does: the same thread of one block after another.
void enter() {
  Fiber::entered();
  for (;;) {
    acquire(&order.started);
    (*state.body)();
    release(&order.done);
    wait(Status::exited, {});
    --state.block->alive;
    const int lanes = running.thread / kWarp * kWarp;
    for (int i = lanes; i < std::min(lanes + kWarp, state.threads); ++i) {
      const Thread& lane = of(*state.block, i);
      if (lane.status == Status::at_warp_op) {
        fail(lane.here, "lane %d waits in a warp operation for lane %d, which has returned", i % kWarp,
             running.thread % kWarp);
      }
    }
    try_barrier();
    pause();
  }
}

[[noreturn]] void give_up() {
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

// Fresh for each block under ThreadSanitizer, to which memory used again by the next would be a race between them.
void provide_shared_memory(Block& block) {
  const size_t limit = kSharedLimit + state.dynamic_bytes;
#ifdef SIMT_TSAN
  const bool fresh = true;
#else
  const bool fresh = state.memory.empty() || state.cooperative;
#endif
  if (fresh) state.memory.push_back(std::make_unique<unsigned char[]>(2 * limit + sizeof(BlockOrder) + 16));
  block.shared = state.memory.back().get();
  block.shared += (16 - reinterpret_cast<uintptr_t>(block.shared) % 16) % 16;
  memset(block.shared, 0xff, limit);  // not a number, for whoever gets past the check
  memset(block.shared + limit, 0, limit);
  block.array_count = 0;
  block.shared_bytes = 0;
  release(&order.started);
}

BlockOrder& block_order() {
  return *reinterpret_cast<BlockOrder*>(state.block->shared + 2 * (kSharedLimit + state.dynamic_bytes));
}

void begin(Block& block, int number, Pool& pool) {
  while (int(pool.size()) < state.threads) pool.push_back(std::make_unique<Thread>());
  block.number = number;
  block.pool = &pool;
  block.alive = state.threads;
  block.at_barrier = 0;
  block.did_atomic = false;
  provide_shared_memory(block);
  block.ready.clear();
  block.ready.reserve(state.threads);
  for (int i = 0; i < state.threads; ++i) {
    make_ready(block, state.schedule == Schedule::reverse ? i : state.threads - 1 - i);
    Thread& thread = of(block, i);
    thread.barriers = thread.warp_barriers = 0;
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

void record(const void* p, size_t bytes, bool store, bool shared, Here here) {
  const Place place{here.file, here.line, store * 2 + shared, bytes};
  const auto found = state.places.try_emplace(place, uint32_t(state.places.size())).first;
  auto& passes = state.block->passes[running.thread];
  if (passes.size() <= found->second) passes.resize(found->second + 1);
  state.block->accesses.push_back({uint32_t(running.thread / kWarp), found->second, passes[found->second]++,
                                   uint32_t(running.thread % kWarp), uint32_t(bytes), reinterpret_cast<uint64_t>(p),
                                   store, shared});
}

}  // namespace

void fail(Here here, const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  state.error = place_of(running.thread, here) + ": " + text;
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

uint64_t warp_op(WarpOp op, uint64_t value, int argument, Here here) {
  const int warp = running.thread / kWarp, lanes = warp * kWarp;
  Thread& thread = me();
  wait(Status::at_warp_op, here);
  thread.op = op;
  thread.value = value;
  thread.argument = argument;
  if (lanes + kWarp > state.threads) {
    fail(here, "a warp operation for 32 lanes in a warp of %d", state.threads - lanes);
  }
  int arrived = 0;
  for (int i = lanes; i < lanes + kWarp; ++i) {
    const Thread& lane = of(*state.block, i);
    if (lane.status == Status::exited) {
      fail(here, "a warp operation for all lanes, but lane %d has returned", i % kWarp);
    }
    if (lane.status != Status::at_warp_op) continue;
    ++arrived;
    if (lane.op != op || !same(lane.here, here)) {
      fail(here, "lanes of the warp are in different operations; lane %d waits at line %d", i % kWarp, lane.here.line);
    }
  }
  // Only a warp barrier orders memory, shuffles do not.
  char* turn = op == WarpOp::barrier ? &block_order().warp[thread.warp_barriers++ % 2][warp] : nullptr;
  if (turn) release(turn);
  if (arrived == kWarp) finish_warp_op(lanes);
  pause();
  if (turn) acquire(turn);
  return thread.result;
}

// Between blocks, what a thread wrote before its fence is visible from the next atomic operation of its block on, to
// threads that fence after an atomic operation of theirs.
void fence() {
  if (state.block->did_atomic) acquire(&order.published);
  release(&block_order().fence);
}

// Hands on what the block's threads have fenced, and no more than that: not what the calling thread itself did since.
void publish() {
#ifdef SIMT_TSAN
  static void* const publisher = __tsan_create_fiber(0);
  void* const self = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(publisher, 1);
  __tsan_acquire(&block_order().fence);
  __tsan_release(&order.published);
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

// A plain load may get what a multiprocessor's own cache had before another block stored there.
void record_global(const void* p, size_t bytes, Global kind, Here here) {
  const uint64_t first = reinterpret_cast<uint64_t>(p) / 2, last = (reinterpret_cast<uint64_t>(p) + bytes - 1) / 2;
  for (uint64_t unit = first; unit <= last && bytes < 16 && kind == Global::store; ++unit) {
    state.stored[unit] = running.block;
  }
  for (uint64_t unit = first; unit <= last && !state.stored.empty() && kind == Global::load; ++unit) {
    const auto found = state.stored.find(unit);
    if (found != state.stored.end() && found->second != running.block) {
      fail(here, "a plain load of what block %d has stored in this launch: it needs load_fresh()", found->second);
    }
  }
  record(p, bytes, kind == Global::store, false, here);
}

SharedArray shared_array(const char* name, size_t element_bytes, int count, const void* key, Here here) {
  Block& block = *state.block;
  for (int i = 0; i < block.array_count; ++i) {
    if (block.arrays[i].key == key) return block.arrays[i].shared;
  }
  const size_t at = block.shared_bytes;
  block.shared_bytes += (element_bytes * size_t(count) + 15) / 16 * 16;
  if (block.shared_bytes > kSharedLimit || block.array_count == kArraysLimit) {
    fail(here, "%s: the block needs %zu bytes of shared memory, more than %zu", name, block.shared_bytes, kSharedLimit);
  }
  const SharedArray array{name, block.shared + at, block.shared + kSharedLimit + state.dynamic_bytes + at, count};
  block.arrays[block.array_count++] = {key, array};
  return array;
}

SharedArray dynamic_array(size_t element_bytes) {
  unsigned char* const written = state.block->shared + kSharedLimit + state.dynamic_bytes;
  return {"dynamic memory", state.block->shared + kSharedLimit, written + kSharedLimit,
          int(state.dynamic_bytes / element_bytes)};
}

void* shared_access(const SharedArray& array, int i, size_t bytes, bool store, Here here) {
  if (i < 0 || i >= array.count) {
    fail(here, "%s[%d] in shared memory, which has %d elements", array.name, i, array.count);
  }
  const size_t at = size_t(i) * bytes;
  if (store) {
    for (size_t k = 0; k < bytes; ++k) array.written[at + k] = 1;
  } else if (!array.written[at]) {
    fail(here, "%s[%d] in shared memory is read and was never written", array.name, i);
  }
  if (running.counting) record(array.data + at, bytes, store, true, here);
  return array.data + at;
}

Residency residency(int per_multiprocessor) {
  const int64_t own = state.multiprocessor_bytes / per_multiprocessor - int64_t(kSharedLimit);
  return {int64_t(state.multiprocessors) * per_multiprocessor, own > 0 ? own / 16 * 16 : 0};
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
  acquire(&order.done);
  state.blocks.clear();
  state.memory.clear();
  if (state.counting) state.recorded.push_back(counts);
}

// What the host asks of the device beside launches. kind: "memset" or "copy".
static void record_request(const char* kind, size_t bytes) {
  const std::lock_guard lock(state.mutex);
  if (!state.counting) return;
  Counts counts;
  counts.kind = kind;
  counts.store_bytes = int64_t(bytes);
  state.recorded.push_back(counts);
}

void zero(void* data, size_t bytes) {
  memset(data, 0, bytes);
  record_request("memset", bytes);
}

void copy_in(void* device, const void* host, size_t bytes) {
  memcpy(device, host, bytes);
  record_request("copy", bytes);
}

// IEEE binary16, by the bits: exact, and rounding to nearest even.
float half_to_float(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent == 0) {  // a multiple of 2^-24
    const float value = float(fraction) * 0x1p-24f;
    return sign ? -value : value;
  }
  const uint32_t wide = exponent == 31 ? 255 : exponent + 112;
  return __builtin_bit_cast(float, sign | wide << 23 | fraction << 13);
}

uint16_t float_to_half(float value) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, value), magnitude = bits & 0x7fffffff;
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  if (magnitude > 0x7f800000) return sign | 0x7e00;   // NaN
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // rounds to 2^16 or more
  if (magnitude < 0x38800000) {                       // below 2^-14: in units of 2^-24, rounded by the addition
    const float units = __builtin_bit_cast(float, magnitude) * 0x1p24f + 0x1p23f;
    return uint16_t(sign | (__builtin_bit_cast(uint32_t, units) - 0x4b000000));
  }
  const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  return uint16_t(sign | ((rounded >> 13) - (112 << 10)));
}

}  // namespace simt

void simt_set_schedule(int kind, uint64_t seed) {
  const std::lock_guard lock(simt::state.mutex);
  simt::state.schedule = simt::Schedule(kind);
  simt::state.random = seed * 0x9e3779b97f4a7c15ull + 1;
}

void simt_set_device(int multiprocessors, int64_t shared_bytes) {
  const std::lock_guard lock(simt::state.mutex);
  simt::state.multiprocessors = multiprocessors;
  simt::state.multiprocessor_bytes = shared_bytes;
}

void simt_set_counting(int counting) {
  const std::lock_guard lock(simt::state.mutex);
  simt::state.counting = counting != 0;
  if (counting) simt::state.recorded.clear();
}

const char* simt_counts() {
  const std::lock_guard lock(simt::state.mutex);
  std::string text = "[";
  for (const simt::Counts& counts : simt::state.recorded) text += (text.size() > 1 ? ", " : "") + counts.json();
  simt::state.json = text + "]";
  return simt::state.json.c_str();
}
