// Affine quantisation to four bits: a weight is minimum + scale * code, with a code of 0..15. Scale
// and minimum of each group are searched for the smallest squared error. Sixteen groups are searched
// at once, one per lane.

#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "simd.h"
#include "weights.h"

namespace {

struct Int4Params {
  f32x16 scale, minimum, error;  // error: squared
};

f32x16 quantize(f32x16 x, const Int4Params& params, f32x16 inverse) {
  const f32x16 code = round_to_even(mul(sub(x, params.minimum), inverse));
  return min(max(code, zero()), broadcast(15));
}

f32x16 inverse_of(f32x16 scale) {  // 0 where the scale is not positive
  return div(greater(scale, zero()), broadcast(1), scale);
}

// Take scale and minimum, as they would be stored, where their error is below the best so far.
void try_params(const f32x16 (&x)[GROUP], f32x16 scale, f32x16 minimum, Int4Params& best) {
  Int4Params params{round_to_half(scale), round_to_half(minimum), zero()};
  const f32x16 inverse = inverse_of(params.scale);
  for (const f32x16& v : x) {
    const f32x16 code = quantize(v, params, inverse);
    const f32x16 error = sub(v, fmadd(code, params.scale, params.minimum));
    params.error = fmadd(error, error, params.error);
  }
  const mask16 is_better = less(params.error, best.error);
  best.scale = select(is_better, params.scale, best.scale);
  best.minimum = select(is_better, params.minimum, best.minimum);
  best.error = select(is_better, params.error, best.error);
}

// Try the least-squares fit of scale and minimum to the codes that these ones give.
void try_least_squares(const f32x16 (&x)[GROUP], f32x16 scale, f32x16 minimum, Int4Params& best) {
  const Int4Params start{scale, minimum, minimum};
  const f32x16 inverse = inverse_of(scale), n = broadcast(GROUP);
  f32x16 sum_x = zero(), sum_q = sum_x, sum_qq = sum_x, sum_qx = sum_x;
  for (const f32x16& v : x) {
    const f32x16 code = quantize(v, start, inverse);
    sum_x = add(sum_x, v), sum_q = add(sum_q, code);
    sum_qq = fmadd(code, code, sum_qq), sum_qx = fmadd(code, v, sum_qx);
  }
  const f32x16 variance = fmsub(n, sum_qq, mul(sum_q, sum_q));
  const f32x16 slope = div(fmsub(n, sum_qx, mul(sum_q, sum_x)), variance);
  const f32x16 intercept = div(fnmadd(slope, sum_q, sum_x), n);
  const mask16 has_fit = greater(variance, zero());
  try_params(x, select(has_fit, slope, scale), select(has_fit, intercept, minimum), best);
}

// A grid search. Numbers that were quantised to four bits before are exact with the number of levels
// that their range has. For others: from the whole range of each group on, narrower and wider ones,
// each refined by least squares, and at last the best one refined again.
Int4Params search_params(const f32x16 (&x)[GROUP]) {
  f32x16 low = x[0], high = x[0], squares = zero();
  for (const f32x16& v : x) {
    low = min(low, v), high = max(high, v);
    squares = fmadd(v, v, squares);
  }
  const f32x16 range = sub(high, low);
  Int4Params best{low, low, broadcast(std::numeric_limits<float>::infinity())};
  const f32x16 exact = mul(squares, broadcast(1e-7f));
  for (float levels = 15; levels >= 8; levels--) {
    try_params(x, div(range, broadcast(levels)), low, best);
    if (less_equal(best.error, exact) == 0xffff) return best;
  }
  const f32x16 middle = fmadd(range, broadcast(.5f), low);
  for (float levels = 13; levels < 20; levels += .5f) {
    const f32x16 scale = div(range, broadcast(levels));
    try_least_squares(x, scale, fnmadd(scale, broadcast(7.5f), middle), best);
    try_least_squares(x, scale, low, best);
    try_least_squares(x, scale, fnmadd(scale, broadcast(15), high), best);
  }
  for (int i = 0; i < 3; i++) try_least_squares(x, best.scale, best.minimum, best);
  return best;
}

// Up to sixteen groups of a row, from group g on. Adds their squared error and their squares to
// ``sums``.
void pack_int4_groups(const Weight& w, const float* source, int64_t row, int64_t g, double* sums) {
  const int64_t count = std::min<int64_t>(16, num_groups(w) - g);
  alignas(64) float x[GROUP][16] = {};
  for (int64_t lane = 0; lane < count; lane++) {
    const int64_t at = (g + lane) * GROUP;  // padding repeats the first: it widens no range
    for (int64_t i = 0; i < GROUP; i++) x[i][lane] = source[at + i < w.k ? at + i : at];
  }
  f32x16 v[GROUP], squares = zero();
  for (int i = 0; i < GROUP; i++) {
    v[i] = load_aligned(x[i]);
    squares = fmadd(v[i], v[i], squares);
  }
  const Int4Params best = search_params(v);
  sums[0] += reduce_add(best.error), sums[1] += reduce_add(squares);
  const f32x16 inverse = inverse_of(best.scale);
  for (int i = 0; i < GROUP; i++) store_aligned(x[i], quantize(v[i], best, inverse));
  alignas(32) uint16_t scales[16], minima[16];
  store_half(scales, best.scale), store_half(minima, best.minimum);
  const int64_t output = row % PANEL, shift = output < 16 ? 0 : 4;
  for (int64_t lane = 0; lane < count; lane++) {
    uint8_t* codes = int4_group_at(w, row, g + lane);
    for (int64_t i = 0; i < GROUP; i++)
      codes[i / 4 * 64 + output % 16 * 4 + i % 4] |= static_cast<uint8_t>(x[i][lane]) << shift;
    uint16_t* params = reinterpret_cast<uint16_t*>(codes + INT4_CODE_BYTES) + output;
    params[0] = scales[lane], params[PANEL] = minima[lane];
  }
}

void unpack_int4_row(const Weight& w, int64_t row, float* out) {
  const int64_t output = row % PANEL, shift = output < 16 ? 0 : 4;
  for (int64_t g = 0; g < num_groups(w); g++) {
    const uint8_t* codes = int4_group_at(w, row, g);
    const uint16_t* params = reinterpret_cast<const uint16_t*>(codes + INT4_CODE_BYTES) + output;
    const float scale = half_to_float(params[0]);
    const float minimum = w.type == I4 ? half_to_float(params[PANEL]) : INT4_CENTRE * scale;
    for (int64_t i = 0; i < std::min(GROUP, w.k - g * GROUP); i++) {
      const int code = codes[i / 4 * 64 + output % 16 * 4 + i % 4] >> shift & 15;
      out[g * GROUP + i] = std::fma(static_cast<float>(code), scale, minimum);
    }
  }
}

}  // namespace
