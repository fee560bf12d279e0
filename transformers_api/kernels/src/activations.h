// Input rows in the form that the weights' tiles multiply: floats, pairs of bfloat16, or groups of
// codes of 8 bits.

#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "simd.h"
#include "tiles.h"
#include "weights.h"

namespace {

template <class T>
void convert_row(const Weight& w, const T* x, int32_t* lanes) {
  for (int64_t i = 0, n = num_steps(w); i < n * values_per_lane(w); i += 16) {
    const f32x16 v = load(x + i, first_lanes(w.k - i));
    if (w.type == F32) {
      store(reinterpret_cast<float*>(lanes + i), first_lanes(n - i), v);
    } else {
      store_pairs(lanes + i / 2, first_lanes(n - i / 2), v);
    }
  }
}

// Symmetric quantisation to -127..127 by the largest magnitude of each group. A group that holds inf
// or NaN gets the scale NaN.
template <class T>
void quantize_row(const Weight& w, const T* x, int32_t* lanes, Int8Group* groups) {
  for (int64_t g = 0; g < num_groups(w); g++) {
    f32x16 v[GROUP / 16];
    i32x16 largest = zero_i32();  // compared as bits: so inf and NaN are the largest
    for (int j = 0; j < GROUP / 16; j++) {
      const int64_t at = g * GROUP + j * 16;
      v[j] = load(x + at, first_lanes(w.k - at));
      largest = max_u32(largest, as_i32(abs(v[j])));
    }
    const uint32_t bits = reduce_max_u32(largest);
    float peak;
    std::memcpy(&peak, &bits, 4);
    const bool is_finite = bits < 0x7f800000;
    const f32x16 inverse = broadcast(is_finite && peak > 1e-30f ? 127 / peak : 0);
    i32x16 sum = zero_i32();
    for (int j = 0; j < GROUP / 16; j++) {
      const i32x16 codes = to_i32(mul(v[j], inverse));
      sum = add_i32(sum, codes);
      store_i8(lanes + g * GROUP_STEPS + j * 4, codes);
    }
    groups[g] = {is_finite ? peak / 127 : std::numeric_limits<float>::quiet_NaN(),
                 -128 * reduce_add_i32(sum)};
  }
}

// In place: both are of the same size.
void to_int4_groups(Int8Group* groups, int64_t count) {
  static_assert(sizeof(Int4Group) == sizeof(Int8Group));
  for (Int8Group* g = groups; g < groups + count; g++) {
    const Int4Group converted{g->scale, g->scale * static_cast<float>(g->offset / -128)};
    std::memcpy(g, &converted, sizeof converted);
  }
}

// ``lanes`` and ``groups``: those of this row.
template <class T>
void prepare_row(const Weight& w, const T* x, int32_t* lanes, Int8Group* groups) {
  if (is_grouped(w)) {
    quantize_row(w, x, lanes, groups);
    if (is_int4(w)) to_int4_groups(groups, num_groups(w));
  } else {
    convert_row(w, x, lanes);
  }
}

}  // namespace
