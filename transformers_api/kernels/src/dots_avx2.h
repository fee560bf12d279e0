// tiles.h for AVX2, with or without AVX-VNNI. Of the sixteen registers of eight lanes the
// accumulators of few rows fit with all 32 outputs of a panel; with more rows it is gone through
// twice, for 16 outputs each.

#pragma once

namespace {

constexpr int TILE_ROWS = 4, MAX_TILE_ROWS = 6;
constexpr int WIDE_ROWS = 2;  // up to so many rows take all outputs at once

// Outputs 8 v to 8 v + 7 of a row's accumulators.
inline __m256& part_of(f32x16 (&sums)[2], int v) {
  return v % 2 ? sums[v / 2].high : sums[v / 2].low;
}
inline __m256i load_part(const uint8_t* p, int v) {
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(p) + v);
}

struct DotF32 {
  static __m256 add(__m256 sum, __m256i w, __m256i x) {
    return _mm256_fmadd_ps(_mm256_castsi256_ps(w), _mm256_castsi256_ps(x), sum);
  }
};
struct DotBF16 {
  static __m256 add(__m256 sum, __m256i w, __m256i x) {
    const __m256i upper = _mm256_set1_epi32(static_cast<int32_t>(0xffff0000));
    sum = DotF32::add(sum, _mm256_slli_epi32(w, 16), _mm256_slli_epi32(x, 16));
    return DotF32::add(sum, _mm256_and_si256(w, upper), _mm256_and_si256(x, upper));
  }
};

// The parts FIRST to FIRST + PARTS - 1.
template <class Dot, Prefetch P, int R, int FIRST, int PARTS>
inline void accumulate_dense_parts(const uint8_t* w, PrefetchCursor cursor, const int32_t* x,
                                   int64_t stride, int64_t n, Accumulators<R>& sums) {
  __m256 own[R][PARTS];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < PARTS; v++) own[r][v] = part_of(sums[r], FIRST + v);
#pragma GCC unroll 2
  for (int64_t i = 0; i < n; i++, w += 128) {
    __m256i weights[PARTS];
    for (int v = 0; v < PARTS; v++) weights[v] = load_part(w, FIRST + v);
    if (FIRST == 0) prefetch<P, R>(w, cursor);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const __m256i lane = _mm256_set1_epi32(x[r * stride + i]);
      for (int v = 0; v < PARTS; v++) own[r][v] = Dot::add(own[r][v], weights[v], lane);
    }
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < PARTS; v++) part_of(sums[r], FIRST + v) = own[r][v];
}

template <class Dot, Prefetch P, int R>
inline void accumulate_dense(const uint8_t* w, PrefetchCursor cursor, const int32_t* x,
                             int64_t stride, int64_t n, Accumulators<R>& sums) {
  if constexpr (R <= WIDE_ROWS) {
    accumulate_dense_parts<Dot, P, R, 0, 4>(w, cursor, x, stride, n, sums);
  } else {
    accumulate_dense_parts<Dot, P, R, 0, 2>(w, cursor, x, stride, n, sums);
    accumulate_dense_parts<Dot, P, R, 2, 2>(w, cursor, x, stride, n, sums);
  }
}

// Weights of one step in the form that is multiplied with codes of 8 bits, and the products.
#ifdef HAS_VNNI256
constexpr bool ADDS_OFFSET = true;
struct Int8Weights {
  __m256i codes;
  explicit Int8Weights(__m256i w) : codes(w) {}
  __m256i add(__m256i sum, __m256i x) const { return _mm256_dpbusd_epi32(sum, codes, x); }
};
#else
// The instruction saturates at 16 bits, which magnitudes and signed inputs stay below.
constexpr bool ADDS_OFFSET = false;
struct Int8Weights {
  __m256i codes, magnitudes;
  explicit Int8Weights(__m256i w)
      : codes(_mm256_xor_si256(w, _mm256_set1_epi8(static_cast<char>(0x80)))),
        magnitudes(_mm256_abs_epi8(codes)) {}
  __m256i add(__m256i sum, __m256i x) const {
    const __m256i pairs = _mm256_maddubs_epi16(magnitudes, _mm256_sign_epi8(x, codes));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
};
#endif

template <Prefetch P, int R, int FIRST, int PARTS>
inline void accumulate_int8_parts(const uint8_t* w, PrefetchCursor cursor, const int32_t* x,
                                  const Int8Group* groups, int64_t n, Accumulators<R>& sums) {
  for (int64_t g = 0; g < n; g++) {
    __m256i dots[R][PARTS];
    for (int r = 0; r < R; r++)
      for (int v = 0; v < PARTS; v++)
        dots[r][v] = _mm256_set1_epi32(ADDS_OFFSET ? groups[r * n + g].offset : 0);
#pragma GCC unroll 2
    for (int i = 0; i < GROUP_STEPS; i++, w += 128) {
      if (FIRST == 0) prefetch<P, R>(w, cursor);
#pragma GCC unroll 4
      for (int v = 0; v < PARTS; v++) {
        const Int8Weights weights(load_part(w, FIRST + v));
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
          const __m256i lane = _mm256_set1_epi32(x[r * n * GROUP_STEPS + g * GROUP_STEPS + i]);
          dots[r][v] = weights.add(dots[r][v], lane);
        }
      }
    }
    if (P == NEXT_PANEL && FIRST == 0) prefetch<P, R>(w, cursor);
    for (int v = 0; v < PARTS; v++) {
      const __m256 scale =
          _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i*>(w) + FIRST + v));
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        __m256& sum = part_of(sums[r], FIRST + v);
        const __m256 factor = _mm256_mul_ps(_mm256_set1_ps(groups[r * n + g].scale), scale);
        sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[r][v]), factor, sum);
      }
    }
    w += 64;
  }
}

template <Prefetch P, int R>
inline void accumulate_int8(const uint8_t* w, PrefetchCursor cursor, const int32_t* x,
                            const Int8Group* groups, int64_t n, Accumulators<R>& sums) {
  if constexpr (R <= WIDE_ROWS) {
    accumulate_int8_parts<P, R, 0, 4>(w, cursor, x, groups, n, sums);
  } else {
    accumulate_int8_parts<P, R, 0, 2>(w, cursor, x, groups, n, sums);
    accumulate_int8_parts<P, R, 2, 2>(w, cursor, x, groups, n, sums);
  }
}

// The products of a group's codes. Without VNNI they are summed in 16 bits, which they just fit into:
// 8 steps of 2 products of at most 15 * 127.
#ifdef HAS_VNNI256
inline __m256i add_int4(__m256i sum, __m256i codes, __m256i x) {
  return _mm256_dpbusd_epi32(sum, codes, x);
}
inline __m256i total_int4(__m256i sum) { return sum; }
#else
static_assert(GROUP_STEPS * 2 * 15 * 127 < 1 << 15);
inline __m256i add_int4(__m256i sum, __m256i codes, __m256i x) {
  return _mm256_add_epi16(sum, _mm256_maddubs_epi16(codes, x));
}
inline __m256i total_int4(__m256i sum) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }
#endif

// Of both halves of the outputs, which are the lower and the upper bits of a byte, or of one.
template <bool HAS_MINIMA, Prefetch P, int R, int FIRST, int PARTS>
inline void accumulate_int4_parts(const uint8_t* w, PrefetchCursor cursor, const int32_t* x,
                                  const Int4Group* groups, int64_t n, Accumulators<R>& sums) {
  const __m256i lower_bits = _mm256_set1_epi8(15);
  for (int64_t g = 0; g < n; g++) {
    __m256i dots[R][PARTS];
    for (auto& row : dots)
      for (auto& dot : row) dot = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int i = 0; i < GROUP_STEPS; i++, w += 64) {
      if (FIRST == 0 && (P == SAME_PANEL || i % 2)) prefetch<P, R>(w, cursor, false);
#pragma GCC unroll 4
      for (int v = 0; v < PARTS; v++) {
        const int part = FIRST + v;
        __m256i codes = load_part(w, part % 2);
        if (part / 2) codes = _mm256_srli_epi16(codes, 4);
        codes = _mm256_and_si256(codes, lower_bits);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
          const __m256i lane = _mm256_set1_epi32(x[r * n * GROUP_STEPS + g * GROUP_STEPS + i]);
          dots[r][v] = add_int4(dots[r][v], codes, lane);
        }
      }
    }
    if (FIRST == 0) prefetch<P, R>(w, cursor, HAS_MINIMA);
    const auto* params = reinterpret_cast<const __m128i*>(w) + FIRST;
    for (int v = 0; v < PARTS; v++) {
      const __m256 scale = _mm256_cvtph_ps(_mm_load_si128(params + v));
      const __m256 minimum = HAS_MINIMA ? _mm256_cvtph_ps(_mm_load_si128(params + 4 + v))
                                        : _mm256_mul_ps(scale, _mm256_set1_ps(INT4_CENTRE));
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        __m256& sum = part_of(sums[r], FIRST + v);
        const Int4Group& group = groups[r * n + g];
        sum = _mm256_fmadd_ps(_mm256_set1_ps(group.sum), minimum, sum);
        const __m256 factor = _mm256_mul_ps(_mm256_set1_ps(group.scale), scale);
        sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(total_int4(dots[r][v])), factor, sum);
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
    accumulate_int4_parts<HAS_MINIMA, P, R, 0, 4>(w, cursor, x, groups, n, sums);
  } else {
    accumulate_int4_parts<HAS_MINIMA, P, R, 0, 2>(w, cursor, x, groups, n, sums);
    accumulate_int4_parts<HAS_MINIMA, P, R, 2, 2>(w, cursor, x, groups, n, sums);
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
    const __m256i exponent = _mm256_set1_epi32(0x7f800000);
    auto infinite = [&](__m256i half) {
      return _mm256_cmpeq_epi32(_mm256_and_si256(half, exponent), exponent);
    };
    const __m256i any = _mm256_or_si256(infinite(v.low), infinite(v.high));
    return _mm256_testz_si256(any, any);
  }
};

template <>
struct DotFormat<uint16_t> {
  using Dot = DotBF16;
  static constexpr int64_t STEP = 2;
  static i32x16 row(f32x16 low, f32x16 high) { return {to_bf16(low), to_bf16(high)}; }
  static f32x16 rounded(f32x16 v) { return round_to_bf16(v); }
  static i32x16 load_lanes(const uint16_t* p, int64_t n) {
    if (n >= 32) return load_i32(p);
    alignas(32) uint16_t lanes[32] = {};
    if (n > 0) std::memcpy(lanes, p, n * 2);
    return load_i32(lanes);
  }
  // The values of two keys in pairs.
  static void store_panel(i32x16 one, i32x16 two, i32x16* panel) {
    panel[0] = pairs(one.low, two.low), panel[1] = pairs(one.high, two.high);
  }
  static void restore_order(f32x16&, f32x16&) {}
  static bool all_finite(i32x16 v) {
    const __m256i exponent = _mm256_set1_epi16(0x7f80);
    auto infinite = [&](__m256i half) {
      return _mm256_cmpeq_epi16(_mm256_and_si256(half, exponent), exponent);
    };
    const __m256i any = _mm256_or_si256(infinite(v.low), infinite(v.high));
    return _mm256_testz_si256(any, any);
  }

 private:
  static i32x16 pairs(__m256i one, __m256i two) {
    const __m256i low = _mm256_unpacklo_epi16(one, two), high = _mm256_unpackhi_epi16(one, two);
    return {_mm256_permute2x128_si256(low, high, 0x20), _mm256_permute2x128_si256(low, high, 0x31)};
  }
};

}  // namespace
