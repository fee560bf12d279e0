// simd.h for ARM's NEON: a vector is four quarters.

#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace {

struct f32x16 {
  float32x4_t v[4];
};
struct f64x8 {
  float64x2_t v[4];
};
struct i32x16 {  // also sixteen lanes of 4 bytes of any kind
  int32x4_t v[4];
};
struct u64x8 {
  uint64x2_t v[4];
};
struct bf16x16 {
  uint16x8_t v[2];
};
using mask16 = uint16_t;

void pause_spinning() {
#ifdef __aarch64__
  asm volatile("yield");
#endif
}

// A vector of which ``f(i)`` gives quarter i.
template <class V, class F>
inline V quarters(const F& f) {
  return V{{f(0), f(1), f(2), f(3)}};
}

// All bits of the lanes of quarter i whose bit of the mask is set.
inline uint32x4_t lanes_of(mask16 mask, int i) {
  const uint32x4_t bits = {1, 2, 4, 8};
  return vtstq_u32(vdupq_n_u32(static_cast<uint32_t>(mask) >> 4 * i), bits);
}
template <class F>
inline mask16 mask_of(const F& f) {
  const uint32x4_t bits = {1, 2, 4, 8};
  uint32_t mask = 0;
  for (int i = 0; i < 4; i++) mask |= vaddvq_u32(vandq_u32(f(i), bits)) << 4 * i;
  return static_cast<mask16>(mask);
}

// ---- float32 ---------------------------------------------------------------------------------

inline f32x16 broadcast(float x) {
  return quarters<f32x16>([&](int) { return vdupq_n_f32(x); });
}
inline f32x16 zero() { return broadcast(0); }
inline f32x16 add(f32x16 a, f32x16 b) {
  return quarters<f32x16>([&](int i) { return vaddq_f32(a.v[i], b.v[i]); });
}
inline f32x16 sub(f32x16 a, f32x16 b) {
  return quarters<f32x16>([&](int i) { return vsubq_f32(a.v[i], b.v[i]); });
}
inline f32x16 mul(f32x16 a, f32x16 b) {
  return quarters<f32x16>([&](int i) { return vmulq_f32(a.v[i], b.v[i]); });
}
inline f32x16 div(f32x16 a, f32x16 b) {
  return quarters<f32x16>([&](int i) { return vdivq_f32(a.v[i], b.v[i]); });
}
inline f32x16 fmadd(f32x16 a, f32x16 b, f32x16 c) {  // ab + c
  return quarters<f32x16>([&](int i) { return vfmaq_f32(c.v[i], a.v[i], b.v[i]); });
}
inline f32x16 fnmadd(f32x16 a, f32x16 b, f32x16 c) {  // c - ab
  return quarters<f32x16>([&](int i) { return vfmsq_f32(c.v[i], a.v[i], b.v[i]); });
}
inline f32x16 fmsub(f32x16 a, f32x16 b, f32x16 c) {  // ab - c
  return quarters<f32x16>([&](int i) { return vfmaq_f32(vnegq_f32(c.v[i]), a.v[i], b.v[i]); });
}
inline f32x16 min(f32x16 a, f32x16 b) {  // b where one is NaN, as on other processors
  return quarters<f32x16>(
      [&](int i) { return vbslq_f32(vcltq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]); });
}
inline f32x16 max(f32x16 a, f32x16 b) {
  return quarters<f32x16>(
      [&](int i) { return vbslq_f32(vcgtq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]); });
}
inline f32x16 abs(f32x16 x) {
  return quarters<f32x16>([&](int i) { return vabsq_f32(x.v[i]); });
}
inline f32x16 sqrt(f32x16 x) {
  return quarters<f32x16>([&](int i) { return vsqrtq_f32(x.v[i]); });
}
inline f32x16 round_to_even(f32x16 x) {
  return quarters<f32x16>([&](int i) { return vrndnq_f32(x.v[i]); });
}
inline f32x16 select(mask16 mask, f32x16 x, f32x16 otherwise) {
  return quarters<f32x16>(
      [&](int i) { return vbslq_f32(lanes_of(mask, i), x.v[i], otherwise.v[i]); });
}
inline f32x16 masked(mask16 mask, f32x16 x) { return select(mask, x, zero()); }
inline f32x16 with_sign(f32x16 magnitude, f32x16 sign) {
  const uint32x4_t bit = vdupq_n_u32(0x80000000);
  return quarters<f32x16>([&](int i) { return vbslq_f32(bit, sign.v[i], magnitude.v[i]); });
}
inline f32x16 sub(mask16 mask, f32x16 a, f32x16 b) { return masked(mask, sub(a, b)); }
inline f32x16 div(mask16 mask, f32x16 a, f32x16 b) { return masked(mask, div(a, b)); }
inline f32x16 max(mask16 mask, f32x16 a, f32x16 b) { return select(mask, max(a, b), a); }

inline mask16 less(f32x16 a, f32x16 b) {
  return mask_of([&](int i) { return vcltq_f32(a.v[i], b.v[i]); });
}
inline mask16 less_equal(f32x16 a, f32x16 b) {
  return mask_of([&](int i) { return vcleq_f32(a.v[i], b.v[i]); });
}
inline mask16 greater(f32x16 a, f32x16 b) { return less(b, a); }
inline mask16 greater_equal(f32x16 a, f32x16 b) { return less_equal(b, a); }
inline mask16 equal(mask16 mask, f32x16 a, f32x16 b) {
  return mask & mask_of([&](int i) { return vceqq_f32(a.v[i], b.v[i]); });
}
inline mask16 is_nan(f32x16 x) { return static_cast<mask16>(~equal(0xffff, x, x)); }
inline mask16 greater(mask16 mask, f32x16 a, f32x16 b) { return mask & greater(a, b); }
inline mask16 greater_equal(mask16 mask, f32x16 a, f32x16 b) { return mask & greater_equal(a, b); }

inline float first_lane(f32x16 x) { return vgetq_lane_f32(x.v[0], 0); }
inline float reduce_add(f32x16 x) {
  const float32x4_t four = vaddq_f32(vaddq_f32(x.v[0], x.v[2]), vaddq_f32(x.v[1], x.v[3]));
  const float32x4_t pairs = vpaddq_f32(four, four);
  return vgetq_lane_f32(vpaddq_f32(pairs, pairs), 0);
}
inline float reduce_add(mask16 mask, f32x16 x) { return reduce_add(masked(mask, x)); }
inline float reduce_max(f32x16 x) {
  return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.v[0], x.v[2]), vmaxq_f32(x.v[1], x.v[3])));
}
inline float reduce_max(mask16 mask, f32x16 x) {
  return reduce_max(select(mask, x, broadcast(-__builtin_inff())));
}

// ---- integers and float64 --------------------------------------------------------------------

inline i32x16 zero_i32() {
  return quarters<i32x16>([&](int) { return vdupq_n_s32(0); });
}
inline i32x16 as_i32(f32x16 x) {
  return quarters<i32x16>([&](int i) { return vreinterpretq_s32_f32(x.v[i]); });
}
inline f32x16 as_f32(i32x16 x) {
  return quarters<f32x16>([&](int i) { return vreinterpretq_f32_s32(x.v[i]); });
}
inline i32x16 to_i32(f32x16 x) {  // rounded to even
  return quarters<i32x16>([&](int i) { return vcvtnq_s32_f32(x.v[i]); });
}
inline i32x16 add_i32(i32x16 a, i32x16 b) {
  return quarters<i32x16>([&](int i) { return vaddq_s32(a.v[i], b.v[i]); });
}
inline i32x16 max_u32(i32x16 a, i32x16 b) {
  return quarters<i32x16>([&](int i) {
    return vreinterpretq_s32_u32(
        vmaxq_u32(vreinterpretq_u32_s32(a.v[i]), vreinterpretq_u32_s32(b.v[i])));
  });
}
inline int32_t reduce_add_i32(i32x16 x) {
  return vaddvq_s32(vaddq_s32(vaddq_s32(x.v[0], x.v[1]), vaddq_s32(x.v[2], x.v[3])));
}
inline uint32_t reduce_max_u32(i32x16 x) {
  const i32x16 folded = max_u32(max_u32(x, {{x.v[1], x.v[1], x.v[1], x.v[1]}}),
                                max_u32({{x.v[2], x.v[2], x.v[2], x.v[2]}},
                                        {{x.v[3], x.v[3], x.v[3], x.v[3]}}));
  return vmaxvq_u32(vreinterpretq_u32_s32(folded.v[0]));
}
inline i32x16 load_i32(const void* p) {
  const auto* lanes = static_cast<const int32_t*>(p);
  return quarters<i32x16>([&](int i) { return vld1q_s32(lanes + 4 * i); });
}
inline i32x16 load_i32(const int32_t* p, mask16 mask) {
  if (mask == 0xffff) return load_i32(p);
  alignas(16) int32_t lanes[16] = {};
  for (int i = 0; i < 16; i++)
    if (mask >> i & 1) lanes[i] = p[i];
  return load_i32(lanes);
}
inline void store_i32(void* p, i32x16 x) {
  for (int i = 0; i < 4; i++) vst1q_s32(static_cast<int32_t*>(p) + 4 * i, x.v[i]);
}
inline void store_aligned_i32(void* p, i32x16 x) { store_i32(p, x); }
inline void store_i8(void* p, i32x16 x) {  // saturated
  const int16x8_t low = vcombine_s16(vqmovn_s32(x.v[0]), vqmovn_s32(x.v[1]));
  const int16x8_t high = vcombine_s16(vqmovn_s32(x.v[2]), vqmovn_s32(x.v[3]));
  vst1q_s8(static_cast<int8_t*>(p), vcombine_s8(vqmovn_s16(low), vqmovn_s16(high)));
}

inline u64x8 broadcast_u64(uint64_t x) {
  return quarters<u64x8>([&](int) { return vdupq_n_u64(x); });
}
inline u64x8 lane_numbers_u64() {
  return quarters<u64x8>([&](int i) {
    const uint64_t lanes[2] = {static_cast<uint64_t>(2 * i), static_cast<uint64_t>(2 * i + 1)};
    return vld1q_u64(lanes);
  });
}
inline u64x8 add_u64(u64x8 a, u64x8 b) {
  return quarters<u64x8>([&](int i) { return vaddq_u64(a.v[i], b.v[i]); });
}
inline u64x8 mul_u64(u64x8 a, u64x8 b) {  // there is no instruction for it
  return quarters<u64x8>([&](int i) {
    const uint64_t lanes[2] = {vgetq_lane_u64(a.v[i], 0) * vgetq_lane_u64(b.v[i], 0),
                               vgetq_lane_u64(a.v[i], 1) * vgetq_lane_u64(b.v[i], 1)};
    return vld1q_u64(lanes);
  });
}
inline u64x8 xor_u64(u64x8 a, u64x8 b) {
  return quarters<u64x8>([&](int i) { return veorq_u64(a.v[i], b.v[i]); });
}
template <int BITS>
inline u64x8 shift_right_u64(u64x8 x) {
  return quarters<u64x8>([&](int i) { return vshrq_n_u64(x.v[i], BITS); });
}
inline f32x16 to_f32(u64x8 low, u64x8 high) {
  auto four = [](uint64x2_t a, uint64x2_t b) {
    return vcombine_f32(vcvt_f32_f64(vcvtq_f64_u64(a)), vcvt_f32_f64(vcvtq_f64_u64(b)));
  };
  return {{four(low.v[0], low.v[1]), four(low.v[2], low.v[3]), four(high.v[0], high.v[1]),
           four(high.v[2], high.v[3])}};
}

inline f64x8 zero_f64() {
  return quarters<f64x8>([&](int) { return vdupq_n_f64(0); });
}
inline f64x8 add_widened(f64x8 sum, f32x16 x) {  // sum + the lower half + the upper half
  for (int i = 0; i < 4; i++) {
    float64x2_t& own = sum.v[i];
    const float32x4_t low = x.v[i / 2], high = x.v[2 + i / 2];
    own = vaddq_f64(own, vcvt_f64_f32(i % 2 ? vget_high_f32(low) : vget_low_f32(low)));
    own = vaddq_f64(own, vcvt_f64_f32(i % 2 ? vget_high_f32(high) : vget_low_f32(high)));
  }
  return sum;
}
inline double reduce_add(f64x8 x) {
  return vaddvq_f64(vaddq_f64(vaddq_f64(x.v[0], x.v[2]), vaddq_f64(x.v[1], x.v[3])));
}

// ---- bfloat16, half precision, memory --------------------------------------------------------

inline float32x4_t widen(uint16x4_t x) { return vreinterpretq_f32_u32(vshll_n_u16(x, 16)); }
inline f32x16 widen(bf16x16 x) {
  return {{widen(vget_low_u16(x.v[0])), widen(vget_high_u16(x.v[0])),
           widen(vget_low_u16(x.v[1])), widen(vget_high_u16(x.v[1]))}};
}
inline uint16x4_t bf16_bits(float32x4_t x) {  // to the nearest, of two the even one; NaN stays NaN
  const uint32x4_t bits = vreinterpretq_u32_f32(x);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
  return vshrn_n_u32(vbslq_u32(vceqq_f32(x, x), rounded, quiet), 16);
}
inline bf16x16 to_bf16(f32x16 x) {
  return {{vcombine_u16(bf16_bits(x.v[0]), bf16_bits(x.v[1])),
           vcombine_u16(bf16_bits(x.v[2]), bf16_bits(x.v[3]))}};
}
inline f32x16 round_to_bf16(f32x16 x) { return widen(to_bf16(x)); }
inline float32x4_t half_widened(uint16x4_t x) { return vcvt_f32_f16(vreinterpret_f16_u16(x)); }
inline uint16x4_t half_bits(float32x4_t x) { return vreinterpret_u16_f16(vcvt_f16_f32(x)); }
inline f32x16 round_to_half(f32x16 x) {
  return quarters<f32x16>([&](int i) { return half_widened(half_bits(x.v[i])); });
}
inline float half_to_float(uint16_t value) {
  return vgetq_lane_f32(half_widened(vdup_n_u16(value)), 0);
}

inline f32x16 load(const float* p) {
  return quarters<f32x16>([&](int i) { return vld1q_f32(p + 4 * i); });
}
inline f32x16 load(const float* p, mask16 mask) {
  if (mask == 0xffff) return load(p);
  alignas(16) float lanes[16] = {};
  for (int i = 0; i < 16; i++)
    if (mask >> i & 1) lanes[i] = p[i];
  return load(lanes);
}
inline f32x16 load_bf16(const void* p) {
  const auto* numbers = static_cast<const uint16_t*>(p);
  return widen(bf16x16{{vld1q_u16(numbers), vld1q_u16(numbers + 8)}});
}
inline f32x16 load(const uint16_t* p, mask16 mask) {
  if (mask == 0xffff) return load_bf16(p);
  alignas(16) uint16_t lanes[16] = {};
  for (int i = 0; i < 16; i++)
    if (mask >> i & 1) lanes[i] = p[i];
  return load_bf16(lanes);
}
inline f32x16 load_i8(const int8_t* p) {
  const int16x8_t low = vmovl_s8(vld1_s8(p)), high = vmovl_s8(vld1_s8(p + 8));
  return {{vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(low))),
           vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))),
           vcvtq_f32_s32(vmovl_s16(vget_high_s16(high)))}};
}
inline f32x16 load_aligned(const float* p) { return load(p); }
inline f32x16 load_half(const void* p) {
  const auto* numbers = static_cast<const uint16_t*>(p);
  return quarters<f32x16>([&](int i) { return half_widened(vld1_u16(numbers + 4 * i)); });
}
inline void store(float* p, f32x16 x) {
  for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, x.v[i]);
}
inline void store(float* p, mask16 mask, f32x16 x) {
  if (mask == 0xffff) return store(p, x);
  alignas(16) float lanes[16];
  store(lanes, x);
  for (int i = 0; i < 16; i++)
    if (mask >> i & 1) p[i] = lanes[i];
}
inline void store(uint16_t* p, mask16 mask, f32x16 x) {
  alignas(16) uint16_t lanes[16];
  uint16_t* target = mask == 0xffff ? p : lanes;
  const bf16x16 numbers = to_bf16(x);
  vst1q_u16(target, numbers.v[0]), vst1q_u16(target + 8, numbers.v[1]);
  if (mask == 0xffff) return;
  for (int i = 0; i < 16; i++)
    if (mask >> i & 1) p[i] = lanes[i];
}
inline void store_aligned(float* p, f32x16 x) { store(p, x); }
inline void store_half(void* p, f32x16 x) {
  for (int i = 0; i < 4; i++) vst1_u16(static_cast<uint16_t*>(p) + 4 * i, half_bits(x.v[i]));
}
inline void store_pairs(int32_t* p, mask16 mask, f32x16 x) {  // bfloat16, two per lane: 8 lanes
  alignas(16) uint16_t numbers[16];
  store(numbers, 0xffff, x);
  for (int i = 0; i < 8; i++)
    if (mask >> i & 1) std::memcpy(p + i, numbers + 2 * i, 4);
}

inline void transpose4(int32x4_t& a, int32x4_t& b, int32x4_t& c, int32x4_t& d) {
  auto low = [](int32x4_t x, int32x4_t y) {
    return vreinterpretq_s32_s64(
        vtrn1q_s64(vreinterpretq_s64_s32(x), vreinterpretq_s64_s32(y)));
  };
  auto high = [](int32x4_t x, int32x4_t y) {
    return vreinterpretq_s32_s64(
        vtrn2q_s64(vreinterpretq_s64_s32(x), vreinterpretq_s64_s32(y)));
  };
  const int32x4_t ab0 = vtrn1q_s32(a, b), ab1 = vtrn2q_s32(a, b);
  const int32x4_t cd0 = vtrn1q_s32(c, d), cd1 = vtrn2q_s32(c, d);
  a = low(ab0, cd0), b = low(ab1, cd1), c = high(ab0, cd0), d = high(ab1, cd1);
}
// Lane i of vector j becomes lane j of vector i.
inline void transpose(i32x16 (&v)[16]) {
  i32x16 w[16];
  for (int row = 0; row < 4; row++)
    for (int column = 0; column < 4; column++) {
      int32x4_t block[4];
      for (int i = 0; i < 4; i++) block[i] = v[4 * row + i].v[column];
      transpose4(block[0], block[1], block[2], block[3]);
      for (int i = 0; i < 4; i++) w[4 * column + i].v[row] = block[i];
    }
  for (int i = 0; i < 16; i++) v[i] = w[i];
}

// 2^n x, the last step of exp: in two steps, because 2^n alone may be no float.
inline f32x16 scale_by_power(f32x16 x, f32x16 n) {
  auto unit = [](int32x4_t exponent) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(exponent, vdupq_n_s32(127)), 23));
  };
  return quarters<f32x16>([&](int i) {
    const int32x4_t power = vcvtnq_s32_f32(n.v[i]), half = vshrq_n_s32(power, 1);
    return vmulq_f32(vmulq_f32(x.v[i], unit(half)), unit(vsubq_s32(power, half)));
  });
}

}  // namespace
