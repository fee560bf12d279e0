// Changes of single rows within a pass, between two of its steps. See RowChange.

#pragma once

#include <chrono>
#include <cstring>

#include "abi.h"
#include "simd.h"

namespace {

f32x16 changed_lanes(const RowChange& c, int64_t row, int64_t i, mask16 mask) {
  if (c.op == MUL) {
    if (c.factor == 0) return zero();  // of what is no number, too
    return mul(load(c.rows, c.type, row * c.stride + i, mask), broadcast(c.factor));
  }
  const f32x16 vector = load(c.vector + row * c.vector_stride + i, mask);
  return c.op == ADD ? add(load(c.rows, c.type, row * c.stride + i, mask), vector) : vector;
}

double squared_length(const RowChange& c) {
  double sum = 0;
  for (int64_t row = 0; row < c.count; row++) {
    f32x16 squares = zero();
    for (int64_t i = 0; i < c.width; i += 16) {
      const mask16 mask = first_lanes(c.width - i);
      const f32x16 x = masked(mask, changed_lanes(c, row, i, mask));
      squares = fmadd(x, x, squares);
    }
    sum += reduce_add(squares);
  }
  return sum;
}

void take_rows(const RowChange& c) {
  const int64_t size = c.type == F32 ? 4 : 2;
  for (int64_t row = 0; row < c.count; row++) {
    const int64_t token = c.tokens ? c.tokens[row] : row;
    std::memcpy(c.target + row * c.width * size, c.rows + token * c.stride * size, c.width * size);
  }
}

// In the calling thread: a step that answers reads a few rows.
void change_rows(const RowChange& c) {
  if (c.op == TAKE) return take_rows(c);
  if (c.state->failed) return;
  const auto began = std::chrono::steady_clock::now();
  if (squared_length(c) <= static_cast<double>(c.largest) * c.largest) {
    for (int64_t row = 0; row < c.count; row++)
      for (int64_t i = 0; i < c.width; i += 16) {
        const mask16 mask = first_lanes(c.width - i);
        store(c.rows, c.type, row * c.stride + i, mask, changed_lanes(c, row, i, mask));
      }
  } else {
    c.state->failed = c.number;
  }
  const std::chrono::nanoseconds spent = std::chrono::steady_clock::now() - began;
  c.state->nanoseconds += spent.count();
}

}  // namespace
