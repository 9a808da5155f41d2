#include "simt/counts.h"

#include <algorithm>

namespace simt {
namespace {

constexpr uint64_t kSector = 32;
constexpr uint64_t kBanks = 32, kBankBytes = 4;

// Distinct units of `size` bytes that the accesses, sorted by address, touch.
int64_t touched(const std::vector<std::pair<uint64_t, uint64_t>>& sorted, uint64_t size) {
  int64_t count = 0;
  uint64_t next = 0;  // the first unit that is not counted
  for (const auto& [first, last] : sorted) {
    const uint64_t from = std::max(first / size, next), to = last / size + 1;
    if (to <= from) continue;
    count += int64_t(to - from);
    next = to;
  }
  return count;
}

// Rounds in which the 32 banks, 4 bytes wide, serve a warp: 8-byte accesses by halves, 16-byte ones by quarters of it.
// The accesses are in the order of their lanes.
void count_wavefronts(const Access* first, const Access* last, Counts& counts) {
  static std::vector<uint64_t> words;
  const uint32_t lanes =
      uint32_t(std::max<uint64_t>(1, 32 * kBankBytes / std::max<uint64_t>(kBankBytes, first->bytes)));
  for (const Access* part = first; part != last;) {
    const Access* end = part;
    while (end != last && end->lane() / lanes == part->lane() / lanes) ++end;
    words.clear();
    for (const Access* a = part; a != end; ++a) {
      for (uint64_t w = a->address / kBankBytes; w <= (a->address + a->bytes - 1) / kBankBytes; ++w) words.push_back(w);
    }
    if (!std::is_sorted(words.begin(), words.end())) std::sort(words.begin(), words.end());
    words.erase(std::unique(words.begin(), words.end()), words.end());
    int64_t in_bank[kBanks] = {};
    for (const uint64_t word : words) ++in_bank[word % kBanks];
    const int64_t wavefronts = *std::max_element(in_bank, in_bank + kBanks);
    counts.wavefronts += wavefronts;
    counts.ideal_wavefronts += 1;
    if (wavefronts > 1) counts.conflicts_at[first->place()] += wavefronts - 1;
    part = end;
  }
}

}  // namespace

void Counts::add(std::vector<Access>& accesses) {
  static std::vector<std::pair<uint64_t, uint64_t>> spans;  // first and last byte
  std::sort(accesses.begin(), accesses.end(), [](const Access& a, const Access& b) { return a.order < b.order; });
  for (size_t i = 0; i < accesses.size();) {
    size_t end = i + 1;
    while (end < accesses.size() && accesses[end].group() == accesses[i].group()) ++end;
    const Access *first = accesses.data() + i, *last = accesses.data() + end;
    if (first->shared) {
      count_wavefronts(first, last, *this);
    } else {
      spans.clear();
      for (const Access* a = first; a != last; ++a) spans.push_back({a->address, a->address + a->bytes - 1});
      if (!std::is_sorted(spans.begin(), spans.end())) std::sort(spans.begin(), spans.end());
      (first->store ? store_sectors : load_sectors) += touched(spans, kSector);
      ideal_sectors += (touched(spans, 1) + int64_t(kSector) - 1) / int64_t(kSector);
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
  text += "}, \"conflicts\": {";
  for (const auto& [place, wavefronts] : conflicts) {
    text += (text.back() == '{' ? "\"" : ", \"") + place + "\": " + std::to_string(wavefronts);
  }
  return text + "}}";
}

}  // namespace simt
