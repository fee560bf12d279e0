// The small operations of a forward pass: elementwise ones, norms, lookups. line_ops.h has others.

#pragma once

#include <cmath>
#include <limits>

#include "abi.h"
#include "operand.h"
#include "simd.h"
#include "vector_math.h"

namespace {

template <float (*F)(float)>
f32x16 map_lanes(f32x16 v) {
  alignas(64) float values[16];
  store_aligned(values, v);
  for (float& value : values) value = F(value);
  return load_aligned(values);
}

f32x16 power(f32x16 v, float exponent) {
  alignas(64) float values[16];
  store_aligned(values, v);
  for (float& value : values) value = std::pow(value, exponent);
  return load_aligned(values);
}

float softplus(float x) { return x > 20 ? x : std::log1p(std::exp(x)); }

f32x16 one_where(mask16 mask) { return masked(mask, broadcast(1)); }
mask16 equal(f32x16 a, f32x16 b) { return less_equal(a, b) & less_equal(b, a); }
f32x16 negative(f32x16 a) { return sub(broadcast(-0.f), a); }
f32x16 larger(f32x16 a, f32x16 b) {  // NaN where one of them is
  return select(less(a, b), b, select(greater_equal(a, b), a, add(a, b)));
}

// NaN where squares overflowed: a norm that makes zeros of too large numbers would hide them.
f32x16 inverse_sqrt(f32x16 a) { return fmadd(a, zero(), div(broadcast(1), sqrt(a))); }

inline f32x16 apply(int32_t op, f32x16 a, f32x16 b, float scalar) {
  switch (op) {
    case ADD: return fmadd(b, broadcast(scalar), a);
    case SUB: return fnmadd(b, broadcast(scalar), a);
    case MUL: return mul(a, b);
    case DIV: return div(a, b);
    case NEG: return negative(a);
    case CUBE: return mul(mul(a, a), a);
    case RSQRT: return inverse_sqrt(a);
    case SQRT: return sqrt(a);
    case EXP: return exp(a);
    case TANH: return tanh(a);
    case SILU: return mul(a, sigmoid(a));
    case SIGMOID: return sigmoid(a);
    case GELU: return gelu(a);
    case GELU_TANH: return gelu_tanh(a);
    case RELU: return max(zero(), a);
    case COS: return map_lanes<std::cos>(a);
    case SIN: return map_lanes<std::sin>(a);
    case ABS: return abs(a);
    case LOG: return map_lanes<std::log>(a);
    case FLOOR: return map_lanes<std::floor>(a);
    case EXPM1: return map_lanes<std::expm1>(a);
    case LOG1P: return map_lanes<std::log1p>(a);
    case SOFTPLUS: return map_lanes<softplus>(a);
    case POWER: return power(a, scalar);
    case MAXIMUM: return larger(a, b);
    case MINIMUM: return negative(larger(negative(a), negative(b)));
    case EQUAL: return one_where(equal(a, b));
    case NOT_EQUAL: return one_where(~equal(a, b));
    case LESS: return one_where(less(a, b));
    case LESS_EQUAL: return one_where(less_equal(a, b));
    default: return a;
  }
}

// f(offsets of the line in the result, the first operand, the second) for the lines of begin..end.
template <class F>
inline void for_each_line_of(const Step& s, bool is_binary, int64_t begin, int64_t end, const F& f) {
  const int64_t *to = s.out.strides, *a = s.inputs[0].strides;
  const int64_t none[3] = {}, *b = is_binary ? s.inputs[1].strides : none;
  for (int64_t i = begin; i < end; i++)
    for (int64_t j = 0; j < s.sizes[1]; j++)
      for (int64_t k = 0; k < s.sizes[2]; k++)
        f(i * to[0] + j * to[1] + k * to[2], i * a[0] + j * a[1] + k * a[2],
          i * b[0] + j * b[1] + k * b[2]);
}

// A line of floats; ``y`` too, or one number for all of it.
template <int OP, bool IS_BROADCAST>
inline void elementwise_line(float* out, const float* x, const float* y, int64_t n, float scalar) {
  const f32x16 constant = IS_BROADCAST ? broadcast(*y) : zero();
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    store(out + i, apply(OP, load(x + i), IS_BROADCAST ? constant : load(y + i), scalar));
  if (i == n) return;
  const mask16 mask = first_lanes(n - i);
  store(out + i, mask,
        apply(OP, load(x + i, mask), IS_BROADCAST ? constant : load(y + i, mask), scalar));
}

// Contiguous lines of floats sixteen at a time, or elements of any type and stride.
template <int OP>
void elementwise(const Step& s, int64_t begin, int64_t end) {
  const int64_t n = s.sizes[3];
  const bool is_binary = s.operands > 1;
  const Operand &first = s.inputs[0], &other = s.inputs[is_binary];
  const int64_t strides[] = {s.out.strides[3], first.strides[3], is_binary ? other.strides[3] : 0};
  const float scalar = static_cast<float>(s.scalar);
  if (s.out.type == F32 && first.type == F32 && other.type == F32 &&
      (n == 1 || (strides[0] == 1 && strides[1] == 1 && strides[2] <= 1))) {
    float* out = reinterpret_cast<float*>(s.out.data);
    const float* x = reinterpret_cast<const float*>(first.data);
    const float* y = reinterpret_cast<const float*>(other.data);
    if (is_binary && strides[2] == 0)
      return for_each_line_of(s, true, begin, end, [&](int64_t to, int64_t a, int64_t b) {
        elementwise_line<OP, true>(out + to, x + a, y + b, n, scalar);
      });
    return for_each_line_of(s, is_binary, begin, end, [&](int64_t to, int64_t a, int64_t b) {
      elementwise_line<OP, false>(out + to, x + a, is_binary ? y + b : x + a, n, scalar);
    });
  }
  for_each_line_of(s, is_binary, begin, end, [&](int64_t to, int64_t a, int64_t b) {
    for (int64_t i = 0; i < n; i += 16) {
      const mask16 mask = first_lanes(n - i);
      const f32x16 x = load_elements(first, a + i * strides[1], strides[1], mask);
      const f32x16 y = is_binary ? load_elements(other, b + i * strides[2], strides[2], mask) : x;
      store_elements(s.out, to + i * strides[0], strides[0], mask, apply(OP, x, y, scalar));
    }
  });
}

// The sum of x - center over a line, or of its squares.
float sum_line(const Step& s, const Operand& o, int64_t offset, float center, bool squares) {
  f32x16 sums[4] = {};
  int64_t i = 0;
  if (o.type == F32 && o.strides[3] == 1) {  // four vectors at a time
    const float* x = reinterpret_cast<const float*>(o.data) + offset;
    for (; i + 64 <= s.sizes[3]; i += 64)
      for (int lane = 0; lane < 4; lane++) {
        const f32x16 v = sub(load(x + i + 16 * lane), broadcast(center));
        sums[lane] = squares ? fmadd(v, v, sums[lane]) : add(sums[lane], v);
      }
  }
  for (; i < s.sizes[3]; i += 16) {
    const mask16 mask = first_lanes(s.sizes[3] - i);
    f32x16 v = load_elements(o, offset + i * o.strides[3], o.strides[3], mask);
    v = sub(mask, v, broadcast(center));
    f32x16& sum = sums[i / 16 % 4];
    sum = squares ? fmadd(v, v, sum) : add(sum, v);
  }
  return reduce_add(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
}

void mean(const Step& s, int64_t index) {
  const float sum = sum_line(s, s.inputs[0], line_offset(s, s.inputs[0], index), 0, false);
  store_elements(s.out, line_offset(s, s.out, index), 1, 1, broadcast(sum / s.sizes[3]));
}

// inputs: x, then weight, then bias; ``scalar`` is epsilon.
void layer_norm(const Step& s, int64_t index) {
  const int64_t n = s.sizes[3];
  const int64_t from = line_offset(s, s.inputs[0], index), to = line_offset(s, s.out, index);
  const float average = sum_line(s, s.inputs[0], from, 0, false) / n;
  const float variance = sum_line(s, s.inputs[0], from, average, true) / n;
  const f32x16 factor = inverse_sqrt(broadcast(variance + static_cast<float>(s.scalar)));
  for (int64_t i = 0; i < n; i += 16) {
    const mask16 mask = first_lanes(n - i);
    f32x16 v = load_elements(s.inputs[0], from + i, 1, mask);
    v = mul(sub(v, broadcast(average)), factor);
    if (s.operands > 1) v = mul(v, load_elements(s.inputs[1], i, 1, mask));
    if (s.operands > 2) v = add(v, load_elements(s.inputs[2], i, 1, mask));
    store_elements(s.out, to + i, 1, mask, v);
  }
}

// inputs: indices, then the table (contiguous) with ``scalar`` rows. NaN for an index out of range.
void gather(const Step& s, int64_t index) {
  const Operand& indices = s.inputs[0];
  const int64_t at = line_offset(s, indices, index);
  const int64_t row = *reinterpret_cast<int64_t*>(address_of(indices, at));
  const bool is_in_range = row >= 0 && row < static_cast<int64_t>(s.scalar);
  for (int64_t i = 0; i < s.sizes[3]; i += 16) {
    const mask16 mask = first_lanes(s.sizes[3] - i);
    store_elements(s.out, line_offset(s, s.out, index) + i, 1, mask,
                   is_in_range ? load_elements(s.inputs[1], row * s.sizes[3] + i, 1, mask)
                               : broadcast(std::numeric_limits<float>::quiet_NaN()));
  }
}

}  // namespace
