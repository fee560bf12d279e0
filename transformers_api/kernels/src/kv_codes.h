// Keys and values as codes of 8 bits, for a cache of type I8: groups of KV_GROUP numbers, each of a
// scale (bfloat16: it has float32's range, and a code of the largest number stays below 127.5) and
// its codes; the last one is filled with zeros. Attention multiplies codes times scales, rounded to
// bfloat16. What a group says depends on its own numbers alone.

#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "abi.h"
#include "simd.h"

namespace {

constexpr int64_t KV_GROUP = 32, KV_GROUP_BYTES = 2 + KV_GROUP;

int64_t kv_code_bytes(int64_t size) { return (size + KV_GROUP - 1) / KV_GROUP * KV_GROUP_BYTES; }

uint16_t bf16_bits(float value) {
  uint16_t bits;
  store(&bits, first_lanes(1), broadcast(value));
  return bits;
}

// A group that holds inf or NaN gets the scale NaN.
void quantize_kv_group(f32x16 low, f32x16 high, int8_t* group) {
  // compared as bits: so inf and NaN are the largest
  const uint32_t bits = reduce_max_u32(max_u32(as_i32(abs(low)), as_i32(abs(high))));
  float peak;
  std::memcpy(&peak, &bits, 4);
  const bool is_finite = bits < 0x7f800000, is_zero = peak < 1e-30f;
  const uint16_t stored = !is_finite ? 0x7fc0 : is_zero ? 0 : bf16_bits(peak / 127);
  std::memcpy(group, &stored, 2);
  const f32x16 inverse = broadcast(is_finite && !is_zero ? 1 / bf16_to_float(stored) : 0);
  store_i8(group + 2, to_i32(mul(low, inverse)));
  store_i8(group + 2 + 16, to_i32(mul(high, inverse)));
}

// The codes 16 * ``half``.. of a group, times its scale; not rounded.
f32x16 kv_numbers(const int8_t* group, int64_t half) {
  uint16_t scale;
  std::memcpy(&scale, group, 2);
  return mul(load_i8(group + 2 + 16 * half), broadcast(bf16_to_float(scale)));
}

// Sixteen numbers of a row of keys or values from ``j`` on, a multiple of 16, as attention reads them.
f32x16 load_kv(const void* p, int32_t type, int64_t row, int64_t j, mask16 mask) {
  if (type != I8) return load(p, type, row + j, mask);
  const int8_t* group = static_cast<const int8_t*>(p) + row + j / KV_GROUP * KV_GROUP_BYTES;
  return masked(mask, round_to_bf16(kv_numbers(group, j / 16 % 2)));
}

}  // namespace
