// Elementary functions of sixteen floats at once.

#pragma once

#include "simd.h"

namespace {

// e^x, within 2 units in the last place; NaN stays NaN. Cody and Waite's range reduction, then a
// Taylor polynomial.
f32x16 exp(f32x16 x) {
  x = min(broadcast(89.f), max(broadcast(-104.f), x));
  const f32x16 n = round_to_even(mul(x, broadcast(1.44269504f)));
  f32x16 r = fnmadd(n, broadcast(0.693359375f), x);
  r = fnmadd(n, broadcast(-2.12194440e-4f), r);
  f32x16 y = broadcast(1.f / 5040);
  for (float c : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, .5f, 1.f, 1.f})
    y = fmadd(y, r, broadcast(c));
  return scale_by_power(y, n);
}

// Near 0 the polynomial of Cephes, because 1 - 2 / (e^2x + 1) would lose digits there.
f32x16 tanh(f32x16 x) {
  const f32x16 size = abs(x), z = mul(x, x), one = broadcast(1);
  f32x16 p = broadcast(-5.70498872745e-3f);
  for (float c : {2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f, -3.33332819422e-1f})
    p = fmadd(p, z, broadcast(c));
  const f32x16 near = fmadd(mul(p, z), x, x);
  const f32x16 e = exp(add(size, size));
  const f32x16 part = div(one, add(e, one));
  const f32x16 far = fnmadd(broadcast(2), part, one);
  return select(less(size, broadcast(0.625f)), near, with_sign(far, x));
}

f32x16 sigmoid(f32x16 x) {
  const f32x16 one = broadcast(1);
  return div(one, add(one, exp(sub(zero(), x))));
}

// x times the normal distribution's probability below x. The smaller of the two tails is half of
// erfc, which is within 2e-7 of this polynomial (Abramowitz and Stegun, 7.1.26).
f32x16 gelu(f32x16 x) {
  const f32x16 one = broadcast(1);
  const f32x16 z = mul(abs(x), broadcast(0.70710678f));
  const f32x16 t = div(one, fmadd(z, broadcast(0.3275911f), one));
  f32x16 p = broadcast(1.061405429f);
  for (float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f, 0.f})
    p = fmadd(p, t, broadcast(c));
  const f32x16 e = exp(sub(zero(), mul(z, z)));
  const f32x16 tail = mul(mul(p, broadcast(.5f)), e);
  return mul(x, select(greater_equal(x, zero()), sub(one, tail), tail));
}

f32x16 gelu_tanh(f32x16 x) {  // x * sigmoid(2u), because tanh(u) = 2 sigmoid(2u) - 1
  const f32x16 cube = mul(mul(x, x), x);
  const f32x16 u = fmadd(cube, broadcast(0.044715f), x);
  return mul(x, sigmoid(mul(u, broadcast(1.5957691216f))));
}

// Attention scores bounded to -cap..cap, as in Gemma 2.
f32x16 apply_softcap(f32x16 scores, float cap) {
  return mul(broadcast(cap), tanh(mul(scores, broadcast(1 / cap))));
}

}  // namespace
