// What the executor's own files share; simt.h is what kernels and tests see of it.
//
//   schedule.cpp  fibers, blocks and barriers: who runs next; launch()
//   order.cpp     fences, atomic operations and signals, and the orders between threads that ThreadSanitizer is told of
//   memory.cpp    global and shared memory: checks and records
//   copies.cpp    copies from global to shared memory that are under way
//   warp.cpp      operations of 32 lanes; matrices.cpp: those on matrices
//   host.cpp      what the host asks for beside launches, and what tests ask for
//
// All of it is compiled without instrumentation in every build, so that sanitizers see only the kernels; what stands
// for an access of a kernel is told to them one by one. Fibers allocate nothing: ThreadSanitizer takes a piece of
// memory that one frees and another gets for a race. And they call no memset or memcpy, which the sanitizers intercept.
#pragma once
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "simt/counts.h"
#include "simt/fiber.h"
#include "simt/simt.h"

namespace simt {

constexpr int kWarp = 32;
constexpr size_t kSharedLimit = 48 << 10;  // what a block gets without asking for more
constexpr int kArraysLimit = 32;
constexpr int kCopiesLimit = 256;  // of one thread, under way at the same time
constexpr int kGroupsLimit = 16;   // of them

enum class Status { ready, at_barrier, at_warp_op, at_signal, exited };
enum class Schedule { in_order, reverse, random };

void enter();  // what every fiber does

// ---- copies under way -----------------------------------------------------------------------------------------------

struct Copy {
  unsigned char* to;
  uint64_t value[2];
  unsigned group;
  bool landed;
};

// Those of one thread, oldest first.
struct Copies {
  Copy list[kCopiesLimit];
  int count;
  unsigned groups, waited;            // groups committed so far, and how many of them this thread has waited for
  char issued, landed[kGroupsLimit];  // stand for orders, see below
#ifdef SIMT_TSAN
  void* copier = nullptr;  // a thread to the sanitizer, which makes this thread's copies
#endif
  ~Copies();
};

// What is known of 16 bytes of shared memory that a copy was to write. The copying thread owns them until a barrier.
struct Unit {
  Here here;                    // of the copy
  int thread;                   // that copies
  bool under_way;               // until that thread has waited for it
  int barriers, warp_barriers;  // that it had passed when it had waited
};

// ---- threads, blocks, launches --------------------------------------------------------------------------------------

struct Thread {
  Fiber fiber{enter};
  Status status = Status::ready;
  Here here{};  // where it waits
  uint64_t value = 0, result = 0;
  int argument = 0;
  const void* in[2] = {};  // operands of a warp operation on matrices
  void* out = nullptr;
  const unsigned* signal = nullptr;     // that it waits for, with its count in `value`
  int barriers = 0, warp_barriers = 0;  // passed so far in this block
  Copies copies;
};

// The operation that lanes of a warp have reached.
struct Warp {
  int arrived = 0, first = 0;  // how many, and the thread that was the first
  WarpOp op{};
  bool returned = false;  // a lane has, from its kernel
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
  Warp warps[kWarp];
  bool did_atomic = false;

  // Shared memory: values, then for each byte what is known of it, then for each 16 bytes a Unit, then a BlockOrder.
  Array arrays[kArraysLimit];
  int array_count = 0;
  unsigned char *shared = nullptr, *shared_order = nullptr;
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
};
extern State state;

inline Thread& of(const Block& block, int thread) { return *(*block.pool)[thread]; }
inline Thread& me() { return of(*state.block, running.thread); }

inline uint64_t next_random() {  // xorshift64
  state.random ^= state.random << 13;
  state.random ^= state.random >> 7;
  return state.random ^= state.random << 17;
}

inline void make_ready(Block& block, int thread) {
  of(block, thread).status = Status::ready;
  block.ready.push_back(thread);
}
inline void wait(Status status, Here here) {
  Thread& thread = me();
  thread.status = status;
  thread.here = here;
}
// Lets others run until somebody makes this thread ready.
void pause();

inline bool same(Here a, Here b) { return a.line == b.line && (a.file == b.file || strcmp(a.file, b.file) == 0); }
std::string text_of(Here here);  // "file:line"

// ---- what the files need of each other ------------------------------------------------------------------------------

// Orders between threads, for ThreadSanitizer: what was before a release() is before what follows the acquire(). The
// addresses of a block lie with its shared memory, so that they order nothing between blocks; and barriers take turns
// with two of them, as a thread may come to the next barrier before another has left this one.
struct LaunchOrder {
  char started, done, published;
};
extern LaunchOrder launch_order;
struct BlockOrder {
  char barrier[2], warp[2][kWarp], fence;
};
BlockOrder& block_order();
inline void release([[maybe_unused]] char* address) {
#ifdef SIMT_TSAN
  __tsan_release(address);
#endif
}
inline void acquire([[maybe_unused]] char* address) {
#ifdef SIMT_TSAN
  __tsan_acquire(address);
#endif
}

// Fresh shared memory for a block that begins.
void provide_shared_memory(Block& block);
// What is known of the 16 bytes at this address of the running block's shared memory.
Unit& unit_at(const unsigned char* shared);
// Takes down an access of the running thread, of `width` bytes. bytes 0: it has none, but others of its warp may.
void record(const void* p, size_t bytes, size_t width, bool store, bool shared, Here here);

// A thread begins a block; it returns from its kernel; it lets others run.
void begin_copies(Thread& thread);
void end_copies(Thread& thread);
void land_some(Thread& thread);
// Ends the launch if the running thread may not access 16 bytes that were copied. True: from now on everybody may.
bool check_copied(const Unit& unit, const SharedArray& array, int i, bool store, Here here);

void leave_warp();  // the running thread has returned from its kernel
// The results of an operation on matrices that all lanes have reached. lanes: the first of 32.
void finish_load_matrices(int lanes);
void finish_multiply_add(WarpOp op, int lanes);

}  // namespace simt
