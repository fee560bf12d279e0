// NEON's functions on x86, by SIMDe (Debian: libsimde-dev), so that the kernels for ARM can be tested
// where there is no such processor. Besides, what this version of SIMDe lacks.

#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <immintrin.h>
#include <simde/arm/neon.h>

static inline float32x4_t vdivq_f32(float32x4_t a, float32x4_t b) { return _mm_div_ps(a, b); }
static inline float32x4_t vsqrtq_f32(float32x4_t x) { return _mm_sqrt_ps(x); }
static inline float32x4_t vfmsq_f32(float32x4_t c, float32x4_t a, float32x4_t b) {
  return _mm_fnmadd_ps(a, b, c);
}
static inline int32x4_t vcvtnq_s32_f32(float32x4_t x) {
  return (int32x4_t)_mm_cvtps_epi32(x);
}

#include <cmath>
#include <cstdint>
#include <cstring>

using bfloat16x8_t = uint16x8_t;
static inline bfloat16x8_t vreinterpretq_bf16_s32(int32x4_t x) { return (bfloat16x8_t)x; }

// a + b rounded to odd: what is not exact is the odd one of its two neighbours. Denormals are zero.
__attribute__((noinline)) static float add_to_odd(float a, float b) {
  const float smallest = 0x1p-126f;
  if (std::fabs(a) < smallest) a = std::copysign(0.f, a);
  if (std::fabs(b) < smallest) b = std::copysign(0.f, b);
  const double x = a, y = b, sum = x + y, rest = sum - x;
  const double lost = (x - (sum - rest)) + (y - rest);  // of ``sum``, exactly
  float near = static_cast<float>(sum);
  if (!std::isfinite(near)) return near;
  if (near != sum || lost != 0) {
    const double beyond = (near - sum) - lost;  // of ``near``: has the right sign
    if ((near > 0) == (beyond > 0)) near = std::nextafter(near, 0.f);
    uint32_t bits;
    std::memcpy(&bits, &near, 4);
    bits |= 1;
    std::memcpy(&near, &bits, 4);
  }
  return std::fabs(near) < smallest ? std::copysign(0.f, near) : near;
}
__attribute__((noinline)) static float32x4_t vbfdotq_f32(float32x4_t sum, bfloat16x8_t a, bfloat16x8_t b) {
  for (int i = 0; i < 4; i++) {
    float products[2];
    for (int j = 0; j < 2; j++) {
      const uint32_t bits[2] = {uint32_t{a[2 * i + j]} << 16, uint32_t{b[2 * i + j]} << 16};
      float x[2];
      std::memcpy(x, bits, 8);
      products[j] = add_to_odd(x[0], 0) * add_to_odd(x[1], 0);  // exact, but for denormals
    }
    sum[i] = add_to_odd(sum[i], add_to_odd(products[0], products[1]));
  }
  return sum;
}
// Two rows of eight codes with two rows of eight others.
__attribute__((noinline)) static int32x4_t vmmlaq_s32(int32x4_t sums, int8x16_t a, int8x16_t b) {
  for (int i = 0; i < 4; i++)
    for (int j = 0; j < 8; j++) sums[i] += a[i / 2 * 8 + j] * b[i % 2 * 8 + j];
  return sums;
}
