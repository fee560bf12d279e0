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
