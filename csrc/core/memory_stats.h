// What _ops.so exports of its memory pool (memory_pool.h) for `_C` (csrc/module.cpp), which finds it by name.
#pragma once
#include <cstdint>

extern "C" {
struct deepops_memory_stats_result {
  int64_t live;    // bytes in results that exist
  int64_t kept;    // bytes kept for results to come
  int64_t mapped;  // how often the system was asked for memory
};
__attribute__((visibility("default"))) deepops_memory_stats_result deepops_memory_stats();
// Gives what is kept back to the system.
__attribute__((visibility("default"))) void deepops_empty_cache();
}
