// A call of linear, for each way of multiplying rows with panels.

#pragma once

#include <cstdint>

#include "abi.h"
#include "simd.h"
#include "tiles.h"
#include "weights.h"

namespace {

// What becomes of outputs half of which are gates: ``op`` of these times the others.
struct Gate {
  int32_t op;
  bool is_first;  // half of the weights that makes gates
};

struct Gemm {
  const Weight& w;
  const int32_t* x;         // prepared rows
  int64_t stride;           // their lanes, from one to the next
  const Int8Group* groups;  // of I8; of four bits each is an Int4Group
  void* y;
  Type y_type;
  const Gate* gate = nullptr;  // null: none; else F32, without bias, and a row of y has half the outputs
};

// The memory that write_outputs will write: so it has not to be waited for then.
inline void prefetch_outputs(const Gemm& gemm, int64_t p, int64_t m, int64_t rows) {
  const int64_t bytes = gemm.y_type == F32 ? 4 : 2;
  for (int64_t r = 0; r < rows; r++) {
    const char* y = static_cast<const char*>(gemm.y) + ((m + r) * gemm.w.n + p * PANEL) * bytes;
    for (int64_t i = 0; i < PANEL * bytes; i += 64) __builtin_prefetch(y + i, 1, TO_L2);
  }
}

// The outputs of panel p for the rows from m on; ``sum``(row, half): the products of 16 of them.
template <class F>
inline void write_outputs(const Gemm& gemm, int64_t p, int64_t m, int64_t rows, const F& sum) {
  const Weight& w = gemm.w;
  for (int half = 0; half < 2; half++) {
    const int64_t column = p * PANEL + half * 16;
    if (column >= w.n) break;
    const mask16 mask = first_lanes(w.n - column);
    const f32x16 bias = w.bias ? load(w.bias + column, mask) : zero();
    for (int64_t r = 0; r < rows; r++) {
      const f32x16 y = w.bias ? add(sum(r, half), bias) : sum(r, half);
      store(gemm.y, gemm.y_type, (m + r) * w.n + column, mask, y);
    }
  }
}

}  // namespace
