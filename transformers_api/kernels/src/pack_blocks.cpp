// Packing of weights that are quantised already: from ggml's blocks to the layout of weights.h.
//
// Codes go over as they are where the layout has room for them; scales and minima become half
// precision, which most kinds have anyway. All others are quantised anew from their values.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <mutex>
#include <vector>

#include "abi.h"
#include "ggml_blocks.h"
#include "pack.h"
#include "simd.h"
#include "thread_pool.h"
#include "weights.h"

namespace {

constexpr int64_t PAIR = 2;  // groups whose lanes are one vector

float stored_half(float x, uint16_t& at) {
  alignas(32) uint16_t halves[16];
  store_half(halves, broadcast(x));
  at = halves[0];
  return half_to_float(at);
}

// Eight lanes of a row's group of I8, and its scale.
void int8_group(const Weight& w, const BlockKind& kind, const uint8_t* source, int64_t row,
                int64_t g, uint8_t* codes, double* sums) {
  float values[GROUP];
  if (kind.is_signed) {
    BlockCodes own;
    kind.codes(kind.block_of(source, g), kind.place_of(g), own);
    const float scale = stored_half(own.scale, int8_scale_at(w, row, g));
    for (int i = 0; i < GROUP; i++) codes[i] = static_cast<uint8_t>(own.codes[i]) ^ 0x80;
    if (scale == own.scale) return;
    values_of(own, values);
  } else {
    kind.values_at(source, g, values);
    quantize_int8_group(w, values, row, g, reinterpret_cast<int8_t*>(codes));
  }
  const float scale = half_to_float(int8_scale_at(w, row, g));
  float error = 0;
  for (int i = 0; i < GROUP; i++) {
    const float difference = values[i] - scale * static_cast<int8_t>(codes[i] ^ 0x80);
    error += difference * difference;
  }
  sums[0] += error;
}

// The same of I4, for kinds whose codes are four bits.
void int4_group(const Weight& w, const BlockKind& kind, const uint8_t* source, int64_t row,
                int64_t g, uint8_t* codes, double* sums) {
  BlockCodes own;
  kind.codes(kind.block_of(source, g), kind.place_of(g), own);
  if (kind.is_signed) add_to(own.codes, 8), own.minimum = -8 * own.scale;
  const int64_t shift = row % PANEL < 16 ? 0 : 4;
  for (int i = 0; i < GROUP; i++) codes[i] = static_cast<uint8_t>(own.codes[i] << shift);
  auto* params = reinterpret_cast<uint16_t*>(int4_group_at(w, row, g) + INT4_CODE_BYTES);
  const float scale = stored_half(own.scale, params[row % PANEL]);
  const float minimum = stored_half(own.minimum, params[PANEL + row % PANEL]);
  if (scale == own.scale && minimum == own.minimum) return;
  float error = 0;
  for (int i = 0; i < GROUP; i++) {
    const float code = static_cast<float>(own.codes[i] & 15);
    const float difference = code * (scale - own.scale) + (minimum - own.minimum);
    error += difference * difference;
  }
  sums[0] += error;
}

// Sixteen rows (fewer at the edges of a matrix), a pair of groups after the other: ``fill`` makes
// the codes of a row's group, which are transposed into the panel.
template <class F>
void pack_lanes_of_groups(const Weight& w, int64_t row, int64_t count, const F& fill) {
  uint8_t* panel = panel_at(w, row);
  const int64_t half = row % PANEL / 16, first = row % 16;
  for (int64_t g = 0; g < num_groups(w); g += PAIR) {
    alignas(64) uint8_t codes[16][PAIR * GROUP] = {};
    const int64_t pair = std::min(PAIR, num_groups(w) - g);
    for (int64_t r = 0; r < count; r++)
      for (int64_t i = 0; i < pair; i++) fill(row + r, g + i, codes[first + r] + i * GROUP);
    i32x16 v[16];
    for (int r = 0; r < 16; r++) v[r] = load_i32(reinterpret_cast<int32_t*>(codes[r]), 0xffff);
    transpose(v);
    for (int64_t s = 0; s < pair * GROUP_STEPS; s++) {
      alignas(64) int32_t lanes[16];
      store_i32(lanes, v[s]);
      const int64_t group = g + s / GROUP_STEPS, step = s % GROUP_STEPS;
      auto* line = reinterpret_cast<int32_t*>(
          w.type == I4 ? panel + group * INT4_GROUP_BYTES + step * 64
                       : panel + group * INT8_GROUP_BYTES + step * 128 + half * 64);
      for (int64_t lane = first; lane < first + count; lane++) line[lane] |= lanes[lane];
    }
  }
}

// Where I4 has no room for the codes: the search of quantize_int4.h.
void search_int4_row(const Weight& w, const BlockKind& kind, const uint8_t* source, int64_t row,
                     double* sums) {
  std::vector<float> values(w.k);
  for (int64_t g = 0; g < num_groups(w); g++) kind.values_at(source, g, &values[g * GROUP]);
  double own[2] = {};
  for (int64_t g = 0; g < num_groups(w); g += 16) pack_int4_groups(w, values.data(), row, g, own);
  sums[0] += own[0];
}

void add_squares(const Weight& w, const BlockKind& kind, const uint8_t* source, double* sums) {
  float squares = 0, values[GROUP];
  for (int64_t g = 0; g < num_groups(w); g++) {
    kind.values_at(source, g, values);
    float own = 0;
    for (int i = 0; i < GROUP; i++) own += values[i] * values[i];
    squares += own;
  }
  sums[1] += squares;
}

// Up to sixteen rows, which are half a panel at most.
template <class Source>
void pack_some(const Weight& w, const BlockKind& kind, int64_t row, int64_t count,
               const Source& source, double* sums) {
  if (w.type == I8) {
    pack_lanes_of_groups(w, row, count, [&](int64_t r, int64_t g, uint8_t* codes) {
      int8_group(w, kind, source(r), r, g, codes, sums + (r - row) * 2);
    });
  } else if (kind.fits_four_bits) {
    pack_lanes_of_groups(w, row, count, [&](int64_t r, int64_t g, uint8_t* codes) {
      int4_group(w, kind, source(r), r, g, codes, sums + (r - row) * 2);
    });
  } else {
    for (int64_t r = row; r < row + count; r++)
      search_int4_row(w, kind, source(r), r, sums + (r - row) * 2);
  }
  const bool is_rounded = kind.weights != GROUP;  // its scales need more than half precision
  for (int64_t r = row; r < row + count; r++)
    if (is_rounded || sums[(r - row) * 2]) add_squares(w, kind, source(r), sums + (r - row) * 2);
}

}  // namespace

extern "C" {

int64_t block_row_bytes(int32_t number, int64_t k) {
  const BlockKind* kind = block_kind_of(number);
  return !kind || k % kind->weights ? 0 : k / kind->weights * kind->bytes;
}

void pack_blocks(const Weight* w, const void* blocks, int32_t number, const int64_t* order,
                 int64_t row, int64_t count, double* sums) {
  std::lock_guard<std::mutex> lock(pool_mutex);
  const BlockKind& kind = *block_kind_of(number);
  const int64_t stride = block_row_bytes(number, w->k);
  const auto source = [&](int64_t r) {
    const int64_t index = order ? order[r - row] : r - row;
    return static_cast<const uint8_t*>(blocks) + index * stride;
  };
  for_rows_by_panel(row, count, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin, next; r < end; r = next) {
      next = std::min(end, (r / 16 + 1) * 16);
      pack_some(*w, kind, r, next - r, source, sums + (r - row) * 2);
    }
  });
}

void unpack_blocks(const void* blocks, int32_t number, int64_t k, const int64_t* rows,
                   int64_t count, float* out) {
  std::lock_guard<std::mutex> lock(pool_mutex);
  const BlockKind& kind = *block_kind_of(number);
  const int64_t stride = block_row_bytes(number, k);
  pool->run(count, [&](int64_t b, int64_t e) {
    for (int64_t r = b; r < e; r++) {
      const uint8_t* source = static_cast<const uint8_t*>(blocks) + rows[r] * stride;
      for (int64_t g = 0; g < k / GROUP; g++) kind.values_at(source, g, out + r * k + g * GROUP);
    }
  });
}

}  // extern "C"
