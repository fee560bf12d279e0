// simd.h for AVX-512, with or without BF16.

#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

using f32x16 = __m512;
using f64x8 = __m512d;
using i32x16 = __m512i;  // also sixteen lanes of 4 bytes of any kind
using u64x8 = __m512i;
using bf16x16 = __m256i;
using mask16 = __mmask16;

void pause_spinning() { _mm_pause(); }

// ---- float32 ---------------------------------------------------------------------------------

f32x16 zero() { return _mm512_setzero_ps(); }
f32x16 broadcast(float x) { return _mm512_set1_ps(x); }
f32x16 add(f32x16 a, f32x16 b) { return _mm512_add_ps(a, b); }
f32x16 sub(f32x16 a, f32x16 b) { return _mm512_sub_ps(a, b); }
f32x16 sub(mask16 mask, f32x16 a, f32x16 b) { return _mm512_maskz_sub_ps(mask, a, b); }
f32x16 mul(f32x16 a, f32x16 b) { return _mm512_mul_ps(a, b); }
f32x16 div(f32x16 a, f32x16 b) { return _mm512_div_ps(a, b); }
f32x16 div(mask16 mask, f32x16 a, f32x16 b) { return _mm512_maskz_div_ps(mask, a, b); }
f32x16 fmadd(f32x16 a, f32x16 b, f32x16 c) { return _mm512_fmadd_ps(a, b, c); }    // ab + c
f32x16 fmsub(f32x16 a, f32x16 b, f32x16 c) { return _mm512_fmsub_ps(a, b, c); }    // ab - c
f32x16 fnmadd(f32x16 a, f32x16 b, f32x16 c) { return _mm512_fnmadd_ps(a, b, c); }  // c - ab
f32x16 min(f32x16 a, f32x16 b) { return _mm512_min_ps(a, b); }  // b where one is NaN
f32x16 max(f32x16 a, f32x16 b) { return _mm512_max_ps(a, b); }
f32x16 max(mask16 mask, f32x16 a, f32x16 b) {  // a outside the mask
  return _mm512_mask_max_ps(a, mask, a, b);
}
f32x16 abs(f32x16 x) { return _mm512_abs_ps(x); }
f32x16 sqrt(f32x16 x) { return _mm512_sqrt_ps(x); }
f32x16 round_to_even(f32x16 x) { return _mm512_roundscale_ps(x, 8); }
f32x16 select(mask16 mask, f32x16 x, f32x16 otherwise) {
  return _mm512_mask_mov_ps(otherwise, mask, x);
}
f32x16 masked(mask16 mask, f32x16 x) { return _mm512_maskz_mov_ps(mask, x); }
f32x16 with_sign(f32x16 magnitude, f32x16 sign) {
  return _mm512_or_ps(magnitude, _mm512_and_ps(sign, _mm512_set1_ps(-0.f)));
}

mask16 less(f32x16 a, f32x16 b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
mask16 less_equal(f32x16 a, f32x16 b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
mask16 greater(f32x16 a, f32x16 b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
mask16 greater_equal(f32x16 a, f32x16 b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
mask16 is_nan(f32x16 x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q); }
mask16 equal(mask16 mask, f32x16 a, f32x16 b) {
  return _mm512_mask_cmp_ps_mask(mask, a, b, _CMP_EQ_OQ);
}
mask16 greater(mask16 mask, f32x16 a, f32x16 b) {
  return _mm512_mask_cmp_ps_mask(mask, a, b, _CMP_GT_OQ);
}
mask16 greater_equal(mask16 mask, f32x16 a, f32x16 b) {
  return _mm512_mask_cmp_ps_mask(mask, a, b, _CMP_GE_OQ);
}

float first_lane(f32x16 x) { return _mm512_cvtss_f32(x); }
float reduce_add(f32x16 x) { return _mm512_reduce_add_ps(x); }
float reduce_add(mask16 mask, f32x16 x) { return _mm512_mask_reduce_add_ps(mask, x); }
float reduce_max(f32x16 x) { return _mm512_reduce_max_ps(x); }
float reduce_max(mask16 mask, f32x16 x) { return _mm512_mask_reduce_max_ps(mask, x); }

// ---- integers and float64 --------------------------------------------------------------------

i32x16 zero_i32() { return _mm512_setzero_si512(); }
i32x16 as_i32(f32x16 x) { return _mm512_castps_si512(x); }
f32x16 as_f32(i32x16 x) { return _mm512_castsi512_ps(x); }
i32x16 to_i32(f32x16 x) { return _mm512_cvtps_epi32(x); }  // rounded to even
i32x16 add_i32(i32x16 a, i32x16 b) { return _mm512_add_epi32(a, b); }
i32x16 max_u32(i32x16 a, i32x16 b) { return _mm512_max_epu32(a, b); }
int32_t reduce_add_i32(i32x16 x) { return _mm512_reduce_add_epi32(x); }
uint32_t reduce_max_u32(i32x16 x) { return _mm512_reduce_max_epu32(x); }
i32x16 load_i32(const void* p) { return _mm512_loadu_si512(p); }
i32x16 load_i32(const int32_t* p, mask16 mask) { return _mm512_maskz_loadu_epi32(mask, p); }
void store_i32(void* p, i32x16 x) { _mm512_storeu_si512(p, x); }
void store_aligned_i32(void* p, i32x16 x) { _mm512_store_si512(p, x); }
void store_i8(void* p, i32x16 x) {  // saturated
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(x));
}

u64x8 broadcast_u64(uint64_t x) { return _mm512_set1_epi64(static_cast<int64_t>(x)); }
u64x8 lane_numbers_u64() { return _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7); }
u64x8 add_u64(u64x8 a, u64x8 b) { return _mm512_add_epi64(a, b); }
u64x8 mul_u64(u64x8 a, u64x8 b) { return _mm512_mullo_epi64(a, b); }
u64x8 xor_u64(u64x8 a, u64x8 b) { return _mm512_xor_si512(a, b); }
template <int BITS>
u64x8 shift_right_u64(u64x8 x) {
  return _mm512_srli_epi64(x, BITS);
}
f32x16 to_f32(u64x8 low, u64x8 high) {
  const f32x16 first = _mm512_castps256_ps512(_mm512_cvtepu64_ps(low));
  return _mm512_insertf32x8(first, _mm512_cvtepu64_ps(high), 1);
}

f64x8 zero_f64() { return _mm512_setzero_pd(); }
f64x8 add_widened(f64x8 sum, f32x16 x) {  // sum + the lower half + the upper half
  sum = _mm512_add_pd(sum, _mm512_cvtps_pd(_mm512_castps512_ps256(x)));
  return _mm512_add_pd(sum, _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)));
}
double reduce_add(f64x8 x) { return _mm512_reduce_add_pd(x); }

// ---- bfloat16, half precision, memory --------------------------------------------------------

f32x16 widen(bf16x16 x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
#ifdef __AVX512BF16__
bf16x16 to_bf16(f32x16 x) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)); }
#else
bf16x16 to_bf16(f32x16 x) {  // to the nearest, of two the even one; NaN stays NaN
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __m512i chosen = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), quiet);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(chosen, 16));
}
#endif
f32x16 round_to_bf16(f32x16 x) { return widen(to_bf16(x)); }
f32x16 round_to_half(f32x16 x) { return _mm512_cvtph_ps(_mm512_cvtps_ph(x, 0)); }

float half_to_float(uint16_t value) {
  return _mm512_cvtss_f32(_mm512_cvtph_ps(_mm256_set1_epi16(static_cast<int16_t>(value))));
}

f32x16 load(const float* p) { return _mm512_loadu_ps(p); }
f32x16 load(const float* p, mask16 mask) { return _mm512_maskz_loadu_ps(mask, p); }
f32x16 load(const uint16_t* p, mask16 mask) {
  return widen(_mm256_maskz_loadu_epi16(mask, p));
}
f32x16 load_i8(const int8_t* p) {
  return _mm512_cvtepi32_ps(
      _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
f32x16 load_aligned(const float* p) { return _mm512_load_ps(p); }
f32x16 load_half(const void* p) {
  return _mm512_cvtph_ps(_mm256_load_si256(static_cast<const __m256i*>(p)));
}
void store(float* p, f32x16 x) { _mm512_storeu_ps(p, x); }
void store(float* p, mask16 mask, f32x16 x) { _mm512_mask_storeu_ps(p, mask, x); }
void store(uint16_t* p, mask16 mask, f32x16 x) {
  _mm256_mask_storeu_epi16(p, mask, to_bf16(x));
}
void store_aligned(float* p, f32x16 x) { _mm512_store_ps(p, x); }
void store_half(void* p, f32x16 x) {
  _mm256_store_si256(static_cast<__m256i*>(p), _mm512_cvtps_ph(x, 0));
}
void store_pairs(int32_t* p, mask16 mask, f32x16 x) {  // bfloat16, two per lane: 8 lanes
  _mm256_mask_storeu_epi32(p, mask & 0xff, to_bf16(x));
}

// Lane i of vector j becomes lane j of vector i.
inline void transpose(i32x16 (&v)[16]) {
  i32x16 w[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
    const i32x16 a = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    const i32x16 b = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    const i32x16 c = _mm512_unpacklo_epi32(v[i + 2], v[i + 3]);
    const i32x16 d = _mm512_unpackhi_epi32(v[i + 2], v[i + 3]);
    w[i] = _mm512_unpacklo_epi64(a, c), w[i + 1] = _mm512_unpackhi_epi64(a, c);
    w[i + 2] = _mm512_unpacklo_epi64(b, d), w[i + 3] = _mm512_unpackhi_epi64(b, d);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    const i32x16 a = _mm512_shuffle_i32x4(w[i], w[i + 4], 0x88);
    const i32x16 b = _mm512_shuffle_i32x4(w[i], w[i + 4], 0xdd);
    const i32x16 c = _mm512_shuffle_i32x4(w[i + 8], w[i + 12], 0x88);
    const i32x16 d = _mm512_shuffle_i32x4(w[i + 8], w[i + 12], 0xdd);
    v[i] = _mm512_shuffle_i32x4(a, c, 0x88), v[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88);
    v[i + 8] = _mm512_shuffle_i32x4(a, c, 0xdd), v[i + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
}

inline void transpose(f32x16 (&v)[16]) {
  i32x16 w[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) w[i] = as_i32(v[i]);
  transpose(w);
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) v[i] = _mm512_castsi512_ps(w[i]);
}

// Lane i of reduce_each<add> is reduce_add(v[i]), the sums made in the same order; of <max> its maximum.
template <f32x16 (*COMBINE)(f32x16, f32x16)>
f32x16 reduce_each(f32x16 (&v)[16]) {
  transpose(v);
#pragma GCC unroll 4
  for (int n = 8; n; n /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < n; i++) v[i] = COMBINE(v[i], v[i + n]);
  return v[0];
}

// 2^n x, the last step of exp.
f32x16 scale_by_power(f32x16 x, f32x16 n) { return _mm512_scalef_ps(x, n); }

}  // namespace
