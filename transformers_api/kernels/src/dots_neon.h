// tiles.h for ARM's NEON with the products of four codes of 8 bits, with or without those of two
// bfloat16 and those of eight codes for two rows and two outputs at once. Of the 32 registers of four lanes
// the accumulators of few rows fit with all 32 outputs of a panel; with more rows it is gone through
// twice, for 16 outputs each.

#pragma once

namespace {

constexpr int TILE_ROWS = 4, MAX_TILE_ROWS = 6;
constexpr int WIDE_ROWS = 2;  // up to so many rows take all outputs at once
constexpr int PARTS = 8;      // of a panel: four outputs each

// Outputs 4 v to 4 v + 3 of a row's accumulators.
inline float32x4_t& part_of(f32x16 (&sums)[2], int v) { return sums[v / 4].v[v % 4]; }
inline int32x4_t load_part(const uint8_t* p, int v) {
  return vld1q_s32(reinterpret_cast<const int32_t*>(p) + 4 * v);
}

struct DotF32 {
  static float32x4_t add(float32x4_t sum, int32x4_t w, int32x4_t x) {
    return vfmaq_f32(sum, vreinterpretq_f32_s32(w), vreinterpretq_f32_s32(x));
  }
};
struct DotBF16 {
  static float32x4_t add(float32x4_t sum, int32x4_t w, int32x4_t x) {
#ifdef HAS_BF16_I8MM
    return vbfdotq_f32(sum, vreinterpretq_bf16_s32(w), vreinterpretq_bf16_s32(x));
#else
    const int32x4_t upper = vdupq_n_s32(static_cast<int32_t>(0xffff0000));
    sum = DotF32::add(sum, vshlq_n_s32(w, 16), vshlq_n_s32(x, 16));
    return DotF32::add(sum, vandq_s32(w, upper), vandq_s32(x, upper));
#endif
  }
};

// The products of a group's codes for R rows and 4 COUNT outputs: those of two steps at a time, with
// rows ``stride`` lanes apart.
template <int R, int COUNT>
struct GroupDots {
#ifdef HAS_BF16_I8MM
  static constexpr int PAIRS = R / 2;  // of rows; each with two outputs in a register
#else
  static constexpr int PAIRS = 0;
#endif
  int32x4_t pairs[PAIRS + 1][COUNT][2], singles[R][COUNT];

  GroupDots() {
    for (auto& pair : pairs)
      for (auto& dots : pair) dots[0] = dots[1] = vdupq_n_s32(0);
    for (auto& row : singles)
      for (auto& dots : row) dots = vdupq_n_s32(0);
  }
  void add(int v, int8x16_t first, int8x16_t second, const int32_t* x, int64_t stride) {
#ifdef HAS_BF16_I8MM
    const int32x4_t a = vreinterpretq_s32_s8(first), b = vreinterpretq_s32_s8(second);
    const int8x16_t low = vreinterpretq_s8_s32(vzip1q_s32(a, b));
    const int8x16_t high = vreinterpretq_s8_s32(vzip2q_s32(a, b));
#pragma GCC unroll 4
    for (int i = 0; i < PAIRS; i++) {
      const int32_t* p = x + 2 * i * stride;
      const int8x16_t rows = vreinterpretq_s8_s32(vcombine_s32(vld1_s32(p), vld1_s32(p + stride)));
      pairs[i][v][0] = vmmlaq_s32(pairs[i][v][0], rows, low);
      pairs[i][v][1] = vmmlaq_s32(pairs[i][v][1], rows, high);
    }
#endif
#pragma GCC unroll 8
    for (int r = 2 * PAIRS; r < R; r++) {
      const int32x4_t lane = vdupq_n_s32(x[r * stride]), next = vdupq_n_s32(x[r * stride + 1]);
      singles[r][v] = vdotq_s32(singles[r][v], first, vreinterpretq_s8_s32(lane));
      singles[r][v] = vdotq_s32(singles[r][v], second, vreinterpretq_s8_s32(next));
    }
  }
  int32x4_t of(int r, int v) const {
    if (r >= 2 * PAIRS) return singles[r][v];
    const auto& dots = pairs[r / 2][v];
    return r % 2 ? vcombine_s32(vget_high_s32(dots[0]), vget_high_s32(dots[1]))
                 : vcombine_s32(vget_low_s32(dots[0]), vget_low_s32(dots[1]));
  }
};

// The parts FIRST to FIRST + COUNT - 1.
template <class Dot, Prefetch P, int R, int FIRST, int COUNT>
inline void accumulate_dense_parts(const uint8_t* w, PrefetchCursor cursor, const int32_t* x,
                                   int64_t stride, int64_t n, Accumulators<R>& sums) {
  float32x4_t own[R][COUNT];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < COUNT; v++) own[r][v] = part_of(sums[r], FIRST + v);
  for (int64_t i = 0; i < n; i++, w += 128) {
    int32x4_t weights[COUNT];
    for (int v = 0; v < COUNT; v++) weights[v] = load_part(w, FIRST + v);
    if (FIRST == 0) prefetch<P, R>(w, cursor);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const int32x4_t lane = vdupq_n_s32(x[r * stride + i]);
      for (int v = 0; v < COUNT; v++) own[r][v] = Dot::add(own[r][v], weights[v], lane);
    }
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < COUNT; v++) part_of(sums[r], FIRST + v) = own[r][v];
}

template <class Dot, Prefetch P, int R>
inline void accumulate_dense(const uint8_t* w, PrefetchCursor cursor, const int32_t* x,
                             int64_t stride, int64_t n, Accumulators<R>& sums) {
  if constexpr (R <= WIDE_ROWS) {
    accumulate_dense_parts<Dot, P, R, 0, PARTS>(w, cursor, x, stride, n, sums);
  } else {
    accumulate_dense_parts<Dot, P, R, 0, PARTS / 2>(w, cursor, x, stride, n, sums);
    accumulate_dense_parts<Dot, P, R, PARTS / 2, PARTS / 2>(w, cursor, x, stride, n, sums);
  }
}

// Codes of weights are stored plus 128, for other processors; here both operands have a sign.
template <Prefetch P, int R, int FIRST, int COUNT>
inline void accumulate_int8_parts(const uint8_t* w, PrefetchCursor cursor, const int32_t* x,
                                  const Int8Group* groups, int64_t n, Accumulators<R>& sums) {
  const int8x16_t sign = vreinterpretq_s8_u8(vdupq_n_u8(0x80));
  for (int64_t g = 0; g < n; g++) {
    GroupDots<R, COUNT> dots;
    for (int i = 0; i < GROUP_STEPS; i += 2, w += 256) {
      if (FIRST == 0) prefetch<P, R>(w, cursor);
      if (FIRST == 0) prefetch<P, R>(w + 128, cursor);
#pragma GCC unroll 8
      for (int v = 0; v < COUNT; v++) {
        auto codes = [&](int64_t at) {
          return veorq_s8(vreinterpretq_s8_s32(load_part(w + at, FIRST + v)), sign);
        };
        dots.add(v, codes(0), codes(128), x + g * GROUP_STEPS + i, n * GROUP_STEPS);
      }
    }
    if (P == NEXT_PANEL && FIRST == 0) prefetch<P, R>(w, cursor);
    for (int v = 0; v < COUNT; v++) {
      const float32x4_t scale =
          half_widened(vld1_u16(reinterpret_cast<const uint16_t*>(w) + 4 * (FIRST + v)));
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        float32x4_t& sum = part_of(sums[r], FIRST + v);
        const float32x4_t factor = vmulq_f32(vdupq_n_f32(groups[r * n + g].scale), scale);
        sum = vfmaq_f32(sum, vcvtq_f32_s32(dots.of(r, v)), factor);
      }
    }
    w += 64;
  }
}

template <Prefetch P, int R>
inline void accumulate_int8(const uint8_t* w, PrefetchCursor cursor, const int32_t* x,
                            const Int8Group* groups, int64_t n, Accumulators<R>& sums) {
  if constexpr (R <= WIDE_ROWS) {
    accumulate_int8_parts<P, R, 0, PARTS>(w, cursor, x, groups, n, sums);
  } else {
    accumulate_int8_parts<P, R, 0, PARTS / 2>(w, cursor, x, groups, n, sums);
    accumulate_int8_parts<P, R, PARTS / 2, PARTS / 2>(w, cursor, x, groups, n, sums);
  }
}

// Of both halves of the outputs, which are the lower and the upper bits of a byte, or of one.
template <bool HAS_MINIMA, Prefetch P, int R, int FIRST, int COUNT>
inline void accumulate_int4_parts(const uint8_t* w, PrefetchCursor cursor, const int32_t* x,
                                  const Int4Group* groups, int64_t n, Accumulators<R>& sums) {
  const uint8x16_t lower_bits = vdupq_n_u8(15);
  for (int64_t g = 0; g < n; g++) {
    GroupDots<R, COUNT> dots;
    for (int i = 0; i < GROUP_STEPS; i += 2, w += 128) {
      if (FIRST == 0 && P == SAME_PANEL) prefetch<P, R>(w, cursor, false);
      if (FIRST == 0) prefetch<P, R>(w + 64, cursor, false);
#pragma GCC unroll 8
      for (int v = 0; v < COUNT; v++) {
        const int part = FIRST + v;
        auto codes = [&](int64_t at) {
          const uint8x16_t both = vld1q_u8(w + at + 16 * (part % 4));
          return vreinterpretq_s8_u8(part < 4 ? vandq_u8(both, lower_bits) : vshrq_n_u8(both, 4));
        };
        dots.add(v, codes(0), codes(64), x + g * GROUP_STEPS + i, n * GROUP_STEPS);
      }
    }
    if (FIRST == 0) prefetch<P, R>(w, cursor, HAS_MINIMA);
    const auto* params = reinterpret_cast<const uint16_t*>(w) + 4 * FIRST;
    for (int v = 0; v < COUNT; v++) {
      const float32x4_t scale = half_widened(vld1_u16(params + 4 * v));
      const float32x4_t minimum = HAS_MINIMA ? half_widened(vld1_u16(params + PANEL + 4 * v))
                                             : vmulq_f32(scale, vdupq_n_f32(INT4_CENTRE));
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        float32x4_t& sum = part_of(sums[r], FIRST + v);
        const Int4Group& group = groups[r * n + g];
        sum = vfmaq_f32(sum, vdupq_n_f32(group.sum), minimum);
        const float32x4_t factor = vmulq_f32(vdupq_n_f32(group.scale), scale);
        sum = vfmaq_f32(sum, vcvtq_f32_s32(dots.of(r, v)), factor);
      }
    }
    w += int4_group_bytes(HAS_MINIMA) - INT4_CODE_BYTES;
  }
}

template <bool HAS_MINIMA, Prefetch P, int R>
inline void accumulate_int4(const uint8_t* w, PrefetchCursor cursor, const int32_t* x,
                            const Int4Group* groups, int64_t n, Accumulators<R>& sums) {
  for (auto& sum : sums) sum[0] = sum[1] = zero();
  if constexpr (R <= WIDE_ROWS) {
    accumulate_int4_parts<HAS_MINIMA, P, R, 0, PARTS>(w, cursor, x, groups, n, sums);
  } else {
    accumulate_int4_parts<HAS_MINIMA, P, R, 0, PARTS / 2>(w, cursor, x, groups, n, sums);
    accumulate_int4_parts<HAS_MINIMA, P, R, PARTS / 2, PARTS / 2>(w, cursor, x, groups, n, sums);
  }
}

template <>
struct DotFormat<float> {
  using Dot = DotF32;
  static constexpr int64_t STEP = 1;  // numbers in a lane
  static i32x16 row(f32x16 low, f32x16) { return as_i32(low); }
  static f32x16 rounded(f32x16 v) { return v; }
  static i32x16 load_lanes(const float* p, int64_t n) { return as_i32(load(p, first_lanes(n))); }
  static void store_panel(i32x16 low, i32x16 high, i32x16* panel) {
    panel[0] = low, panel[1] = high;
  }
  static void restore_order(f32x16&, f32x16&) {}
  static bool all_finite(i32x16 v) {
    const uint32x4_t exponent = vdupq_n_u32(0x7f800000);
    return !mask_of([&](int i) {
      return vceqq_u32(vandq_u32(vreinterpretq_u32_s32(v.v[i]), exponent), exponent);
    });
  }
};

template <>
struct DotFormat<uint16_t> {
  using Dot = DotBF16;
  static constexpr int64_t STEP = 2;
  static i32x16 row(f32x16 low, f32x16 high) {
    const bf16x16 a = to_bf16(low), b = to_bf16(high);
    return {{vreinterpretq_s32_u16(a.v[0]), vreinterpretq_s32_u16(a.v[1]),
             vreinterpretq_s32_u16(b.v[0]), vreinterpretq_s32_u16(b.v[1])}};
  }
  static f32x16 rounded(f32x16 v) { return round_to_bf16(v); }
  static i32x16 load_lanes(const uint16_t* p, int64_t n) {
    if (n >= 32) return load_i32(p);
    alignas(16) uint16_t lanes[32] = {};
    if (n > 0) std::memcpy(lanes, p, n * 2);
    return load_i32(lanes);
  }
  // The values of two keys in pairs.
  static void store_panel(i32x16 one, i32x16 two, i32x16* panel) {
    for (int i = 0; i < 4; i++) {
      const uint16x8_t a = vreinterpretq_u16_s32(one.v[i]), b = vreinterpretq_u16_s32(two.v[i]);
      panel[i / 2].v[i % 2 * 2] = vreinterpretq_s32_u16(vzip1q_u16(a, b));
      panel[i / 2].v[i % 2 * 2 + 1] = vreinterpretq_s32_u16(vzip2q_u16(a, b));
    }
  }
  static void restore_order(f32x16&, f32x16&) {}
  static bool all_finite(i32x16 v) {
    const uint16x8_t exponent = vdupq_n_u16(0x7f80);
    return !mask_of([&](int i) {
      const uint16x8_t numbers = vandq_u16(vreinterpretq_u16_s32(v.v[i]), exponent);
      return vreinterpretq_u32_u16(vceqq_u16(numbers, exponent));
    });
  }
};

}  // namespace
