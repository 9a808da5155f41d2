// Global and shared memory: what is checked at an access, and what is taken down when counting.
#include "simt/state.h"

namespace simt {
namespace {

// What is known of a byte of shared memory.
enum Mark : unsigned char { kUnwritten, kWritten, kCopied };

// Named arrays first, then dynamic memory.
size_t shared_limit() { return kSharedLimit + (state.dynamic_bytes + 15) / 16 * 16; }

void clear_shared(Block& block, size_t at, size_t bytes) {
  unsigned char *const values = block.shared + at, *const marks = values + shared_limit();
  for (size_t i = 0; i < bytes; ++i) values[i] = 0xff;  // not a number, for whoever gets past the check
  for (size_t i = 0; i < bytes; ++i) marks[i] = kUnwritten;
}

bool all_written(const unsigned char* marks, size_t bytes) {
  const auto are = [marks](auto expected) {
    auto found = expected;
    memcpy(&found, marks, sizeof found);
    return found == expected;
  };
  switch (bytes) {
    case 2:
      return are(uint16_t{0x0101});
    case 4:
      return are(uint32_t{0x01010101});
    case 8:
      return are(uint64_t{0x0101010101010101});
    case 16:
      return are(static_cast<unsigned __int128>(0x0101010101010101) << 64 | 0x0101010101010101);
    default:
      for (size_t k = 0; k < bytes; ++k) {
        if (marks[k] != kWritten) return false;
      }
      return true;
  }
}

// The slow way through an access of bytes that are not all plainly written.
void check_marks(const SharedArray& array, int i, size_t at, size_t bytes, bool store, Here here) {
  for (size_t k = at; k < at + bytes; ++k) {
    if (array.marks[k] == kCopied) {
      if (check_copied(unit_at(array.data + k), array, i, store, here)) {
        unsigned char* const first = array.marks + k / 16 * 16;  // arrays begin on a 16-byte boundary
        for (int b = 0; b < 16; ++b) {
          if (first[b] == kCopied) first[b] = kWritten;
        }
      }
    } else if (array.marks[k] == kUnwritten && !store) {
      fail(here, "%s[%d] in shared memory is read and was never written", array.name, i);
    }
  }
}

}  // namespace

// Fresh for each block under ThreadSanitizer, to which memory used again by the next would be a race between them.
void provide_shared_memory(Block& block) {
  const size_t limit = shared_limit();
#ifdef SIMT_TSAN
  const bool fresh = true;
#else
  const bool fresh = state.memory.empty() || state.cooperative;
#endif
  if (fresh) {
    const size_t bytes = 2 * limit + limit / 16 * sizeof(Unit) + sizeof(BlockOrder) + 16;
    state.memory.push_back(std::unique_ptr<unsigned char[]>(new unsigned char[bytes]));
  }
  block.shared = state.memory.back().get();
  block.shared += (16 - reinterpret_cast<uintptr_t>(block.shared) % 16) % 16;
  block.shared_order = block.shared + 2 * limit + limit / 16 * sizeof(Unit);
  block.array_count = 0;
  block.shared_bytes = 0;
  clear_shared(block, kSharedLimit, state.dynamic_bytes);
  release(&launch_order.started);
}

Unit& unit_at(const unsigned char* shared) {
  unsigned char* const first = state.block->shared;
  return reinterpret_cast<Unit*>(first + 2 * shared_limit())[(shared - first) / 16];
}

SharedArray shared_array(const char* name, size_t element_bytes, int count, const void* key, Here here) {
  Block& block = *state.block;
  for (int i = 0; i < block.array_count; ++i) {
    if (block.arrays[i].key == key) return block.arrays[i].shared;
  }
  const size_t at = block.shared_bytes, bytes = (element_bytes * size_t(count) + 15) / 16 * 16;
  block.shared_bytes += bytes;
  if (block.shared_bytes > kSharedLimit || block.array_count == kArraysLimit) {
    fail(here, "%s: the block needs %zu bytes of shared memory, more than %zu", name, block.shared_bytes, kSharedLimit);
  }
  clear_shared(block, at, bytes);
  const SharedArray array{name, block.shared + at, block.shared + shared_limit() + at, count};
  block.arrays[block.array_count++] = {key, array};
  return array;
}

SharedArray dynamic_array(size_t element_bytes) {
  unsigned char* const data = state.block->shared + kSharedLimit;
  return {"dynamic memory", data, data + shared_limit(), int(state.dynamic_bytes / element_bytes)};
}

void* shared_access(const SharedArray& array, int i, size_t element, size_t bytes, Shared kind, Here here) {
  if (i < 0 || i > array.count - int(bytes / element)) {
    fail(here, "%s[%d] in shared memory, which has %d elements", array.name, i, array.count);
  }
  const size_t at = size_t(i) * element;
  if (at % bytes != 0) {  // as far as the array goes, which begins on a boundary
    fail(here, "misaligned access of %zu bytes in shared memory: %s[%d]", bytes, array.name, i);
  }
  const bool store = kind != Shared::load;
  unsigned char* const marks = array.marks + at;
  if (!all_written(marks, bytes)) {
    check_marks(array, i, at, bytes, store, here);
    for (size_t k = 0; k < bytes && store; ++k) marks[k] = kWritten;
  }
  for (size_t k = 0; k < bytes && kind == Shared::copy; ++k) marks[k] = kCopied;
  if (running.counting) record(array.data + at, bytes, bytes, store, true, here);
  return array.data + at;
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
  record(p, bytes, bytes, kind == Global::store, false, here);
}

void record_no_load(size_t bytes, Here here) { record(nullptr, 0, bytes, false, false, here); }

void record(const void* p, size_t bytes, size_t width, bool store, bool shared, Here here) {
  const Place place{here.file, here.line, store * 2 + shared, width};
  const auto found = state.places.try_emplace(place, uint32_t(state.places.size())).first;
  auto& passes = state.block->passes[running.thread];
  if (passes.size() <= found->second) passes.resize(found->second + 1);
  const uint32_t pass = passes[found->second]++;
  if (bytes == 0) return;
  state.block->accesses.push_back({uint32_t(running.thread / kWarp), found->second, pass,
                                   uint32_t(running.thread % kWarp), uint32_t(bytes), reinterpret_cast<uint64_t>(p),
                                   store, shared});
}

}  // namespace simt
