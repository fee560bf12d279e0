// Operations along the last dimension: sums, softmax, the selection of experts, small products.
//
// Where an operand is longer or shorter than the line that is counted, its elements lie together and
// its last stride is 0.

#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "abi.h"
#include "elementwise.h"
#include "operand.h"
#include "scratch.h"
#include "simd.h"
#include "vector_math.h"

namespace {

// inputs: a condition, what to take where it holds, what to take elsewhere.
void where(const Step& s, int64_t index) {
  const int64_t to = line_offset(s, s.out, index);
  for (int64_t i = 0; i < s.sizes[3]; i += 16) {
    const mask16 mask = first_lanes(s.sizes[3] - i);
    auto operand = [&](int which) {
      const Operand& o = s.inputs[which];
      return load_elements(o, line_offset(s, o, index) + i * o.strides[3], o.strides[3], mask);
    };
    const f32x16 chosen = select(equal(operand(0), zero()), operand(2), operand(1));
    store_elements(s.out, to + i * s.out.strides[3], s.out.strides[3], mask, chosen);
  }
}

void sum(const Step& s, int64_t index) {
  const float total = sum_line(s, s.inputs[0], line_offset(s, s.inputs[0], index), 0, false);
  store_elements(s.out, line_offset(s, s.out, index), 1, 1, broadcast(total));
}

f32x16 largest_of_line(const Step& s, const Operand& o, int64_t offset) {
  f32x16 all = broadcast(-std::numeric_limits<float>::infinity());
  for (int64_t i = 0; i < s.sizes[3]; i += 16) {
    const mask16 mask = first_lanes(s.sizes[3] - i);
    const f32x16 v = load_elements(o, offset + i * o.strides[3], o.strides[3], mask);
    all = select(mask, larger(all, v), all);
  }
  alignas(64) float values[16];
  store_aligned(values, all);
  float largest = values[0];
  for (float value : values)
    if (!(value <= largest)) largest = value;  // NaN stays
  return broadcast(largest);
}

void largest(const Step& s, int64_t index) {
  const f32x16 all = largest_of_line(s, s.inputs[0], line_offset(s, s.inputs[0], index));
  store_elements(s.out, line_offset(s, s.out, index), 1, 1, all);
}

void softmax(const Step& s, int64_t index) {
  const Operand& x = s.inputs[0];
  const int64_t from = line_offset(s, x, index), to = line_offset(s, s.out, index);
  const int64_t step = s.out.strides[3];
  const f32x16 peak = largest_of_line(s, x, from);
  f32x16 total = zero();
  for (int64_t i = 0; i < s.sizes[3]; i += 16) {
    const mask16 mask = first_lanes(s.sizes[3] - i);
    const f32x16 v = load_elements(x, from + i * x.strides[3], x.strides[3], mask);
    const f32x16 e = masked(mask, exp(sub(v, peak)));
    total = add(total, e);
    store_elements(s.out, to + i * step, step, mask, e);
  }
  const f32x16 sums = broadcast(reduce_add(total));
  for (int64_t i = 0; i < s.sizes[3]; i += 16) {
    const mask16 mask = first_lanes(s.sizes[3] - i);
    const f32x16 e = load_elements(s.out, to + i * step, step, mask);
    store_elements(s.out, to + i * step, step, mask, div(e, sums));
  }
}

// inputs: x, a dense matrix (sizes[3], ``scalar``), perhaps a bias: a row of x times all its rows.
void matmul(const Step& s, int64_t index) {
  const Operand& x = s.inputs[0];
  const int64_t k = static_cast<int64_t>(s.scalar), n = s.sizes[3];
  const int64_t from = line_offset(s, x, index), to = line_offset(s, s.out, index);
  const float* matrix = reinterpret_cast<const float*>(s.inputs[1].data);
  constexpr int64_t COLUMNS = 4;
  for (int64_t j = 0; j < n; j += COLUMNS) {
    const int64_t columns = std::min(COLUMNS, n - j);
    f32x16 sums[COLUMNS] = {};
    for (int64_t i = 0; i < k; i += 16) {
      const mask16 mask = first_lanes(k - i);
      const f32x16 v = load_elements(x, from + i, 1, mask);
      for (int64_t c = 0; c < columns; c++)
        sums[c] = fmadd(v, load(matrix + (j + c) * k + i, mask), sums[c]);
    }
    for (int64_t c = 0; c < columns; c++) {
      float result = reduce_add(sums[c]);
      if (s.operands > 2) result += element_at(s.inputs[2], j + c);
      store_elements(s.out, to + (j + c) * s.out.strides[3], 1, 1, broadcast(result));
    }
  }
}

// The indices of the ``scalar`` largest, the largest first, of equal ones the first.
void top_k(const Step& s, int64_t index) {
  static thread_local Scratch scratch;
  const Operand& x = s.inputs[0];
  const int64_t n = s.sizes[3], from = line_offset(s, x, index);
  float* values = scratch.get<float>(n);
  for (int64_t i = 0; i < n; i++) {
    values[i] = element_at(x, from + i * x.strides[3]);
    if (std::isnan(values[i])) values[i] = std::numeric_limits<float>::infinity();
  }
  auto* out = reinterpret_cast<int64_t*>(address_of(s.out, line_offset(s, s.out, index)));
  for (int64_t rank = 0, last = -1; rank < static_cast<int64_t>(s.scalar); rank++) {
    int64_t best = -1;
    for (int64_t i = 0; i < n; i++) {
      const bool is_left = last < 0 || values[i] < values[last] ||
                           (values[i] == values[last] && i > last);
      if (is_left && (best < 0 || values[i] > values[best])) best = i;
    }
    out[rank] = last = best;
  }
}

// inputs: x with ``scalar`` elements in a line, indices into it. NaN for one that is out of range.
void take(const Step& s, int64_t index) {
  const Operand &x = s.inputs[0], &indices = s.inputs[1];
  const int64_t from = line_offset(s, x, index), at = line_offset(s, indices, index);
  for (int64_t i = 0; i < s.sizes[3]; i++) {
    const char* place = address_of(indices, at + i * indices.strides[3]);
    const int64_t of = *reinterpret_cast<const int64_t*>(place);
    const bool is_in_range = of >= 0 && of < static_cast<int64_t>(s.scalar);
    store_elements(s.out, line_offset(s, s.out, index) + i * s.out.strides[3], 1, 1,
                   broadcast(is_in_range ? element_at(x, from + of)
                                         : std::numeric_limits<float>::quiet_NaN()));
  }
}

// inputs: indices into a line of ``scalar`` elements that is there already, what to put there.
void put(const Step& s, int64_t index) {
  const Operand &indices = s.inputs[0], &x = s.inputs[1];
  const int64_t from = line_offset(s, x, index), at = line_offset(s, indices, index);
  for (int64_t i = 0; i < s.sizes[3]; i++) {
    const char* place = address_of(indices, at + i * indices.strides[3]);
    const int64_t to = *reinterpret_cast<const int64_t*>(place);
    if (to < 0 || to >= static_cast<int64_t>(s.scalar)) continue;
    store_elements(s.out, line_offset(s, s.out, index) + to, 1, 1,
                   broadcast(element_at(x, from + i * x.strides[3])));
  }
}

}  // namespace
