// What the host asks for beside launches, and what tests ask of the executor.
#include "simt/state.h"

namespace simt {

Residency residency(int per_multiprocessor) {
  const int64_t own = state.multiprocessor_bytes / per_multiprocessor - int64_t(kSharedLimit);
  return {int64_t(state.multiprocessors) * per_multiprocessor, own > 0 ? own / 16 * 16 : 0};
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
