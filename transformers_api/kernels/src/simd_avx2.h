// simd.h for AVX2 with FMA and F16C: a vector is two halves.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

struct f32x16 {
  __m256 low, high;
};
struct f64x8 {
  __m256d low, high;
};
struct i32x16 {  // also sixteen lanes of 4 bytes of any kind
  __m256i low, high;
};
using u64x8 = i32x16;
using bf16x16 = __m256i;
using mask16 = uint16_t;

void pause_spinning() { _mm_pause(); }

// All bits of the lanes whose bit of the mask's lower eight is set.
__m256i lanes_of(int mask) {
  const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(mask), bits), bits);
}
mask16 mask_of(__m256 low, __m256 high) {
  return static_cast<mask16>(_mm256_movemask_ps(low) | _mm256_movemask_ps(high) << 8);
}

// ---- float32 ---------------------------------------------------------------------------------

f32x16 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
f32x16 broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
f32x16 add(f32x16 a, f32x16 b) {
  return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}
f32x16 sub(f32x16 a, f32x16 b) {
  return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
}
f32x16 mul(f32x16 a, f32x16 b) {
  return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
f32x16 div(f32x16 a, f32x16 b) {
  return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)};
}
f32x16 fmadd(f32x16 a, f32x16 b, f32x16 c) {  // ab + c
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
f32x16 fmsub(f32x16 a, f32x16 b, f32x16 c) {  // ab - c
  return {_mm256_fmsub_ps(a.low, b.low, c.low), _mm256_fmsub_ps(a.high, b.high, c.high)};
}
f32x16 fnmadd(f32x16 a, f32x16 b, f32x16 c) {  // c - ab
  return {_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
}
f32x16 min(f32x16 a, f32x16 b) {  // b where one is NaN
  return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)};
}
f32x16 max(f32x16 a, f32x16 b) {
  return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
}
f32x16 sqrt(f32x16 x) { return {_mm256_sqrt_ps(x.low), _mm256_sqrt_ps(x.high)}; }
f32x16 round_to_even(f32x16 x) {
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.low, nearest), _mm256_round_ps(x.high, nearest)};
}
f32x16 bits_and(f32x16 a, f32x16 b) {
  return {_mm256_and_ps(a.low, b.low), _mm256_and_ps(a.high, b.high)};
}
f32x16 abs(f32x16 x) {
  const __m256 sign = _mm256_set1_ps(-0.f);
  return {_mm256_andnot_ps(sign, x.low), _mm256_andnot_ps(sign, x.high)};
}
f32x16 with_sign(f32x16 magnitude, f32x16 sign) {
  const f32x16 s = bits_and(sign, broadcast(-0.f));
  return {_mm256_or_ps(magnitude.low, s.low), _mm256_or_ps(magnitude.high, s.high)};
}
f32x16 lanes_f32(mask16 mask) {
  return {_mm256_castsi256_ps(lanes_of(mask)), _mm256_castsi256_ps(lanes_of(mask >> 8))};
}
f32x16 select(mask16 mask, f32x16 x, f32x16 otherwise) {
  const f32x16 lanes = lanes_f32(mask);
  return {_mm256_blendv_ps(otherwise.low, x.low, lanes.low),
          _mm256_blendv_ps(otherwise.high, x.high, lanes.high)};
}
f32x16 masked(mask16 mask, f32x16 x) { return bits_and(lanes_f32(mask), x); }
f32x16 sub(mask16 mask, f32x16 a, f32x16 b) { return masked(mask, sub(a, b)); }
f32x16 div(mask16 mask, f32x16 a, f32x16 b) { return masked(mask, div(a, b)); }
f32x16 max(mask16 mask, f32x16 a, f32x16 b) { return select(mask, max(a, b), a); }  // a outside

template <int COMPARISON>
mask16 compare(f32x16 a, f32x16 b) {
  return mask_of(_mm256_cmp_ps(a.low, b.low, COMPARISON),
                 _mm256_cmp_ps(a.high, b.high, COMPARISON));
}
mask16 less(f32x16 a, f32x16 b) { return compare<_CMP_LT_OQ>(a, b); }
mask16 less_equal(f32x16 a, f32x16 b) { return compare<_CMP_LE_OQ>(a, b); }
mask16 greater(f32x16 a, f32x16 b) { return compare<_CMP_GT_OQ>(a, b); }
mask16 greater_equal(f32x16 a, f32x16 b) { return compare<_CMP_GE_OQ>(a, b); }
mask16 is_nan(f32x16 x) { return compare<_CMP_UNORD_Q>(x, x); }
mask16 equal(mask16 mask, f32x16 a, f32x16 b) { return mask & compare<_CMP_EQ_OQ>(a, b); }
mask16 greater(mask16 mask, f32x16 a, f32x16 b) { return mask & greater(a, b); }
mask16 greater_equal(mask16 mask, f32x16 a, f32x16 b) { return mask & greater_equal(a, b); }

float first_lane(f32x16 x) { return _mm256_cvtss_f32(x.low); }
float reduce_add(f32x16 x) {
  const __m256 eight = _mm256_add_ps(x.low, x.high);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
float reduce_add(mask16 mask, f32x16 x) { return reduce_add(masked(mask, x)); }
float reduce_max(f32x16 x) {
  const __m256 eight = _mm256_max_ps(x.low, x.high);
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}
float reduce_max(mask16 mask, f32x16 x) {
  return reduce_max(select(mask, x, broadcast(-__builtin_inff())));
}

// ---- integers and float64 --------------------------------------------------------------------

i32x16 zero_i32() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
i32x16 as_i32(f32x16 x) { return {_mm256_castps_si256(x.low), _mm256_castps_si256(x.high)}; }
f32x16 as_f32(i32x16 x) { return {_mm256_castsi256_ps(x.low), _mm256_castsi256_ps(x.high)}; }
i32x16 to_i32(f32x16 x) {  // rounded to even
  return {_mm256_cvtps_epi32(x.low), _mm256_cvtps_epi32(x.high)};
}
i32x16 add_i32(i32x16 a, i32x16 b) {
  return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)};
}
i32x16 max_u32(i32x16 a, i32x16 b) {
  return {_mm256_max_epu32(a.low, b.low), _mm256_max_epu32(a.high, b.high)};
}
int32_t reduce_add_i32(i32x16 x) {
  const __m256i eight = _mm256_add_epi32(x.low, x.high);
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}
uint32_t reduce_max_u32(i32x16 x) {
  const __m256i eight = _mm256_max_epu32(x.low, x.high);
  __m128i four = _mm_max_epu32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  four = _mm_max_epu32(four, _mm_shuffle_epi32(four, 0x4e));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_max_epu32(four, _mm_shuffle_epi32(four, 0xb1))));
}
i32x16 load_i32(const void* p) {
  const auto* halves = static_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)};
}
i32x16 load_i32(const int32_t* p, mask16 mask) {
  return {_mm256_maskload_epi32(p, lanes_of(mask)), _mm256_maskload_epi32(p + 8, lanes_of(mask >> 8))};
}
void store_i32(void* p, i32x16 x) {
  auto* halves = static_cast<__m256i*>(p);
  _mm256_storeu_si256(halves, x.low), _mm256_storeu_si256(halves + 1, x.high);
}
void store_aligned_i32(void* p, i32x16 x) {
  auto* halves = static_cast<__m256i*>(p);
  _mm256_store_si256(halves, x.low), _mm256_store_si256(halves + 1, x.high);
}
void store_i8(void* p, i32x16 x) {  // saturated
  const __m256i mixed = _mm256_packs_epi32(x.low, x.high);
  const __m256i ordered = _mm256_permute4x64_epi64(mixed, 0xd8);
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm_packs_epi16(_mm256_castsi256_si128(ordered),
                                                             _mm256_extracti128_si256(ordered, 1)));
}

u64x8 broadcast_u64(uint64_t x) {
  const __m256i four = _mm256_set1_epi64x(static_cast<int64_t>(x));
  return {four, four};
}
u64x8 lane_numbers_u64() {
  return {_mm256_setr_epi64x(0, 1, 2, 3), _mm256_setr_epi64x(4, 5, 6, 7)};
}
u64x8 add_u64(u64x8 a, u64x8 b) {
  return {_mm256_add_epi64(a.low, b.low), _mm256_add_epi64(a.high, b.high)};
}
__m256i mul_u64(__m256i a, __m256i b) {
  const __m256i cross = _mm256_mullo_epi32(a, _mm256_shuffle_epi32(b, 0xb1));
  const __m256i sum = _mm256_add_epi32(cross, _mm256_shuffle_epi32(cross, 0xb1));
  return _mm256_add_epi64(_mm256_mul_epu32(a, b), _mm256_slli_epi64(sum, 32));
}
u64x8 mul_u64(u64x8 a, u64x8 b) { return {mul_u64(a.low, b.low), mul_u64(a.high, b.high)}; }
u64x8 xor_u64(u64x8 a, u64x8 b) {
  return {_mm256_xor_si256(a.low, b.low), _mm256_xor_si256(a.high, b.high)};
}
template <int BITS>
u64x8 shift_right_u64(u64x8 x) {
  return {_mm256_srli_epi64(x.low, BITS), _mm256_srli_epi64(x.high, BITS)};
}
// Of numbers below 2^53: the upper and the lower half become doubles by their exponents, exactly.
__m128 to_f32(__m256i x) {
  const __m256d high_unit = _mm256_set1_pd(0x1p84), low_unit = _mm256_set1_pd(0x1p52);
  const __m256i high = _mm256_or_si256(_mm256_srli_epi64(x, 32), _mm256_castpd_si256(high_unit));
  const __m256i low = _mm256_blend_epi32(x, _mm256_castpd_si256(low_unit), 0xaa);
  const __m256d upper = _mm256_sub_pd(_mm256_castsi256_pd(high), high_unit);
  return _mm256_cvtpd_ps(
      _mm256_add_pd(upper, _mm256_sub_pd(_mm256_castsi256_pd(low), low_unit)));
}
f32x16 to_f32(u64x8 low, u64x8 high) {
  return {_mm256_set_m128(to_f32(low.high), to_f32(low.low)),
          _mm256_set_m128(to_f32(high.high), to_f32(high.low))};
}

f64x8 zero_f64() { return {_mm256_setzero_pd(), _mm256_setzero_pd()}; }
__m256d widened(__m256 x, int half) {
  return _mm256_cvtps_pd(half ? _mm256_extractf128_ps(x, 1) : _mm256_castps256_ps128(x));
}
f64x8 add_widened(f64x8 sum, f32x16 x) {  // sum + the lower half + the upper half
  sum.low = _mm256_add_pd(sum.low, widened(x.low, 0));
  sum.high = _mm256_add_pd(sum.high, widened(x.low, 1));
  sum.low = _mm256_add_pd(sum.low, widened(x.high, 0));
  sum.high = _mm256_add_pd(sum.high, widened(x.high, 1));
  return sum;
}
double reduce_add(f64x8 x) {
  const __m256d four = _mm256_add_pd(x.low, x.high);
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
  return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}

// ---- bfloat16, half precision, memory --------------------------------------------------------

__m256 widen(__m128i x) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}
f32x16 widen(bf16x16 x) {
  return {widen(_mm256_castsi256_si128(x)), widen(_mm256_extracti128_si256(x, 1))};
}
__m256i bf16_bits(__m256 x) {  // to the nearest, of two the even one; NaN stays NaN
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
}
bf16x16 to_bf16(f32x16 x) {
  const __m256i mixed = _mm256_packus_epi32(bf16_bits(x.low), bf16_bits(x.high));
  return _mm256_permute4x64_epi64(mixed, 0xd8);
}
f32x16 round_to_bf16(f32x16 x) { return widen(to_bf16(x)); }
f32x16 round_to_half(f32x16 x) {
  return {_mm256_cvtph_ps(_mm256_cvtps_ph(x.low, 0)), _mm256_cvtph_ps(_mm256_cvtps_ph(x.high, 0))};
}
float half_to_float(uint16_t value) { return _cvtsh_ss(value); }

f32x16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
f32x16 load(const float* p, mask16 mask) {
  return {_mm256_maskload_ps(p, lanes_of(mask)), _mm256_maskload_ps(p + 8, lanes_of(mask >> 8))};
}
f32x16 load(const uint16_t* p, mask16 mask) {
  if (mask == 0xffff) return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  alignas(32) uint16_t lanes[16] = {};
  for (int i = 0; i < 16; i++)
    if (mask >> i & 1) lanes[i] = p[i];
  return widen(_mm256_load_si256(reinterpret_cast<const __m256i*>(lanes)));
}
f32x16 load_i8(const int8_t* p) {
  const auto* codes = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(codes))),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(
              _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8))))};
}
f32x16 load_aligned(const float* p) { return {_mm256_load_ps(p), _mm256_load_ps(p + 8)}; }
f32x16 load_half(const void* p) {
  const auto* halves = static_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_load_si128(halves)), _mm256_cvtph_ps(_mm_load_si128(halves + 1))};
}
void store(float* p, f32x16 x) { _mm256_storeu_ps(p, x.low), _mm256_storeu_ps(p + 8, x.high); }
void store(float* p, mask16 mask, f32x16 x) {
  _mm256_maskstore_ps(p, lanes_of(mask), x.low);
  _mm256_maskstore_ps(p + 8, lanes_of(mask >> 8), x.high);
}
void store(uint16_t* p, mask16 mask, f32x16 x) {
  if (mask == 0xffff) return _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16(x));
  alignas(32) uint16_t lanes[16];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), to_bf16(x));
  for (int i = 0; i < 16; i++)
    if (mask >> i & 1) p[i] = lanes[i];
}
void store_aligned(float* p, f32x16 x) { _mm256_store_ps(p, x.low), _mm256_store_ps(p + 8, x.high); }
void store_half(void* p, f32x16 x) {
  auto* halves = static_cast<__m128i*>(p);
  _mm_store_si128(halves, _mm256_cvtps_ph(x.low, 0));
  _mm_store_si128(halves + 1, _mm256_cvtps_ph(x.high, 0));
}
void store_pairs(int32_t* p, mask16 mask, f32x16 x) {  // bfloat16, two per lane: 8 lanes
  _mm256_maskstore_epi32(p, lanes_of(mask), to_bf16(x));
}

inline void transpose8(__m256i (&v)[8]) {
  __m256i w[8];
  for (int i = 0; i < 8; i += 4) {
    const __m256i a = _mm256_unpacklo_epi32(v[i], v[i + 1]);
    const __m256i b = _mm256_unpackhi_epi32(v[i], v[i + 1]);
    const __m256i c = _mm256_unpacklo_epi32(v[i + 2], v[i + 3]);
    const __m256i d = _mm256_unpackhi_epi32(v[i + 2], v[i + 3]);
    w[i] = _mm256_unpacklo_epi64(a, c), w[i + 1] = _mm256_unpackhi_epi64(a, c);
    w[i + 2] = _mm256_unpacklo_epi64(b, d), w[i + 3] = _mm256_unpackhi_epi64(b, d);
  }
  for (int i = 0; i < 4; i++) {
    v[i] = _mm256_permute2x128_si256(w[i], w[i + 4], 0x20);
    v[i + 4] = _mm256_permute2x128_si256(w[i], w[i + 4], 0x31);
  }
}
// Lane i of vector j becomes lane j of vector i.
inline void transpose(i32x16 (&v)[16]) {
  __m256i block[4][8];  // upper left, upper right, lower left, lower right
  for (int i = 0; i < 8; i++) {
    block[0][i] = v[i].low, block[1][i] = v[i].high;
    block[2][i] = v[i + 8].low, block[3][i] = v[i + 8].high;
  }
  for (auto& each : block) transpose8(each);
  for (int i = 0; i < 8; i++) {
    v[i] = {block[0][i], block[2][i]};
    v[i + 8] = {block[1][i], block[3][i]};
  }
}

// 2^n x, the last step of exp: in two steps, because 2^n alone may be no float.
__m256 scale_by_power(__m256 x, __m256 n) {
  const __m256i power = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(power, 1);
  auto unit = [](__m256i exponent) {
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_add_epi32(exponent, _mm256_set1_epi32(127)), 23));
  };
  return _mm256_mul_ps(_mm256_mul_ps(x, unit(half)), unit(_mm256_sub_epi32(power, half)));
}
f32x16 scale_by_power(f32x16 x, f32x16 n) {
  return {scale_by_power(x.low, n.low), scale_by_power(x.high, n.high)};
}

}  // namespace
