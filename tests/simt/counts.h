// Counts of one launch, as the hardware would serve its memory accesses: warp by warp.
//
// The n-th time a lane passes a place in the source, counted from the last barrier or warp operation, belongs together
// with the n-th time of the other lanes of its warp. That is what the GPU does wherever lanes do not diverge; where
// they do, accesses are joined that would be separate, so counts are never above the real ones by more than a tail.
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "simt/simt.h"

namespace simt {

// One lane's access.
struct Access {
  // What belongs together has all of it in common but the lane. meetings: barriers and warp operations before; pass:
  // the n-th time since then that this lane makes an access of this size at this place.
  uint64_t order, address;
  uint32_t bytes;
  bool store, shared;

  static constexpr int kPlaceBits = 16, kMeetingBits = 22, kPassBits = 16;
  static uint64_t order_of(uint64_t warp, uint64_t place, uint64_t meetings, uint64_t pass, uint64_t lane) {
    return (((warp << kPlaceBits | place) << kMeetingBits | meetings) << kPassBits | pass) << 5 | lane;
  }
  uint64_t group() const { return order >> 5; }
  uint32_t lane() const { return uint32_t(order & 31); }
  uint32_t place() const { return uint32_t(order >> (kMeetingBits + kPassBits + 5) & ((1u << kPlaceBits) - 1)); }
};

struct Counts {
  std::string kind, name;  // kind: "kernel", "memset" or "copy"
  int64_t blocks = 0, threads = 0;
  int64_t load_bytes = 0, store_bytes = 0;       // of global memory, summed over lanes
  int64_t load_sectors = 0, store_sectors = 0;   // of 32 bytes, summed over warp accesses
  int64_t ideal_sectors = 0;                     // if the distinct bytes of each warp access lay side by side
  int64_t lanes_of_width[5] = {};                // global accesses of 1, 2, 4, 8, 16 bytes
  int64_t wavefronts = 0, ideal_wavefronts = 0;  // of shared memory; more than ideal: bank conflicts
  int64_t barriers = 0, shared_bytes = 0;        // barriers: summed over threads; bytes: most of any block
  std::map<uint32_t, int64_t> conflicts_at;      // wavefronts above the ideal, by place
  std::map<std::string, int64_t> conflicts;      // the same by file and line

  // Takes in all accesses of one block.
  void add(std::vector<Access>& accesses);
  std::string json() const;
};

}  // namespace simt
