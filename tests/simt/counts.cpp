#include "simt/counts.h"

#include <algorithm>
#include <tuple>

namespace simt {
namespace {

constexpr uint64_t kSector = 32;
constexpr uint64_t kBanks = 32, kBankBytes = 4;

// Distinct units of `size` bytes that the accesses touch.
int64_t touched(const Access* first, const Access* last, uint64_t size) {
  std::vector<uint64_t> units;
  for (const Access* a = first; a != last; ++a) {
    for (uint64_t unit = a->address / size; unit <= (a->address + a->bytes - 1) / size; ++unit) units.push_back(unit);
  }
  std::sort(units.begin(), units.end());
  return std::unique(units.begin(), units.end()) - units.begin();
}

// Rounds in which the 32 banks, 4 bytes wide, serve a warp: 8-byte accesses by halves, 16-byte ones by quarters of it.
// The accesses are in the order of their lanes.
void count_wavefronts(const Access* first, const Access* last, Counts& counts) {
  const uint32_t lanes =
      uint32_t(std::max<uint64_t>(1, 32 * kBankBytes / std::max<uint64_t>(kBankBytes, first->bytes)));
  for (const Access* part = first; part != last;) {
    const Access* end = part;
    while (end != last && end->lane / lanes == part->lane / lanes) ++end;
    std::vector<uint64_t> words;
    for (const Access* a = part; a != end; ++a) {
      for (uint64_t w = a->address / kBankBytes; w <= (a->address + a->bytes - 1) / kBankBytes; ++w) words.push_back(w);
    }
    std::sort(words.begin(), words.end());
    words.erase(std::unique(words.begin(), words.end()), words.end());
    int64_t in_bank[kBanks] = {};
    for (const uint64_t word : words) ++in_bank[word % kBanks];
    counts.wavefronts += *std::max_element(in_bank, in_bank + kBanks);
    counts.ideal_wavefronts += 1;
    part = end;
  }
}

}  // namespace

void Counts::add(std::vector<Access>& accesses) {
  const auto key = [](const Access& a) { return std::tie(a.warp, a.place, a.pass); };
  // stable: lanes stay in the order in which they ran
  std::stable_sort(accesses.begin(), accesses.end(), [&](const Access& a, const Access& b) { return key(a) < key(b); });
  for (size_t i = 0; i < accesses.size();) {
    size_t end = i + 1;
    while (end < accesses.size() && key(accesses[end]) == key(accesses[i])) ++end;
    const Access *first = accesses.data() + i, *last = accesses.data() + end;
    if (first->shared) {
      count_wavefronts(first, last, *this);
    } else {
      (first->store ? store_sectors : load_sectors) += touched(first, last, kSector);
      ideal_sectors += (touched(first, last, 1) + int64_t(kSector) - 1) / int64_t(kSector);
      for (const Access* a = first; a != last; ++a) {
        (a->store ? store_bytes : load_bytes) += a->bytes;
        ++lanes_of_width[__builtin_ctz(a->bytes)];
      }
    }
    i = end;
  }
}

std::string Counts::json() const {
  std::string text = "{\"kind\": \"" + kind + "\", \"name\": \"" + name + "\"";
  const auto put = [&](const char* field, int64_t value) {
    text += std::string(", \"") + field + "\": " + std::to_string(value);
  };
  put("blocks", blocks);
  put("threads", threads);
  put("load_bytes", load_bytes);
  put("store_bytes", store_bytes);
  put("load_sectors", load_sectors);
  put("store_sectors", store_sectors);
  put("ideal_sectors", ideal_sectors);
  put("wavefronts", wavefronts);
  put("ideal_wavefronts", ideal_wavefronts);
  put("barriers", barriers);
  put("shared_bytes", shared_bytes);
  text += ", \"lanes_of_width\": {";
  for (int i = 0; i < 5; ++i) {
    text += (i ? ", \"" : "\"") + std::to_string(1 << i) + "\": " + std::to_string(lanes_of_width[i]);
  }
  return text + "}}";
}

}  // namespace simt
