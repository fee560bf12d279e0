// tiles.h for AMX: products of sixteen or 32 rows with a panel by the tile unit. Beside them those of
// dots_avx512.h, for float32, adapters, few rows of four bits, and experts of these.
//
// A panel is laid out as the unit wants its weights: sixteen steps are sixteen rows of 64 bytes, 128
// bytes apart, whose lanes hold two bfloat16 or four codes. Those of bfloat16 are summed otherwise than
// by AVX-512: the even and the odd ones of a row of 32 apart, then both added to the sum; so the unit
// does them for any number of rows. I8 becomes bfloat16 on its way to the unit, where its products would
// take less time than their scales, one for 32 of them. So it does for a single row too, which takes a
// quarter longer than by AVX-512. Products of four bits are exact, and both ways give the same bits.

#pragma once

#include "dots_avx512.h"

namespace {

// Input rows in one or two blocks of ``height``, a lane ``stride`` lanes above that of the next row.
struct TileRows {
  const int32_t* x[2];
  int64_t height, stride;
};

constexpr int64_t TILE_PREFETCH_DISTANCE = 16384;  // bytes
constexpr int64_t LINE = 64;

// ``bytes`` of the panel that are used now; or the cursor's stride, which is that of one call here.
template <Prefetch P>
inline void prefetch_tiles(const uint8_t* w, int64_t bytes, PrefetchCursor& cursor) {
  const char* from = P == SAME_PANEL ? reinterpret_cast<const char*>(w) + TILE_PREFETCH_DISTANCE
                                     : cursor.next;
  const int64_t count = P == SAME_PANEL ? bytes : cursor.stride;
  for (int64_t i = 0; P != NO_PREFETCH && i < count; i += LINE)
    __builtin_prefetch(from + i, 0, TO_L2);
  cursor.next += cursor.stride;
}

// ---- bfloat16 --------------------------------------------------------------------------------

// The operand that leaves the L1 cache to the other one, which is used again before it is.
enum Streamed { NEITHER, ROWS, WEIGHTS };

#define LOAD_TILE(tile, base, stride, streams) \
  if constexpr (streams) {                     \
    _tile_stream_loadd(tile, base, stride);    \
  } else {                                     \
    _tile_loadd(tile, base, stride);           \
  }

// Sixteen steps.
template <int BLOCKS, Streamed S>
inline void add_bf16_products(const uint8_t* w, const TileRows& rows, int64_t lane) {
  LOAD_TILE(6, w, 128, S == WEIGHTS);
  LOAD_TILE(7, w + 64, 128, S == WEIGHTS);
  LOAD_TILE(4, rows.x[0] + lane, rows.stride * 4, S == ROWS);
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  if constexpr (BLOCKS == 2) {
    LOAD_TILE(5, rows.x[1] + lane, rows.stride * 4, S == ROWS);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

// The sums of the blocks' rows with the 32 outputs of a panel, ``stride`` floats from row to row.
struct TileSums {
  float* blocks[2];
  int64_t stride;
};

// The tiles of a panel of bfloat16, ``steps`` long; what follows it need not be finite.
template <Prefetch P>
struct DenseTiles {
  const uint8_t* w;
  PrefetchCursor cursor;
  int64_t steps;
  alignas(64) uint8_t last[TILE_LANES * 128];

  DenseTiles(const uint8_t* w, PrefetchCursor cursor, int64_t steps)
      : w(w), cursor(cursor), steps(steps) {}  // and nothing of what may not be needed
  const uint8_t* next() {
    if (steps < TILE_LANES) {
      std::memset(last, 0, sizeof last);
      std::memcpy(last, w, steps * 128);
      finish_stores(last);
      return last;
    }
    const uint8_t* tile = w;
    prefetch_tiles<P>(w, TILE_LANES * 128, cursor);
    w += TILE_LANES * 128, steps -= TILE_LANES;
    return tile;
  }
};

// ``n`` steps; the lanes of rows are zero from there to the next multiple of sixteen. ``ADDS``: to what
// the sums are.
template <int BLOCKS, bool ADDS, Streamed S, class Tiles>
void multiply_tiles(Tiles&& tiles, const TileRows& rows, int64_t n, const TileSums& sums) {
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (BLOCKS == 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
  if constexpr (ADDS) {
    _tile_loadd(0, sums.blocks[0], sums.stride * 4);
    _tile_loadd(1, sums.blocks[0] + 16, sums.stride * 4);
  }
  if constexpr (ADDS && BLOCKS == 2) {
    _tile_loadd(2, sums.blocks[1], sums.stride * 4);
    _tile_loadd(3, sums.blocks[1] + 16, sums.stride * 4);
  }
  for (int64_t lane = 0; lane < n; lane += TILE_LANES)
    add_bf16_products<BLOCKS, S>(tiles.next(), rows, lane);
  _tile_stored(0, sums.blocks[0], sums.stride * 4);
  _tile_stored(1, sums.blocks[0] + 16, sums.stride * 4);
  if constexpr (BLOCKS == 2) {
    _tile_stored(2, sums.blocks[1], sums.stride * 4);
    _tile_stored(3, sums.blocks[1] + 16, sums.stride * 4);
  }
}

template <Prefetch P, int BLOCKS, bool ADDS = false, Streamed S = NEITHER>
void multiply_bf16(const uint8_t* w, PrefetchCursor cursor, const TileRows& rows, int64_t n,
                   const TileSums& sums) {
  finish_stores(w);
  multiply_tiles<BLOCKS, ADDS, S>(DenseTiles<P>(w, cursor, n), rows, n, sums);
}

// ---- codes of eight bits ---------------------------------------------------------------------

constexpr int64_t UNPACKED_BYTES = TILE_LANES * 128;  // a group as bfloat16
static_assert(TILE_LANES * 2 == GROUP, "a group fills a pair of tiles");

// Numbers of sixteen outputs from the codes of a group. A float whose second byte is a code is 2^15
// more than the code, so that a number takes one operation, and is exact: a scale keeps fifteen bits.
// It is cut off to bfloat16; the factor makes up for that on the average, and leaves errors of little
// more than half a unit.
struct CodeNumbers {
  const f32x16 scale, offset;
  static constexpr float CUT = 1 + 0.72f / 256, BASE = 32768, ZERO = 128;

  explicit CodeNumbers(f32x16 scales)
      : scale(as_f32(_mm512_and_si512(as_i32(mul(scales, broadcast(CUT))),
                                      _mm512_set1_epi32(~0x1ff)))),
        offset(mul(scale, broadcast(-BASE - ZERO))) {}

  // Two steps of a tile, 128 bytes apart: four codes of each output.
  void unpack(i32x16 codes, uint8_t* tile) const {
    constexpr __mmask64 SECOND_BYTES = 0x2222222222222222, LOWER_HALVES = 0x3333333333333333;
    const i32x16 base = as_i32(broadcast(BASE)), second = _mm512_set1_epi32(0xff00);
    const i32x16 first_codes = _mm512_set4_epi32(0x0c00, 0x0800, 0x0400, 0);
    const i32x16 third_codes = _mm512_set4_epi32(0x0e00, 0x0a00, 0x0600, 0x0200);
    const i32x16 upper_halves = _mm512_set4_epi32(0x0f0e, 0x0b0a, 0x0706, 0x0302);
    auto number = [&](i32x16 x) { return as_i32(fmadd(as_f32(x), scale, offset)); };
    auto moved = [&](i32x16 order) {
      return number(_mm512_mask_shuffle_epi8(base, SECOND_BYTES, codes, order));
    };
    auto masked = [&](i32x16 x) {  // x & second | base
      return number(_mm512_ternarylogic_epi32(x, second, base, 0xea));
    };
    auto pairs = [&](i32x16 even, i32x16 odd) {
      return _mm512_mask_shuffle_epi8(odd, LOWER_HALVES, even, upper_halves);
    };
    _mm512_store_si512(tile, pairs(moved(first_codes), masked(codes)));
    _mm512_store_si512(tile + 128, pairs(moved(third_codes), masked(_mm512_srli_epi32(codes, 16))));
  }
};

// The tiles of a panel of I8, kept in ``memory``: all of them, or the last ``COUNT``.
template <Prefetch P, int64_t COUNT = 0>
struct UnpackedTiles {
  const uint8_t* w;
  PrefetchCursor cursor;
  uint8_t* memory;
  int64_t index = 0;

  const uint8_t* next() {
    uint8_t* tile = memory + index * UNPACKED_BYTES;
    if (P == NEXT_PANEL) prefetch_tiles<P>(w, INT8_GROUP_BYTES, cursor);
    for (int64_t half = 0; half < 2; half++) {
      const CodeNumbers numbers(load_half(w + PANEL * GROUP + 32 * half));
#pragma GCC unroll 8
      for (int64_t i = 0; i < GROUP_STEPS; i++) {
        const uint8_t* codes = w + i * 128 + half * LINE;
        prefetch_soon(codes);
        numbers.unpack(_mm512_load_si512(codes), tile + i * 256 + half * 64);
      }
    }
    prefetch_soon(w + PANEL * GROUP);
    finish_stores(tile);
    w += INT8_GROUP_BYTES, index++;
    if (index == COUNT) index = 0;
    return tile;
  }

 private:
  // A line at a time and into L1: else lines that are waited for leave no room for those from L2.
  static void prefetch_soon(const uint8_t* p) {
    if (P == SAME_PANEL) __builtin_prefetch(p + 6 * INT8_GROUP_BYTES, 0, TO_L1);
  }
};

// ---- codes of four bits ----------------------------------------------------------------------

// What codes with or without minima do with a group of weights. ``load``: into the tiles of weights.
// ``add``: to a row's sums, from its products with the codes, as accumulate_int4 does.
//
// The upper four bits stay where they are: 16 times too large, as in accumulate_int4.
template <bool HAS_MINIMA>
struct Int4Tiles {
  static constexpr int64_t BYTES = int4_group_bytes(HAS_MINIMA);
  f32x16 scale0, scale1, minimum0, minimum1;

  explicit Int4Tiles(const uint8_t* w) {
    w += INT4_CODE_BYTES;
    scale0 = load_half(w), scale1 = load_half(w + 32);
    minimum0 = HAS_MINIMA ? load_half(w + 64) : mul(scale0, broadcast(INT4_CENTRE));
    minimum1 = HAS_MINIMA ? load_half(w + 96) : mul(scale1, broadcast(INT4_CENTRE));
    scale1 = mul(scale1, broadcast(1.f / 16));
  }
  static void load(const uint8_t* w, uint8_t* codes) {
    const i32x16 lower_bits = _mm512_set1_epi8(15);
    for (int i = 0; i < GROUP_STEPS; i++, codes += 128) {
      const i32x16 both = _mm512_load_si512(w + i * 64);
      _mm512_store_si512(codes, _mm512_and_si512(both, lower_bits));
      _mm512_store_si512(codes + 64, _mm512_andnot_si512(lower_bits, both));
    }
    codes -= GROUP_STEPS * 128;
    finish_stores(codes);
    _tile_loadd(6, codes, 128);
    _tile_loadd(7, codes + 64, 128);
  }
  void add(const int32_t* dots, const Int4Group& group, float* sums) const {
    const f32x16 s = broadcast(group.scale), sum = broadcast(group.sum);
    const f32x16 d0 = _mm512_cvtepi32_ps(_mm512_load_si512(dots));
    const f32x16 d1 = _mm512_cvtepi32_ps(_mm512_load_si512(dots + 16));
    const f32x16 sum0 = fmadd(sum, minimum0, load_aligned(sums));
    const f32x16 sum1 = fmadd(sum, minimum1, load_aligned(sums + 16));
    store_aligned(sums, fmadd(d0, mul(s, scale0), sum0));
    store_aligned(sums + 16, fmadd(d1, mul(s, scale1), sum1));
  }
};

// ``n`` groups; ``groups`` of the rows of both blocks. The products of one block with a group are made
// while those of the block before, or of the group before, are scaled: each has tiles of its own.
template <bool HAS_MINIMA, Prefetch P, int BLOCKS>
void multiply_int4(const uint8_t* w, PrefetchCursor cursor, const TileRows& rows,
                   const Int4Group* const (&groups)[2], int64_t n, float* sums) {
  using Codes = Int4Tiles<HAS_MINIMA>;
  finish_stores(w);
  alignas(64) uint8_t codes[GROUP_STEPS * 128];
  alignas(64) int32_t dots[2][TILE_HEIGHT * PANEL];
  auto load_tiles = [&](int64_t turn) {
    if (turn % BLOCKS) return;  // the weights are there
    prefetch_tiles<P>(w + turn / BLOCKS * Codes::BYTES, Codes::BYTES, cursor);
    Codes::load(w + turn / BLOCKS * Codes::BYTES, codes);
  };
  auto x_at = [&](int64_t turn) { return rows.x[turn % BLOCKS] + turn / BLOCKS * GROUP_STEPS; };
  auto multiply_even = [&](int64_t turn) {
    load_tiles(turn);
    _tile_loadd(4, x_at(turn), rows.stride * 4);
    _tile_zero(0);
    _tile_zero(1);
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
    _tile_stored(0, dots[0], PANEL * 4);
    _tile_stored(1, dots[0] + 16, PANEL * 4);
  };
  auto multiply_odd = [&](int64_t turn) {
    load_tiles(turn);
    _tile_loadd(5, x_at(turn), rows.stride * 4);
    _tile_zero(2);
    _tile_zero(3);
    _tile_dpbsud(2, 5, 6);
    _tile_dpbsud(3, 5, 7);
    _tile_stored(2, dots[1], PANEL * 4);
    _tile_stored(3, dots[1] + 16, PANEL * 4);
  };
  auto scale = [&](int64_t turn) {
    const int64_t g = turn / BLOCKS, block = turn % BLOCKS;
    const Codes weights(w + g * Codes::BYTES);
    float* out = sums + block * rows.height * PANEL;
    for (int64_t r = 0; r < rows.height; r++)
      weights.add(dots[turn % 2] + r * PANEL, groups[block][r * n + g], out + r * PANEL);
  };
  for (int64_t i = 0; i < BLOCKS * rows.height * PANEL; i += 16) store_aligned(sums + i, zero());
  const int64_t turns = n * BLOCKS;
  multiply_even(0);
  for (int64_t turn = 1; turn < turns; turn += 2) {
    multiply_odd(turn);
    scale(turn - 1);
    if (turn + 1 < turns) multiply_even(turn + 1);
    scale(turn);
  }
  if (turns % 2) scale(turns - 1);
}

}  // namespace
