// tiles.h for AVX-512 with VNNI, with or without BF16.

#pragma once

namespace {

// The accumulators of TILE_ROWS rows (two kinds with I8) just fit into 32 registers. A few rows more
// are worth some spilling, if that saves going through the panel twice.
constexpr int TILE_ROWS = 6, MAX_TILE_ROWS = 8;

struct DotF32 {
  static f32x16 add(f32x16 sum, i32x16 w, int32_t x) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(w), _mm512_castsi512_ps(_mm512_set1_epi32(x)), sum);
  }
};
struct DotBF16 {
  static f32x16 add(f32x16 sum, i32x16 w, int32_t x) {
#ifdef __AVX512BF16__
    return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)_mm512_set1_epi32(x));
#else
    const i32x16 upper = _mm512_set1_epi32(0xffff0000), both = _mm512_set1_epi32(x);
    sum = fmadd(as_f32(_mm512_slli_epi32(w, 16)), as_f32(_mm512_slli_epi32(both, 16)), sum);
    return fmadd(as_f32(_mm512_and_si512(w, upper)), as_f32(_mm512_and_si512(both, upper)), sum);
#endif
  }
};

template <class Dot, Prefetch P, int R>
inline void accumulate_dense(const uint8_t* w, PrefetchCursor cursor, const int32_t* x,
                             int64_t stride, int64_t n, Accumulators<R>& sums) {
  f32x16 own[R][2];  // in registers, which not every compiler finds for what it has by reference
  for (int r = 0; r < R; r++) own[r][0] = sums[r][0], own[r][1] = sums[r][1];
#pragma GCC unroll 4
  for (int64_t i = 0; i < n; i++, w += 128) {
    const i32x16 w0 = _mm512_load_si512(w), w1 = _mm512_load_si512(w + 64);
    prefetch<P, R>(w, cursor);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      own[r][0] = Dot::add(own[r][0], w0, x[r * stride + i]);
      own[r][1] = Dot::add(own[r][1], w1, x[r * stride + i]);
    }
  }
  for (int r = 0; r < R; r++) sums[r][0] = own[r][0], sums[r][1] = own[r][1];
}

template <Prefetch P, int R>
inline void accumulate_int8(const uint8_t* w, PrefetchCursor cursor, const int32_t* x,
                            const Int8Group* groups, int64_t n, Accumulators<R>& sums) {
  for (int64_t g = 0; g < n; g++) {
    i32x16 dots[R][2];
    for (int r = 0; r < R; r++)
      dots[r][0] = dots[r][1] = _mm512_set1_epi32(groups[r * n + g].offset);
#pragma GCC unroll 4
    for (int i = 0; i < GROUP_STEPS; i++, w += 128) {
      const i32x16 w0 = _mm512_load_si512(w), w1 = _mm512_load_si512(w + 64);
      prefetch<P, R>(w, cursor);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {
        const i32x16 b = _mm512_set1_epi32(x[r * n * GROUP_STEPS + g * GROUP_STEPS + i]);
        dots[r][0] = _mm512_dpbusd_epi32(dots[r][0], w0, b);
        dots[r][1] = _mm512_dpbusd_epi32(dots[r][1], w1, b);
      }
    }
    if (P == NEXT_PANEL) prefetch<P, R>(w, cursor);
    const f32x16 scale0 = load_half(w), scale1 = load_half(w + 32);
    w += 64;
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const f32x16 s = broadcast(groups[r * n + g].scale);
      const f32x16 d0 = _mm512_cvtepi32_ps(dots[r][0]), d1 = _mm512_cvtepi32_ps(dots[r][1]);
      sums[r][0] = fmadd(d0, mul(s, scale0), sums[r][0]);
      sums[r][1] = fmadd(d1, mul(s, scale1), sums[r][1]);
    }
  }
}

// The upper four bits come out 16 times too large, by a subtraction: that saves shifting them.
template <bool HAS_MINIMA, Prefetch P, int R>
inline void accumulate_int4(const uint8_t* w, PrefetchCursor cursor, const int32_t* x,
                            const Int4Group* groups, int64_t n, Accumulators<R>& sums) {
  const i32x16 lower_bits = _mm512_set1_epi8(15);
  const f32x16 sixteenth = broadcast(1.f / 16), centre = broadcast(INT4_CENTRE);
  for (auto& sum : sums) sum[0] = sum[1] = zero();
  for (int64_t g = 0; g < n; g++) {
    i32x16 dots[R][2];
    for (auto& dot : dots) dot[0] = dot[1] = zero_i32();
#pragma GCC unroll 8
    for (int i = 0; i < GROUP_STEPS; i++, w += 64) {
      const i32x16 both = _mm512_load_si512(w), low = _mm512_and_si512(both, lower_bits);
      if (P == SAME_PANEL || i % 2) prefetch<P, R>(w, cursor, false);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {
        const i32x16 b = _mm512_set1_epi32(x[r * n * GROUP_STEPS + g * GROUP_STEPS + i]);
        dots[r][0] = _mm512_dpbusd_epi32(dots[r][0], low, b);
        dots[r][1] = _mm512_dpbusd_epi32(dots[r][1], both, b);
      }
    }
    prefetch<P, R>(w, cursor, HAS_MINIMA);
    const f32x16 scale0 = load_half(w), full1 = load_half(w + 32), scale1 = mul(full1, sixteenth);
    const f32x16 minimum0 = HAS_MINIMA ? load_half(w + 64) : mul(scale0, centre);
    const f32x16 minimum1 = HAS_MINIMA ? load_half(w + 96) : mul(full1, centre);
    w += int4_group_bytes(HAS_MINIMA) - INT4_CODE_BYTES;
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const f32x16 s = broadcast(groups[r * n + g].scale);
      const f32x16 sum = broadcast(groups[r * n + g].sum);
      const f32x16 d0 = _mm512_cvtepi32_ps(dots[r][0]);
      const f32x16 d1 = _mm512_cvtepi32_ps(_mm512_sub_epi32(dots[r][1], dots[r][0]));
      sums[r][0] = fmadd(sum, minimum0, sums[r][0]);
      sums[r][1] = fmadd(sum, minimum1, sums[r][1]);
      sums[r][0] = fmadd(d0, mul(s, scale0), sums[r][0]);
      sums[r][1] = fmadd(d1, mul(s, scale1), sums[r][1]);
    }
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
    const i32x16 exponent = _mm512_set1_epi32(0x7f800000);
    return !_mm512_cmpeq_epi32_mask(_mm512_and_si512(v, exponent), exponent);
  }
};

template <>
struct DotFormat<uint16_t> {
  using Dot = DotBF16;
  static constexpr int64_t STEP = 2;
  static i32x16 row(f32x16 low, f32x16 high) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(to_bf16(low)), to_bf16(high), 1);
  }
  static f32x16 rounded(f32x16 v) { return round_to_bf16(v); }
  static i32x16 load_lanes(const uint16_t* p, int64_t n) {
    const __mmask32 mask = n >= 32 ? ~0u : n <= 0 ? 0 : (1u << n) - 1;
    return _mm512_maskz_loadu_epi16(mask, p);
  }
  // The values of two keys in pairs. Within 128 bits each: ``restore_order`` undoes that.
  static void store_panel(i32x16 one, i32x16 two, i32x16* panel) {
    panel[0] = _mm512_unpacklo_epi16(one, two), panel[1] = _mm512_unpackhi_epi16(one, two);
  }
  static void restore_order(f32x16& a, f32x16& b) {
    const f32x16 low = _mm512_shuffle_f32x4(a, b, 0x44), high = _mm512_shuffle_f32x4(a, b, 0xee);
    a = _mm512_shuffle_f32x4(low, low, 0xd8), b = _mm512_shuffle_f32x4(high, high, 0xd8);
  }
  static bool all_finite(i32x16 v) {
    const i32x16 exponent = _mm512_set1_epi16(0x7f80);
    return !_mm512_cmpeq_epi16_mask(_mm512_and_si512(v, exponent), exponent);
  }
};

}  // namespace
