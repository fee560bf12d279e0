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

// Groups ``g`` of up to sixteen rows of a half panel, whose codes become lanes: one vector each.
struct RowGroups {
  alignas(64) uint8_t codes[16][PAIR * GROUP];
  BlockCodes own[16];
  alignas(64) float scales[16], minima[16];
};

// Write scales of ``count`` rows as half precision; the rows whose scale is another one then.
mask16 write_halves(const float* scales, int64_t count, uint16_t* at) {
  alignas(32) uint16_t halves[16];
  const f32x16 exact = load(scales);
  store_half(halves, exact);
  std::memcpy(at, halves, count * sizeof *halves);
  const mask16 same = equal(first_lanes(count), exact, round_to_half(exact));
  return first_lanes(count) & ~same;
}

// The sum of squares of a group, half by half: ``half(i)`` are its values from i on.
template <class F>
float squares_of(const F& half) {
  const f32x16 low = half(0), high = half(16);
  return reduce_add(add(mul(low, low), mul(high, high)));
}

// Squared errors of rows where scales were rounded: ``half(r, i)`` are differences from i on.
template <class F>
void add_errors(mask16 rounded, double* sums, const F& half) {
  for (int r = 0; r < 16; r++)
    if (rounded >> r & 1) sums[r * 2] += squares_of([&](int i) { return half(r, i); });
}

// A row's group of I8 whose codes are not whole numbers with a sign.
void quantize_group(const Weight& w, const BlockKind& kind, const uint8_t* source, int64_t row,
                    int64_t g, uint8_t* codes, double* sums) {
  float values[GROUP];
  kind.values_at(source, g, values);
  quantize_int8_group(w, values, row, g, reinterpret_cast<int8_t*>(codes));
  const f32x16 scale = broadcast(half_to_float(int8_scale_at(w, row, g)));
  int8_t signs[GROUP];
  for (int i = 0; i < GROUP; i++) signs[i] = static_cast<int8_t>(codes[i] ^ 0x80);
  sums[0] += squares_of([&](int i) { return sub(load(values + i), mul(scale, load_i8(signs + i))); });
}

// The same of rows whose codes are.
template <class Source>
void int8_groups(const Weight& w, const BlockKind& kind, const Source& source, int64_t row,
                 int64_t count, int64_t g, RowGroups& rows, int64_t at, double* sums) {
  for (int64_t r = 0; r < count; r++) {
    BlockCodes& own = rows.own[r];
    kind.codes(kind.block_of(source(row + r), g), kind.place_of(g), own);
    rows.scales[r] = own.scale;
    uint8_t* codes = &rows.codes[row % 16 + r][at];
    for (int i = 0; i < GROUP; i++) codes[i] = static_cast<uint8_t>(own.codes[i]) ^ 0x80;
  }
  uint16_t* stored = &int8_scale_at(w, row, g);
  add_errors(write_halves(rows.scales, count, stored), sums, [&](int r, int i) {
    const float lost = rows.own[r].scale - half_to_float(stored[r]);
    return mul(broadcast(lost), load_i8(rows.own[r].codes + i));
  });
}

// The same of I4 and I4C, for kinds whose codes are four bits.
template <class Source>
void int4_groups(const Weight& w, const BlockKind& kind, const Source& source, int64_t row,
                 int64_t count, int64_t g, RowGroups& rows, int64_t at, double* sums) {
  const int shift = row % PANEL < 16 ? 0 : 4;
  for (int64_t r = 0; r < count; r++) {
    BlockCodes& own = rows.own[r];
    kind.codes(kind.block_of(source(row + r), g), kind.place_of(g), own);
    if (kind.is_signed) add_to(own.codes, 8), own.minimum = INT4_CENTRE * own.scale;
    rows.scales[r] = own.scale, rows.minima[r] = own.minimum;
    uint8_t* codes = &rows.codes[row % 16 + r][at];
    for (int i = 0; i < GROUP; i++) codes[i] = static_cast<uint8_t>(own.codes[i] << shift);
  }
  auto* params = reinterpret_cast<uint16_t*>(int4_group_at(w, row, g) + INT4_CODE_BYTES);
  uint16_t *scales = params + row % PANEL, *minima = scales + PANEL;
  const mask16 rounded = write_halves(rows.scales, count, scales);
  if (w.type == I4C) {
    return add_errors(rounded, sums, [&](int r, int i) {
      const float scale = half_to_float(scales[r]) - rows.own[r].scale;
      return mul(add(load_i8(rows.own[r].codes + i), broadcast(INT4_CENTRE)), broadcast(scale));
    });
  }
  add_errors(rounded | write_halves(rows.minima, count, minima), sums, [&](int r, int i) {
    const float scale = half_to_float(scales[r]) - rows.own[r].scale;
    const f32x16 minimum = broadcast(half_to_float(minima[r]) - rows.own[r].minimum);
    return add(mul(load_i8(rows.own[r].codes + i), broadcast(scale)), minimum);
  });
}

// Up to sixteen rows (fewer at the edges of a matrix), a pair of groups after the other: ``fill``
// makes the codes of the rows' groups, which are transposed into the panel.
template <class F>
void pack_lanes_of_groups(const Weight& w, int64_t row, int64_t count, const F& fill) {
  uint8_t* panel = panel_at(w, row);
  const int64_t half = row % PANEL / 16, first = row % 16;
  const bool is_whole = count == 16;
  RowGroups rows = {};
  for (int64_t g = 0; g < num_groups(w); g += PAIR) {
    const int64_t pair = std::min(PAIR, num_groups(w) - g);
    for (int64_t i = 0; i < pair; i++) fill(g + i, rows, i * GROUP);
    i32x16 v[16];
    for (int r = 0; r < 16; r++) v[r] = load_i32(rows.codes[r]);
    transpose(v);
    for (int64_t s = 0; s < pair * GROUP_STEPS; s++) {
      const int64_t group = g + s / GROUP_STEPS, step = s % GROUP_STEPS;
      auto* line = reinterpret_cast<int32_t*>(
          is_int4(w) ? panel + group * int4_group_bytes(w.type == I4) + step * 64
                     : panel + group * INT8_GROUP_BYTES + step * 128 + half * 64);
      if (is_whole && w.type == I8) {
        store_i32(line, v[s]);
        continue;
      }
      alignas(64) int32_t lanes[16];
      store_i32(lanes, v[s]);
      if (is_whole) {
        for (int lane = 0; lane < 16; lane++) line[lane] |= lanes[lane];
      } else {
        for (int64_t lane = first; lane < first + count; lane++) line[lane] |= lanes[lane];
      }
    }
  }
}

// Where I4 has no room for the codes: the search of quantize_int4.h.
void search_int4_row(const Weight& w, const BlockKind& kind, const uint8_t* source, int64_t row,
                     double* sums) {
  std::vector<float> values(w.k);
  kind.row(source, num_groups(w), values.data());
  double own[2] = {};
  for (int64_t g = 0; g < num_groups(w); g += 16) pack_int4_groups(w, values.data(), row, g, own);
  sums[0] += own[0];
}

void add_squares(const Weight& w, const BlockKind& kind, const uint8_t* source, double* sums) {
  float squares = 0, values[GROUP];
  for (int64_t g = 0; g < num_groups(w); g++) {
    kind.values_at(source, g, values);
    squares += squares_of([&](int i) { return load(values + i); });
  }
  sums[1] += squares;
}

// Up to sixteen rows, which are half a panel at most.
template <class Source>
void pack_some(const Weight& w, const BlockKind& kind, int64_t row, int64_t count,
               const Source& source, double* sums) {
  if (w.type == I8 && !kind.is_signed) {
    pack_lanes_of_groups(w, row, count, [&](int64_t g, RowGroups& rows, int64_t at) {
      for (int64_t r = row; r < row + count; r++)
        quantize_group(w, kind, source(r), r, g, &rows.codes[r % 16][at], sums + (r - row) * 2);
    });
  } else if (w.type == I8) {
    pack_lanes_of_groups(w, row, count, [&](int64_t g, RowGroups& rows, int64_t at) {
      int8_groups(w, kind, source, row, count, g, rows, at, sums);
    });
  } else if (kind.fits_four_bits) {
    pack_lanes_of_groups(w, row, count, [&](int64_t g, RowGroups& rows, int64_t at) {
      int4_groups(w, kind, source, row, count, g, rows, at, sums);
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
      kind.row(source, k / GROUP, out + r * k);
    }
  });
}

}  // extern "C"
