// New keys or values into their rows of the KV cache, converted to its type.

#pragma once

#include "abi.h"
#include "kv_codes.h"
#include "simd.h"

namespace {

// One head of one position: ``c.size`` numbers.
void write_head(const CacheWrite& c, int64_t from, int64_t to) {
  if (c.target_type == I8) {
    int8_t* group = static_cast<int8_t*>(c.target) + to;
    for (int64_t j = 0; j < c.size; j += KV_GROUP, group += KV_GROUP_BYTES)
      quantize_kv_group(load(c.source, c.source_type, from + j, first_lanes(c.size - j)),
                        load(c.source, c.source_type, from + j + 16, first_lanes(c.size - j - 16)),
                        group);
    return;
  }
  for (int64_t j = 0; j < c.size; j += 16) {
    const mask16 mask = first_lanes(c.size - j);
    store(c.target, c.target_type, to + j, mask, load(c.source, c.source_type, from + j, mask));
  }
}

// Of the rows ``row``..``rows`` the queries ``query``..``queries``.
void write_positions(const CacheWrite& c, int64_t row, int64_t rows, int64_t query,
                     int64_t queries) {
  for (; row < rows; row++) {
    const int64_t cache_row = c.cache_rows ? c.cache_rows[row] : row;
    for (int64_t head = 0; head < c.heads; head++)
      for (int64_t t = query; t < queries; t++) {
        const int64_t from =
            row * c.source_strides[0] + head * c.source_strides[1] + t * c.source_strides[2];
        const int64_t to = cache_row * c.target_strides[0] + head * c.target_strides[1] +
                           ((c.starts ? c.starts[row] : 0) + t) * c.target_strides[2];
        write_head(c, from, to);
      }
  }
}

// The elements begin..end of a row of the cache, which are one head and one position.
void read_row(const CacheWrite& c, int64_t row, int64_t begin, int64_t end) {
  const int64_t from = (c.cache_rows ? c.cache_rows[row] : row) * c.source_strides[0];
  for (int64_t j = begin; j < end; j += 16) {
    const mask16 mask = first_lanes(end - j);
    const f32x16 v = load(c.source, c.source_type, from + j, mask);
    store(c.target, c.target_type, row * c.target_strides[0] + j, mask, v);
  }
}

}  // namespace
