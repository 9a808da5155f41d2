// The SIMT executor: runs GPU kernels on the CPU, one fiber per CUDA thread, all on one thread of the machine.
//
// csrc/core/gpu.cuh calls what is declared here when it is compiled with DEEPOPS_SIMT; kernels never do. Blocks run one
// after another, those of a cooperative launch side by side; threads run until they wait for each other. What no real
// GPU reports is an error with block, thread and line: a barrier that not all threads reach, lanes of a warp at
// different places, a deadlock, a misaligned access, shared memory out of bounds or never written. On request every
// access is recorded and counted as the hardware would serve it, warp by warp.
//
// Three builds (tests/simt/CMakeLists.txt) divide the work. The fast one runs schedules: in order, in reverse, random.
// Under AddressSanitizer and UBSan global memory is checked. Under ThreadSanitizer each fiber is a thread to the
// sanitizer, ordered with others by barriers and fences alone, so that a race is found in any schedule.
//
// The executor's own files are listed in state.h.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

namespace simt {

// A place in a kernel.
struct Here {
  const char* file;
  int line;
  // As a default argument: where the function is called.
  static constexpr Here at(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

// The running thread, for the inline functions below.
struct Running {
  int thread = 0;  // in its block
  int block = 0;
  int blocks = 0;
  bool counting = false;
};
extern Running running;

inline int thread() { return running.thread; }
inline int block() { return running.block; }
inline int blocks() { return running.blocks; }

// Stops the launch with an error that names block, thread and place.
[[noreturn]] void fail(Here here, const char* format, ...) __attribute__((format(printf, 2, 3)));

// ---- waiting for others ---------------------------------------------------------------------------------------------

enum class WarpOp { barrier, shuffle, shuffle_xor, ballot, load_matrices, multiply_add_f16, multiply_add_bf16 };

void barrier(Here here);
void fence();
// Waits for all 32 lanes of the warp to call the same operation at the same place; returns its result for this lane.
uint64_t warp_op(WarpOp op, uint64_t value, int argument, Here here);
// The same for operations on matrices, with each lane's own registers.
void matrix_op(WarpOp op, void* out, const void* in, const void* in_too, Here here);
unsigned atomic_add(unsigned* counter, unsigned value, Here here);

// Waits until *counter, which atomic_add() increases, is at least `value`.
void await(const unsigned* counter, unsigned value, Here here);

inline void warp_barrier(Here here) { warp_op(WarpOp::barrier, 0, 0, here); }
inline unsigned ballot(bool condition, Here here) { return unsigned(warp_op(WarpOp::ballot, condition, 0, here)); }
template <class T>
T shuffle(WarpOp op, T value, int argument, Here here) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle moves 4 or 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = warp_op(op, bits, argument, here);
  memcpy(&value, &bits, sizeof(T));
  return value;
}

// ---- memory ---------------------------------------------------------------------------------------------------------

enum class Global { load, load_fresh, store };

void record_global(const void* p, size_t bytes, Global kind, Here here);
inline void global_access(const void* p, size_t bytes, Global kind, Here here) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) {
    fail(here, "misaligned %s of %zu bytes at %p", kind == Global::store ? "store" : "load", bytes, p);
  }
  if (running.counting) record_global(p, bytes, kind, here);
}

void record_no_load(size_t bytes, Here here);

// Other lanes of the warp load here and this one does not: its next access at this place still counts with theirs.
inline void no_load(size_t bytes, Here here) {
  if (running.counting) record_no_load(bytes, here);
}

// An array in the shared memory of the running block.
struct SharedArray {
  const char* name;
  unsigned char* data;
  unsigned char* marks;  // one per byte: what is known of it
  int count;             // elements
};

SharedArray shared_array(const char* name, size_t element_bytes, int count, const void* key, Here here);
// All that launch() was asked for beside the named arrays.
SharedArray dynamic_array(size_t element_bytes);
// Checks an access of `bytes` bytes from element i on, and returns its address. element: bytes of one.
enum class Shared { load, store, copy };
void* shared_access(const SharedArray& array, int i, size_t element, size_t bytes, Shared kind, Here here);

// The 16 bytes at `value` go to the running thread's shared memory, at some time before its wait for their group.
void copy_async(const SharedArray& array, int i, size_t element, const void* value, Here here);
void copy_async_commit(Here here);
void copy_async_wait(int newest, Here here);

// ---- the host's side ------------------------------------------------------------------------------------------------

// Runs body() once for each thread. Throws std::runtime_error if the kernel was stopped by fail().
// dynamic_bytes: of shared memory for dynamic_array(). cooperative: blocks may wait for each other.
void launch(const char* name, int64_t blocks, int threads, const std::function<void()>& body, size_t dynamic_bytes = 0,
            bool cooperative = false);
// Of the pretended device: how many blocks there may be in a cooperative launch with so many on each multiprocessor,
// and how much dynamic shared memory each can have.
struct Residency {
  int64_t blocks, bytes;
};
Residency residency(int per_multiprocessor);
void zero(void* data, size_t bytes);
void copy_in(void* device, const void* host, size_t bytes);

float half_to_float(uint16_t bits);
uint16_t float_to_half(float value);

}  // namespace simt

// For the tests (tests/simt/__init__.py), by name.
extern "C" {
#define SIMT_EXPORT __attribute__((visibility("default")))
// 0: in order, 1: in reverse, 2: random by seed. Holds for launches to come.
SIMT_EXPORT void simt_set_schedule(int kind, uint64_t seed);
// The device that residency() speaks of: multiprocessors, and bytes of shared memory on each. At first there are none.
SIMT_EXPORT void simt_set_device(int multiprocessors, int64_t shared_bytes);
// Starts (1) or ends (0) the recording of launches; starting forgets what was recorded before.
SIMT_EXPORT void simt_set_counting(int counting);
// What was recorded, as JSON: a list with one object per launch, memset or copy (counts.h). Valid until the next call.
SIMT_EXPORT const char* simt_counts();
}
