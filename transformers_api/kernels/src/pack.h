// What packing from dense matrices and from blocks shares.

#pragma once

#include <algorithm>
#include <cstring>

#include "simd.h"
#include "thread_pool.h"
#include "weights.h"

namespace {

// Symmetric quantisation to -127..127. The codes are computed with the scale as it is stored, so
// rounding it costs no accuracy; a tiny one is rounded up, where half precision has few digits.
void quantize_int8_group(const Weight& w, const float* x, int64_t row, int64_t g, int8_t* codes) {
  const f32x16 v[] = {load(x), load(x + 16)};
  const uint32_t bits = reduce_max_u32(max_u32(as_i32(abs(v[0])), as_i32(abs(v[1]))));
  float peak;
  std::memcpy(&peak, &bits, 4);
  alignas(32) uint16_t stored[16];
  store_half(stored, broadcast(peak / 127));
  const bool falls_short = half_to_float(stored[0]) * 127.5f < peak;
  int8_scale_at(w, row, g) = stored[0] += falls_short;
  const float scale = half_to_float(stored[0]);
  const f32x16 largest = broadcast(scale > 0 ? 127 : 0), divisor = broadcast(scale > 0 ? scale : 1);
  for (int j = 0; j < 2; j++) {
    const f32x16 value = min(max(div(v[j], divisor), sub(zero(), largest)), largest);
    store_i8(reinterpret_cast<int32_t*>(codes) + j * 4, to_i32(value));
  }
  for (int i = 0; i < GROUP; i++) codes[i] = static_cast<int8_t>(codes[i] ^ 0x80);
}

// f(begin, end) for the rows of each panel that ``count`` rows from ``row`` on touch. Rows of one
// panel share cache lines, and with I4 bytes, so one thread packs them.
template <class F>
void for_rows_by_panel(int64_t row, int64_t count, const F& f) {
  pool->run((row + count - 1) / PANEL - row / PANEL + 1, [&](int64_t b, int64_t e) {
    f(std::max(row, (row / PANEL + b) * PANEL), std::min(row + count, (row / PANEL + e) * PANEL));
  });
}

}  // namespace
