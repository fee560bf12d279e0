// Register tiles: the products of R rows with one panel, accumulated in registers. How they are
// accumulated is a matter of the instruction set: dots_*.h.

#pragma once

#include <cstdint>

#include "simd.h"
#include "weights.h"

namespace {

template <int R>
using Accumulators = f32x16[R][2];

// What is prefetched while a panel is used, a line or two with each step along k.
enum Prefetch { NO_PREFETCH, SAME_PANEL, NEXT_PANEL };

// A position in the next panel, or in a part of it.
struct PrefetchCursor {
  const char* next;
  int64_t stride;
};

constexpr int64_t PREFETCH_DISTANCE = 4096;  // bytes

// SAME_PANEL: a little ahead in the same panel, into the L2 cache, or into L1 for tiles that leave
// no time to fetch from L2. NEXT_PANEL: into L2, slowly.
template <Prefetch P, int R>
void prefetch(const uint8_t* w, PrefetchCursor& cursor, bool both_lines = true) {
  constexpr int locality = R > 6 ? TO_L1 : TO_L2;
  const uint8_t* ahead = w + PREFETCH_DISTANCE;
  if (P == SAME_PANEL) __builtin_prefetch(ahead, 0, locality);
  if (P == SAME_PANEL && both_lines) __builtin_prefetch(ahead + 64, 0, locality);
  if (P == NEXT_PANEL) __builtin_prefetch(cursor.next, 0, TO_L2);
  if (P == NEXT_PANEL) cursor.next += cursor.stride;
}

// Panels of float32 or bfloat16, of weights, keys or values: ``n`` steps, rows ``stride`` lanes
// apart. ``Dot``: DotF32 or DotBF16.
template <class Dot, Prefetch P, int R>
void accumulate_dense(const uint8_t* w, PrefetchCursor cursor, const int32_t* x, int64_t stride,
                      int64_t n, Accumulators<R>& sums);

// A group of a quantised input row: its scale, and -128 times the sum of its codes. Weights are
// stored plus 128 because the instruction wants one unsigned operand; the offset takes that back.
struct Int8Group {
  float scale;
  int32_t offset;
};

// ``n`` groups.
template <Prefetch P, int R>
void accumulate_int8(const uint8_t* w, PrefetchCursor cursor, const int32_t* x,
                     const Int8Group* groups, int64_t n, Accumulators<R>& sums);

// A group of a quantised input row: its scale, and the sum of its rounded numbers, which is what the
// minimum of a group of weights is multiplied with.
struct Int4Group {
  float scale, sum;
};

// Without minima: I4C.
template <bool HAS_MINIMA, Prefetch P, int R>
void accumulate_int4(const uint8_t* w, PrefetchCursor cursor, const int32_t* x,
                     const Int4Group* groups, int64_t n, Accumulators<R>& sums);

// The operands of accumulate_dense that attention makes of keys, values, queries and probabilities
// of type T: keys and values become panels like those of weights, queries and probabilities rows of
// lanes. With BF16 all four are rounded to bfloat16.
template <class T>
struct DotFormat;

}  // namespace

#if defined(ISA_AMX)
#include "dots_amx.h"
#elif defined(ISA_AVX512)
#include "dots_avx512.h"
#elif defined(ISA_AVX2)
#include "dots_avx2.h"
#elif defined(ISA_NEON)
#include "dots_neon.h"
#endif
