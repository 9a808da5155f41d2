// Stackful fibers: functions that wait for each other on one thread of the machine.
//
// A switch is twelve instructions on x86-64 (13 million threads of a trivial kernel a second) and swapcontext, a system
// call, elsewhere. Sanitizers are told of every switch: AddressSanitizer which stack is in use, ThreadSanitizer which
// of its threads runs, without any order between the two.
#pragma once
#include <pthread.h>
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>

#ifdef SIMT_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef SIMT_TSAN
#include <sanitizer/tsan_interface.h>
#endif
#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace simt {

#ifdef __x86_64__
// Pushes what a called function must keep, stores the stack pointer, takes another and pops.
__attribute__((naked, noinline, used)) inline void switch_stack(void** /*from*/, void* /*to*/) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}
#endif

class Fiber {
 public:
  using Entry = void (*)();

  // The thread of the machine that calls this, from which others are switched to.
  Fiber() {
#ifdef SIMT_ASAN
    pthread_attr_t attributes;
    void* stack;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &stack, &size_);
    pthread_attr_destroy(&attributes);
    stack_ = static_cast<char*>(stack);
#endif
#ifdef SIMT_TSAN
    tsan_ = __tsan_get_current_fiber();
#endif
  }

  // Begins with entry(), which never returns, when it is first switched to.
  explicit Fiber(Entry entry) : own_(true), size_(kStack) {
    void* memory =
        mmap(nullptr, kStack + kGuard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("SIMT: no memory for a stack");
    mprotect(memory, kGuard, PROT_NONE);  // an overflow ends the program instead of another fiber's data
    stack_ = static_cast<char*>(memory) + kGuard;
#ifdef __x86_64__
    // Not all at the same place of a page: the tops of many stacks would share a few sets of the cache.
    static unsigned made = 0;
    void** top = reinterpret_cast<void**>(stack_ + kStack - made++ % 61 * 64);
    *--top = nullptr;  // a function is entered with its stack pointer 8 bytes off a multiple of 16
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    pointer_ = top;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_;
    context_.uc_stack.ss_size = kStack;
    makecontext(&context_, entry, 0);
#endif
#ifdef SIMT_TSAN
    tsan_ = __tsan_create_fiber(0);
#endif
  }

  Fiber(const Fiber&) = delete;
  ~Fiber() {
    if (!own_) return;
#ifdef SIMT_ASAN
    __asan_unpoison_memory_region(stack_, kStack);
#endif
#ifdef SIMT_TSAN
    __tsan_destroy_fiber(tsan_);
#endif
    munmap(stack_ - kGuard, kStack + kGuard);
  }

  // Leaves this fiber, which is the running one, for another.
  void switch_to(Fiber& other) {
#ifdef SIMT_ASAN
    __sanitizer_start_switch_fiber(&fake_stack_, other.stack_, other.size_);
#endif
#ifdef SIMT_TSAN
    __tsan_switch_to_fiber(other.tsan_, 1);  // 1: the switch itself orders nothing
#endif
#ifdef __x86_64__
    switch_stack(&pointer_, other.pointer_);
#else
    swapcontext(&context_, &other.context_);
#endif
#ifdef SIMT_ASAN
    __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#endif
  }

  // The first thing an entry function does.
  static void entered() {
#ifdef SIMT_ASAN
    __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  }

 private:
#if defined(SIMT_ASAN) || defined(SIMT_TSAN)
  static constexpr size_t kStack = 256 << 10;
#else
  static constexpr size_t kStack = 64 << 10;
#endif
  static constexpr size_t kGuard = 4096;

  bool own_ = false;
  char* stack_ = nullptr;
  size_t size_ = 0;
#ifdef __x86_64__
  void* pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
#ifdef SIMT_ASAN
  void* fake_stack_ = nullptr;
#endif
#ifdef SIMT_TSAN
  void* tsan_ = nullptr;
#endif
};

}  // namespace simt
