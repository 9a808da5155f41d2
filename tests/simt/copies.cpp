// Copies from global to shared memory that are under way (PTX ISA, "Data Movement and Conversion Instructions:
// Asynchronous copy": cp.async, cp.async.commit_group, cp.async.wait_group).
//
// A copy lands anywhere between its issue and the wait for its group: at once with threads in reverse, at the wait with
// threads in order, and at random somewhere between. Until the wait nobody may touch the bytes, the copying thread
// included, and until the next barrier nobody but that thread; both are noticed whatever the schedule, if the access is
// made after the issue. That nobody still reads what was there before is for ThreadSanitizer, to which every thread has
// a second one at its side, the copier: what it writes comes after the issue and before the wait, and has no other
// order.
#include "simt/state.h"

#ifdef SIMT_TSAN
extern "C" {  // what instrumented code calls
void __tsan_func_entry(void* from);
void __tsan_func_exit();
void __tsan_write_range(void* address, unsigned long bytes);
}
#endif

namespace simt {
namespace {

void land(Copy& copy) {
  if (copy.landed) return;
  copy.landed = true;
  memcpy(copy.to, copy.value, sizeof copy.value);
}

#ifdef SIMT_TSAN
// Runs act() as the copier of this thread. from: where the report is to say that it was.
template <class Act>
void as_copier(Copies& copies, const void* from, Act act) {
  void* const self = __tsan_get_current_fiber();
  if (!copies.copier) copies.copier = __tsan_create_fiber(0);
  __tsan_switch_to_fiber(copies.copier, 1);
  __tsan_func_entry(const_cast<void*>(from));
  act();
  __tsan_func_exit();
  __tsan_switch_to_fiber(self, 1);
}
#endif

}  // namespace

Copies::~Copies() {
#ifdef SIMT_TSAN
  if (copier) __tsan_destroy_fiber(copier);
#endif
}

void begin_copies(Thread& thread) {
  thread.copies.count = 0;
  thread.copies.groups = thread.copies.waited = 0;
}

void end_copies(Thread& thread) {
  const Copies& copies = thread.copies;
  if (copies.count == 0) return;
  const Unit& unit = unit_at(copies.list[0].to);
  fail(unit.here, "the thread has returned with %d copies under way that it has not waited for", copies.count);
}

void land_some(Thread& thread) {
  Copies& copies = thread.copies;
  if (copies.count == 0 || state.schedule != Schedule::random) return;
  for (int i = 0; i < copies.count; ++i) {
    if (next_random() % 4 == 0) land(copies.list[i]);
  }
}

void copy_async(const SharedArray& array, int i, size_t element, const void* value, Here here) {
  Thread& thread = me();
  Copies& copies = thread.copies;
  if (copies.count == kCopiesLimit) fail(here, "more than %d copies of one thread are under way", kCopiesLimit);
  auto* const to = static_cast<unsigned char*>(shared_access(array, i, element, 16, Shared::copy, here));
  unit_at(to) = {here, running.thread, true, 0, 0};
  Copy& copy = copies.list[copies.count++];
  copy.to = to;
  memcpy(copy.value, value, sizeof copy.value);
  copy.group = copies.groups;
  copy.landed = false;
#ifdef SIMT_TSAN
  release(&copies.issued);
  as_copier(copies, __builtin_return_address(0), [&] {
    acquire(&copies.issued);
    __tsan_write_range(to, 16);
  });
#endif
  if (state.schedule == Schedule::reverse) land(copy);
}

void copy_async_commit(Here here) {
  Copies& copies = me().copies;
  if (copies.groups - copies.waited == kGroupsLimit) {
    fail(here, "more than %d groups of copies of one thread are under way", kGroupsLimit);
  }
#ifdef SIMT_TSAN
  as_copier(copies, __builtin_return_address(0), [&] { release(&copies.landed[copies.groups % kGroupsLimit]); });
#endif
  ++copies.groups;
}

void copy_async_wait(int newest, Here) {
  Thread& thread = me();
  Copies& copies = thread.copies;
  if (int(copies.groups - copies.waited) <= newest) return;
  for (; int(copies.groups - copies.waited) > newest; ++copies.waited) {
    acquire(&copies.landed[copies.waited % kGroupsLimit]);
  }
  int done = 0;
  for (; done < copies.count && int(copies.list[done].group - copies.waited) < 0; ++done) {
    land(copies.list[done]);
    Unit& unit = unit_at(copies.list[done].to);
    unit.under_way = false;
    unit.barriers = thread.barriers;
    unit.warp_barriers = thread.warp_barriers;
  }
  copies.count -= done;
  for (int i = 0; i < copies.count; ++i) copies.list[i] = copies.list[done + i];
}

bool check_copied(const Unit& unit, const SharedArray& array, int i, bool store, Here here) {
  const char* const what = store ? "written" : "read";
  if (unit.under_way) {
    fail(here, "%s[%d] in shared memory is %s while a copy to it is under way: thread %d has not waited for that of %s",
         array.name, i, what, unit.thread, text_of(unit.here).c_str());
  }
  const Thread& thread = me();
  if (thread.barriers > unit.barriers) return true;
  const bool same_warp = running.thread / kWarp == unit.thread / kWarp;
  if (running.thread == unit.thread || (same_warp && thread.warp_barriers > unit.warp_barriers)) return false;
  fail(here, "%s[%d] in shared memory is %s, but there was no barrier since thread %d has waited for its copy of %s",
       array.name, i, what, unit.thread, text_of(unit.here).c_str());
}

}  // namespace simt
